"""Modules are given back as they came: modes, what is frozen, hooks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


class KeepsModes(nn.Module):
    """A module around a student, parts of which stay in eval mode, whatever mode is asked for.

    Attributes:
        held: their names within the student.
    """

    student: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.held: list[str] = []

    def hold(self, parts: Sequence[nn.Module]) -> None:
        """Keep these parts of the student in eval mode; by name, for a part may be exchanged (SyncBatchNorm)."""
        wanted = {id(part) for part in parts}
        self.held = [name for name, part in self.student.named_modules() if id(part) in wanted]

    def train(self, mode: bool = True) -> "KeepsModes":
        """Set the mode of all parts but those that are held."""
        super().train(mode)
        for name in self.held:
            self.student.get_submodule(name).training = False
        return self


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards every part is in the mode that it was in, which `train()` would not do."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """After the block, also after an exception: modes, `requires_grad`, hooks and in-place compilation as before it.

    Weights and buffers are not looked at, nor is the device.
    """
    parts = list(module.modules())
    modes = [part.training for part in parts]
    learns = [(p, p.requires_grad) for p in module.parameters()]
    tables = [table for part in parts for table in (part._forward_hooks, part._forward_pre_hooks)]
    hooks = [set(table) for table in tables]
    compiled = [part._compiled_call_impl for part in parts]
    try:
        yield
    finally:
        for part, training, own in zip(parts, modes, compiled, strict=True):
            part.training = training
            part._compiled_call_impl = own
        for parameter, wanted in learns:
            parameter.requires_grad_(wanted)
        for table, before in zip(tables, hooks, strict=True):
            for key in set(table) - before:
                del table[key]


def held_in_eval(module: nn.Module) -> list[nn.Module]:
    """The parts that stand in eval mode within a module that is being trained: they are to stay there.

    A module that stands in eval mode as a whole was only not switched yet: it holds nothing.
    """
    if not module.training:
        return []
    return [part for part in module.modules() if not part.training]
