"""Transformed teacher matching (TTM, WTTM): a temperature on the teacher alone, as a power of its probabilities.

Source: "Knowledge Distillation Based on Transformed Teacher Matching", arXiv 2402.11148 (2024).
"""

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss

__all__ = ["TTMLoss", "WTTMLoss", "ttm_loss", "wttm_loss"]


def ttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    power: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence from the teacher's power-transformed probabilities to the student's own, at temperature 1.

        p = softmax(z_t)    U = sum_c p_c^g    q = softmax(z_s)
        loss = sum_c (p_c^g / U) * (log(p_c^g / U) - log q_c)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused, so labels may be soft or missing.
        power: the paper's gamma > 0, the same as a temperature of 1 / gamma on the teacher alone. Customary: 0.1.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". Never negative; zero if and only if q = p^g / U. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, power or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2402.11148. No squared temperature: the student's side has none. Customary weight 45 beside
        cross-entropy, in the released script for VGG-13 to VGG-8.
    """
    per_sample, _ = _transformed_kl(student_logits, teacher_logits, power)
    return reduce_loss(per_sample, reduction)


def wttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    power: float = 0.2,
    reduction: Reduction = "mean",
) -> Tensor:
    """TTM with each sample weighted by U = sum_c p_c^g, which is large where the teacher is unsure.

        loss = U * sum_c (p_c^g / U) * (log(p_c^g / U) - log q_c)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused, so labels may be soft or missing.
        power: the paper's gamma > 0. For powers below 1, U goes from 1 (a certain teacher) to C^(1 - g) (a flat one).
        reduction: "mean" over samples (the weights are not normalised), "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". Never negative; zero if and only if q = p^g / U. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, power or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2402.11148. Power 0.2 and weight 4 are the released script's, which runs it beside CRD.
    """
    per_sample, power_sum = _transformed_kl(student_logits, teacher_logits, power)
    return reduce_loss(power_sum * per_sample, reduction)


def _transformed_kl(student_logits: Tensor, teacher_logits: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """KL(p^g / U || q) and U, both [N]."""
    check_logits(student_logits, teacher_logits)
    check_temperature(power, "power")
    log_q = upcast(student_logits).log_softmax(dim=1)
    log_power = upcast(teacher_logits.detach()).log_softmax(dim=1) * power
    log_sum = log_power.logsumexp(dim=1)
    log_p = log_power - log_sum[:, None]
    return (log_p.exp() * (log_p - log_q)).sum(dim=1), log_sum.exp()


class TTMLoss(LogitLoss):
    """Module form of :func:`ttm_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(self, *, power: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(power, "power")
        check_reduction(reduction)
        self.power = power
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return ttm_loss(student_logits, teacher_logits, power=self.power, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"power={self.power:g}, reduction={self.reduction!r}"


class WTTMLoss(LogitLoss):
    """Module form of :func:`wttm_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(self, *, power: float = 0.2, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(power, "power")
        check_reduction(reduction)
        self.power = power
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return wttm_loss(student_logits, teacher_logits, power=self.power, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"power={self.power:g}, reduction={self.reduction!r}"
