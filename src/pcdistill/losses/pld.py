"""Plackett-Luce distillation (PLD): the student learns the teacher's ranking of the classes, the label first.

Source: Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", arXiv 2506.12542 (2025).
"""

import torch
from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss, Needs

__all__ = ["PLDLoss", "pld_loss"]


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-probability of the teacher's ranking under the student, its places weighted by the teacher.

        pi = y, then all other classes by falling teacher logit
        a_k = softmax(z_t / T) at class pi_k
        loss = sum_{k=1..C} a_k * (-z_s at pi_k + log sum_{l >= k} exp(z_s at pi_l))

    Place k is a choice among the classes that the places before it left over: a Plackett-Luce model.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it. Equal logits rank by class index.
        target: y, class indices [N]. Soft labels are refused: they name no first class.
        temperature: T > 0 of the teacher's weights alone, no unit. Published: 1 on ImageNet, 4 on CIFAR-100.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". At least 0, convex in z_s, blind to a shift of z_s; not zero at equal
        logits. Weights of (1, 0, ..., 0) make it cross-entropy. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, target, temperature or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2506.12542. It stands for cross-entropy too: the objective is PLD alone, weight 1. The sums over the
        tails are one cumulative log-sum-exp from the end: O(C log C) for the sorting.
    """
    check_logits(student_logits, teacher_logits)
    target = check_target(target, student_logits, hard_only=True)
    check_temperature(temperature)
    check_reduction(reduction)
    teacher = upcast(teacher_logits.detach())
    order = teacher.scatter(1, target[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)
    weights = (teacher / temperature).softmax(dim=1).gather(1, order)
    ranked = upcast(student_logits).gather(1, order)
    tails = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    return reduce_loss((weights * (tails - ranked)).sum(dim=1), reduction)


class PLDLoss(LogitLoss):
    """Module form of :func:`pld_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False, replaces_labels=True)

    def __init__(self, *, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return pld_loss(student_logits, teacher_logits, target, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}"
