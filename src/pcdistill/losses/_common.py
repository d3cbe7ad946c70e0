"""What every logit loss shares: checks, the compute dtype and the reduction. Nothing here reads a value back."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def shape(x: Tensor) -> str:
    """The shape as messages print it: [2, 10]."""
    return str(list(x.shape))


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise unless both are floating-point [N, C] of one shape on one device, C >= 2."""
    if student_logits.ndim != 2 or student_logits.shape[1] < 2:
        raise ValueError(f"student_logits must be [N, C] with C >= 2, got {shape(student_logits)}")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits {shape(teacher_logits)} and student_logits {shape(student_logits)} must have one shape; "
            "map the teacher's classes to the student's first"
        )
    if teacher_logits.device != student_logits.device:
        raise ValueError(f"teacher_logits are on {teacher_logits.device}, student_logits on {student_logits.device}")
    if not (student_logits.is_floating_point() and teacher_logits.is_floating_point()):
        raise TypeError(f"logits must be floating point, got {student_logits.dtype} and {teacher_logits.dtype}")


def check_target(target: Tensor | None, logits: Tensor, *, hard_only: bool = False) -> Tensor:
    """Return the target after checking that it is [N] integers or, unless `hard_only`, [N, C] probabilities."""
    n, c = logits.shape
    if target is None:
        raise ValueError(f"target must be given to this loss: [{n}] class indices, got None")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, the logits on {logits.device}")
    if list(target.shape) == [n] and not (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    ):
        return target.long()
    if list(target.shape) == [n, c] and target.is_floating_point():
        if hard_only:
            raise ValueError(
                f"target must be hard labels [{n}] for this loss, got soft labels {shape(target)}; "
                "turn mixup, cutmix and label smoothing off"
            )
        return target
    right = f"[{n}] class indices" if hard_only else f"[{n}] class indices or [{n}, {c}] probabilities"
    raise ValueError(f"target must be {right}, got {shape(target)} of {target.dtype}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise unless the temperature is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {temperature}")


def check_weight(weight: float, name: str) -> None:
    """Raise unless the weight is a finite number >= 0."""
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {weight}")


def check_reduction(reduction: str) -> None:
    """Raise unless the reduction is one of the three."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def upcast(x: Tensor) -> Tensor:
    """float32 at least: half precision is too coarse for log-probabilities; float64 stays (gradcheck needs it)."""
    return x if x.dtype == torch.float64 else x.float()


def reduce_loss(loss: Tensor, reduction: Reduction) -> Tensor:
    """Reduce per-sample losses [N]. The mean of no samples is 0 and keeps its graph: a batch may have no RoIs."""
    check_reduction(reduction)
    if reduction == "mean":
        return loss.sum() / max(loss.shape[0], 1)
    if reduction == "sum":
        return loss.sum()
    return loss


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Autocast off where x lives: products of features or of probabilities are too coarse in half precision."""
    if torch.amp.is_autocast_available(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield
