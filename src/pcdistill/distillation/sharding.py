"""A teacher whose weights are split over the processes of a run, by FSDP2 (`torch.distributed.fsdp.fully_shard`)."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill.errors import InputError

MOST_PARTS = 64  # a block with a smaller share of the weights goes with those around it


class Rounds:
    """Lets processes call a sharded model unequally often.

    Each pass needs the weights of all processes, so that one that has no more images would leave the others waiting.
    Before each pass they count who has images; in `finish`, one without computes along, until nobody has any. It is
    the principle of `torch.distributed.algorithms.join`, which knows no sharded models.

    Args:
        model: sharded; called with one tensor.
        example: [1, C, H, W] on the model's device, for passes that are for others.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model, self._example, self._along = model, example, False
        model.register_forward_pre_hook(self._before, prepend=True)  # before FSDP gathers the weights

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._along:
            self._active(1)

    def _active(self, mine: int) -> Tensor:
        """How many processes have images. The count is read by those without alone."""
        count = torch.tensor([mine], device=self._example.device)
        torch.distributed.all_reduce(count)
        return count

    @torch.no_grad()
    def finish(self) -> None:
        """Compute along until no process has images; all must call it, and all leave it together."""
        self._along = True
        try:
            while self._active(0).item() > 0:
                self._model(self._example)
        finally:
            self._along = False


def processes() -> int:
    """Of this run."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def check_processes(found: int) -> None:
    """Raise InputError unless there are several processes to split weights over."""
    if found < 2:
        raise InputError(
            "teacher.shard splits the weights over several processes, and there is one; start with "
            "torchrun --nproc_per_node N -m pcdistill ..., or leave it out"
        )


@cache
def mesh_of(device_type: str) -> Any:
    """All processes, for devices of this type. The first call may exchange something, so all must make it together."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (processes(),))


def shard_model(model: nn.Module, example: Tensor, device: torch.device) -> Rounds:
    """Split a frozen model's weights over all processes, in place: each keeps its part of every tensor.

    A pass gathers the weights of one block after the other, and lets go of them again. With :func:`mesh_of` called
    before, nothing is exchanged here, so processes may come one after another.

    Args:
        model: in eval mode, the same in every process.
        example: [1, C, H, W], what the model takes, on the device.
        device: of this process.

    Raises:
        InputError: there is one process alone.
    """
    check_processes(processes())
    from torch.distributed.fsdp import fully_shard  # not above: builds of torch without torch.distributed have none

    for block in [*blocks(model), model]:
        fully_shard(block, mesh=mesh_of(device.type), reshard_after_forward=True)
    return Rounds(model, example)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules to gather by themselves, inner ones first: members of lists and sequences, if they are large."""
    smallest = sum(p.numel() for p in model.parameters()) / MOST_PARTS
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = set()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
            listed = isinstance(module, nn.ModuleList | nn.Sequential)
            if not listed or isinstance(child, nn.ModuleList | nn.ModuleDict) or child in found:
                continue
            own = [p for p in child.parameters() if p not in taken]
            if own and sum(p.numel() for p in own) >= smallest:
                found.append(child)
                taken.update(own)

    visit(model)
    return found


def held(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of a sharded model's weights: in this process, in all, and of the largest block that a pass gathers."""
    from torch.distributed.tensor import DTensor

    sizes: dict[nn.Module, int] = {}
    parts = [*blocks(model), model]
    counted: set[nn.Parameter] = set()
    for part in parts:
        own = [p for p in part.parameters() if p not in counted]
        counted.update(own)
        sizes[part] = sum(p.numel() * p.element_size() for p in own)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local), sum(sizes.values()), max(sizes.values())
