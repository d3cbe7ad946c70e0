"""Normalised knowledge distillation (NKD): cross-entropy on the target class and on the renormalised other classes.

Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
Approach with Normalized Loss and Customized Soft Labels", arXiv 2303.13005 (2023).
"""

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    check_weight,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.losses.dkd import split_target
from pcdistill.ops.segments import log_softmax

__all__ = ["NKDLoss", "nkd_loss"]


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 1.0,
    target_weight: float = 1.0,
    non_target_weight: float = 1.5,
    reduction: Reduction = "mean",
) -> Tensor:
    """The teacher's confidence weighs the student's log-likelihood; the other classes are matched after normalisation.

        p = softmax(z_t), q = softmax(z_s)    p', q' = softmax of z / T over the classes other than y
        loss = -target_weight * p_y log q_y - non_target_weight * T^2 * sum_{c != y} p'_c log q'_c

    The paper's objective is this plus the cross-entropy with the labels, which a recipe lists as a term of its own.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N]. Soft labels are refused: they name no target class.
        temperature: T > 0 of the non-target part only (the paper's lambda); the target part is at 1. Customary:
            1 on ImageNet, 3 on CIFAR-100.
        target_weight: weight of the target part, >= 0. The paper's is 1.
        non_target_weight: the paper's gamma, >= 0. Customary: 1.5 on ImageNet (1 for transformers), 3.5 on CIFAR-100.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". A cross-entropy, so not zero at p = q: the teacher's entropy is not
        taken off. N = 0 gives 0. For C = 2 the non-target part is 0 (one class, whose softmax is 1).

    Raises:
        ValueError: a shape, device, target, temperature, weight or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2303.13005, section 3; defaults are those of the released class.
    """
    check_logits(student_logits, teacher_logits)
    target = check_target(target, student_logits, hard_only=True)
    _check_options(temperature, target_weight, non_target_weight, reduction)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    label = target[:, None]
    target_part = -(teacher.softmax(dim=1).gather(1, label) * student.log_softmax(dim=1).gather(1, label))[:, 0]
    log_p = log_softmax(split_target(teacher, target)[1], temperature)
    log_q = log_softmax(split_target(student, target)[1], temperature)
    non_target_part = -(log_p.exp() * log_q).sum(dim=1) * temperature**2
    return reduce_loss(target_weight * target_part + non_target_weight * non_target_part, reduction)


def _check_options(temperature: float, target_weight: float, non_target_weight: float, reduction: str) -> None:
    check_temperature(temperature)
    check_weight(target_weight, "target_weight")
    check_weight(non_target_weight, "non_target_weight")
    check_reduction(reduction)


class NKDLoss(LogitLoss):
    """Module form of :func:`nkd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        target_weight: float = 1.0,
        non_target_weight: float = 1.5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(temperature, target_weight, non_target_weight, reduction)
        self.temperature = temperature
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return nkd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            target_weight=self.target_weight,
            non_target_weight=self.non_target_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, target_weight={self.target_weight:g}, "
            f"non_target_weight={self.non_target_weight:g}, reduction={self.reduction!r}"
        )
