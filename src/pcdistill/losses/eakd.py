"""Entropy-based adaptive distillation (EA-KD): samples on which teacher and student are unsure weigh more.

Source: Su, Tseng, Pu, Zhao, Yang, Chen, Lee, "EA-KD: Entropy-based Adaptive Knowledge Distillation", arXiv 2311.13621
(2023).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses._wrapper import WrappedLoss
from pcdistill.losses.base import LogitLoss, needs_of
from pcdistill.losses.kd import kd_loss

__all__ = ["EAKDLoss", "EntropyWeightedLoss", "eakd_loss", "entropy_weights"]


@torch.no_grad()
def entropy_weights(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    entropy_temperature: float = 3.0,
    max_entropy: float | None = None,
) -> Tensor:
    """A weight for every sample that rises with the entropy of the teacher's probabilities and of the student's.

        H(z) = -sum_c p_c log p_c, p = softmax(z / T')    w = H(z_t) * (1 + H(z_s) / H_max) / 2

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C].
        entropy_temperature: T' > 0, no unit. Published: 3 on CIFAR-100, 2 on ImageNet.
        max_entropy: H_max > 0 in nats; None is log C, the largest entropy there is.

    Returns:
        w in nats, [N], without a gradient, from 0 (a sure teacher) to log C (neither knows anything). The weights are
        not 1 in the mean, so that they also scale the loss.

    Raises:
        ValueError: a shape, device, temperature or max_entropy that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2311.13621. The released code of KD and DKD divides by 100 on CIFAR-100, where the paper and the code's
        other files divide by log 100: `max_entropy=100`.
    """
    check_logits(student_logits, teacher_logits)
    _check_options(entropy_temperature, max_entropy)
    largest = math.log(student_logits.shape[1]) if max_entropy is None else max_entropy
    student_entropy = _entropy(student_logits, entropy_temperature)
    return _entropy(teacher_logits, entropy_temperature) * (1 + student_entropy / largest) / 2


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    log_p = (upcast(logits) / temperature).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def _check_options(entropy_temperature: float, max_entropy: float | None) -> None:
    check_temperature(entropy_temperature, "entropy_temperature")
    if max_entropy is not None:
        check_temperature(max_entropy, "max_entropy")


class EntropyWeightedLoss(WrappedLoss):
    """A loss with a value for every sample, times :func:`entropy_weights` of the same logits, then reduced.

    Args:
        loss: a loss on logits whose attribute `reduction` is set to "none" here; what it was is done after weighting.
            Its needs, its temperature and its `set_progress` are passed on. The weights see the logits as they come
            in, also of a loss that standardises them, as in the released code.
        entropy_temperature: as in :func:`entropy_weights`.
        max_entropy: as in :func:`entropy_weights`.

    Raises:
        ValueError: a loss that has no value for every sample or does not look at the teacher, or a wrong option.
    """

    def __init__(self, loss: nn.Module, *, entropy_temperature: float = 3.0, max_entropy: float | None = None) -> None:
        super().__init__(loss)
        _check_options(entropy_temperature, max_entropy)
        self.entropy_temperature = entropy_temperature
        self.max_entropy = max_entropy
        self.reduce_by = _reduction_of(loss)
        self.reduction = "none"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        weights = entropy_weights(
            student_logits,
            teacher_logits,
            entropy_temperature=self.entropy_temperature,
            max_entropy=self.max_entropy,
        )
        per_sample: Tensor = self.loss(student_logits, teacher_logits, target)
        return reduce_loss(weights.to(per_sample.dtype) * per_sample, self.reduce_by)

    def extra_repr(self) -> str:
        return f"entropy_temperature={self.entropy_temperature:g}, max_entropy={self.max_entropy}"


def _reduction_of(loss: Any) -> Reduction:
    """What a loss does with its value for every sample; raise if it has none, or none that the teacher decides."""
    name = type(loss.loss if isinstance(loss, WrappedLoss) else loss).__name__
    if not hasattr(loss, "reduction"):
        raise ValueError(f"entropy weights need a loss with a value for every sample, and {name} has one for the batch")
    if not needs_of(loss).teacher:
        raise ValueError(f"entropy weights are of the teacher's making, and {name} does not look at the teacher")
    check_reduction(loss.reduction)
    reduction: Reduction = loss.reduction
    return reduction


def eakd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    entropy_temperature: float = 3.0,
    max_entropy: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD, every sample times its weight: w * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), w by `entropy_weights`.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        temperature: T > 0 of the divergence, no unit. Customary: 4 on CIFAR-100.
        entropy_temperature: T' of :func:`entropy_weights`.
        max_entropy: as in :func:`entropy_weights`.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in squared nats (times T^2): a scalar, or [N] for "none". Zero at equal probabilities. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, max_entropy or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2311.13621; the weights are constants, no gradient flows through them.
    """
    weights = entropy_weights(
        student_logits, teacher_logits, entropy_temperature=entropy_temperature, max_entropy=max_entropy
    )
    per_sample = kd_loss(student_logits, teacher_logits, temperature=temperature, reduction="none")
    return reduce_loss(weights * per_sample, reduction)


class EAKDLoss(LogitLoss):
    """Module form of :func:`eakd_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        entropy_temperature: float = 3.0,
        max_entropy: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        _check_options(entropy_temperature, max_entropy)
        check_reduction(reduction)
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        self.max_entropy = max_entropy
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return eakd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            entropy_temperature=self.entropy_temperature,
            max_entropy=self.max_entropy,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, entropy_temperature={self.entropy_temperature:g}, "
            f"max_entropy={self.max_entropy}, reduction={self.reduction!r}"
        )
