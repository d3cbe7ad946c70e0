"""Modules that a user passes in: what cannot be trained is said in one sentence, before the first step."""

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.data.loader import Batch, labelled_rows
from pcdistill.distillation.teacher import logits_of
from pcdistill.distillation.unused import as_it_is
from pcdistill.engine.modes import evaluating
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError
from pcdistill.models.feature_maps import unwrap

TRIED = 4  # samples of each view in the pass before training


def check_modules(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise unless the student can be trained beside the teacher, as far as can be seen without running them.

    Raises:
        InputError: no module, parameters without values, one module in both roles or parameters that both have, a
            wrapper for several processes, weights in half precision, nothing to train.
    """
    for name, module in (("student", student), ("teacher", teacher)):
        if module is not None:
            _check_module(module, name)
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError("the student has no parameter that requires a gradient, so there is nothing to train")
    for name, p in student.named_parameters():
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"the student's {name} is {str(p.dtype).removeprefix('torch.')}, too coarse to be trained; pass "
                'student.float(), and train_options={"precision": "bfloat16"} for speed'
            )
    if teacher is None:
        return
    if unwrap(student) is unwrap(teacher):
        raise InputError("teacher and student are one module; give the student a copy: copy.deepcopy(teacher)")
    own = {_storage(p) for p in teacher.parameters() if not is_lazy(p)}
    common = [name for name, p in student.named_parameters() if not is_lazy(p) and p.numel() and _storage(p) in own]
    if common:
        raise InputError(
            f"teacher and student share {len(common)} parameters ({common[0]}), which cannot be frozen and trained at "
            "once; give the student its own: copy.deepcopy"
        )


def _check_module(module: nn.Module, name: str) -> None:
    if not isinstance(module, nn.Module):
        raise InputError(f"the {name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise InputError(f"the {name} is in DistributedDataParallel already; pass {name}.module, training wraps it")
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            if name == "teacher":
                raise InputError(f"the teacher's {key} has no values yet; run it on one batch, and load its weights")
        elif tensor.device.type == "meta":
            raise InputError(
                f"the {name}'s {key} is on the meta device, where it has no values; make the module on a real device, "
                "or call to_empty and load its weights"
            )


def _storage(p: Tensor) -> tuple[str, int]:
    return str(p.device), p.untyped_storage().data_ptr() or id(p)


def count_classes(student: nn.Module, images: Tensor) -> int:
    """C, from the student's logits of some images [N, ...].

    A lazy module is made here. One that came compiled is asked without its compilation, so that hooks can be set.

    Raises:
        InputError: the student cannot run on the images, or gives no logits [N, C].
    """
    try:
        with evaluating(student), torch.no_grad():
            logits = logits_of(unwrap(student)(images))
    except PcdistillError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise InputError(
            f"the student cannot run on images {list(images.shape)} of the loader ({_first_line(error)})"
            f"{_channels_hint(images)}"
        ) from error
    if logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point() or logits.shape[1] < 2:
        kind = str(logits.dtype).removeprefix("torch.")
        raise InputError(
            f"the student must give logits [N, C], C >= 2, and gives {kind} {list(logits.shape)} for {len(images)} "
            "images"
        )
    if not bool(logits.isfinite().all()):
        raise InputError("the student's logits are NaN or infinite before training; check its weights")
    return int(logits.shape[1])


def _channels_hint(images: Tensor) -> str:
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return "; they look like [N, H, W, C]: use images.permute(0, 3, 1, 2)"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def try_step(distiller: ClassificationDistiller, batch: Batch, views: int, placement: Placement) -> None:
    """One pass over a few samples of a training batch, forward and backward, without a trace.

    Raises:
        InputError: what a module or a loss raised.
    """
    few = few_of(batch, views, TRIED).to(placement)
    try:
        with as_it_is(distiller), torch.enable_grad(), placement.accelerator.autocast():
            distiller.train()
            loss = distiller(few)["loss"]
            wanted = [p for p in distiller.parameters() if p.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)
    except PcdistillError:
        raise
    except Exception as error:
        raise InputError(
            f"student, teacher and losses cannot be run on the first training batch, images {list(batch.images.shape)} "
            f"and labels {list(batch.target.shape)} ({_first_line(error)}){_channels_hint(batch.images)}"
        ) from error


def takes_one(distiller: ClassificationDistiller, batch: Batch, views: int, placement: Placement) -> bool:
    """Whether a step can be made on one sample: batch normalisation of vectors cannot."""
    one = few_of(batch, views, 1).to(placement)
    try:
        with as_it_is(distiller), torch.no_grad(), placement.accelerator.autocast():
            distiller.train()
            distiller.student(one.images)
    except ValueError:
        return False
    return True


def few_of(batch: Batch, views: int, count: int) -> Batch:
    """The first samples of a batch, in each view."""
    size = len(batch) // views
    rows = torch.cat([torch.arange(min(count, size)) + view * size for view in range(views)])
    target = batch.target[rows]
    return Batch(batch.images[rows], target, labelled=labelled_rows(target))


def last_size(loader: Any) -> int | None:
    """Samples in the last batch of a DataLoader's epoch; None where it cannot be told."""
    size, dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    if not isinstance(size, int) or getattr(loader, "drop_last", False) or not isinstance(dataset, Sized):
        return None
    try:
        count = len(sampler if isinstance(sampler, Sized) else dataset)
    except TypeError:
        return None
    return count % size or size


def held_parts(student: nn.Module, held: Sequence[nn.Module]) -> list[str]:
    """Names, within the student to be trained, of the parts that are to stay in eval mode."""
    wanted = {id(part) for part in held}
    return [name for name, part in student.named_modules() if id(part) in wanted]
