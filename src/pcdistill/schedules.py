"""Learning-rate and loss-weight schedules: pure functions of where training is, so a resumed run needs no state."""

import math
from collections.abc import Sequence


def warmup_factor(epoch: float, warmup_epochs: float) -> float:
    """Weight factor of a distillation term: min(e / W, 1) with the epoch counted from 1, as the CIFAR-100 papers do.

    Args:
        epoch: epochs done so far, from 0; the fraction is ignored, the factor is constant within an epoch.
        warmup_epochs: W; 0 means no warm-up.
    """
    return 1.0 if warmup_epochs <= 0 else min((math.floor(epoch) + 1) / warmup_epochs, 1.0)


def moved(start: float, end: float, *, epoch: float, total_epochs: int) -> float:
    """A value that moves in equal steps from `start` in the first epoch to `end` in the last, constant within an epoch.

    Args:
        start: the value in the first epoch.
        end: the value in the last epoch; a run of one epoch keeps `start`.
        epoch: epochs done, from 0; the fraction of the epoch under way is ignored.
        total_epochs: length of the run.
    """
    return start if total_epochs <= 1 else start + (end - start) * min(math.floor(epoch) / (total_epochs - 1), 1.0)


def learning_rate_factor(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    schedule: str = "cosine",
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Factor on the base learning rate at an optimiser step (0-based).

    Args:
        step: optimiser steps done so far.
        steps_per_epoch: optimiser steps in one epoch.
        epochs: length of the whole run.
        schedule: "cosine" to zero, "multistep" (times `gamma` after each milestone epoch) or "constant".
        warmup_epochs: linear rise from 1 / steps at the start, per step; the schedule goes on underneath.
        milestones: epochs after which the rate falls; 150 means that the 151st epoch is the first with the lower rate,
            and 1.5 that the rate falls in the middle of the second.
        gamma: factor of each milestone.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if schedule == "cosine":
        total = max(epochs * steps_per_epoch - warmup_steps, 1)
        progress = min(max(step - warmup_steps, 0) / total, 1.0)
        return rise * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "multistep":
        return rise * gamma ** sum(step >= milestone * max(steps_per_epoch, 1) for milestone in milestones)
    if schedule == "constant":
        return rise
    raise ValueError(f"schedule must be 'cosine', 'multistep' or 'constant', got {schedule!r}")
