"""Decoupled knowledge distillation (DKD): KD split into its target part and its non-target part, weighted apart.

Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", arXiv 2203.08679 (2022).
"""

import torch
import torch.nn.functional as F
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
from pcdistill.ops.segments import kl_terms, log_softmax

__all__ = ["DKDLoss", "dkd_loss"]


def split_target(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the target class [N] and of the other classes [N, C - 1], in class order.

    Leaving the target class out is exact; lowering its logit by 1000, as the released codes do, is not: at logits of
    1e4 the target would win all the same.
    """
    label = target[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = others + (others >= label)
    return logits.gather(1, label)[:, 0], logits.gather(1, others)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence of "target or not" plus KL divergence among the non-target classes, each with its own weight.

        p = softmax(z_t / T)    b_t = [p_y, 1 - p_y]    p' = softmax of z_t / T over the classes other than y
        q, b_s, q' alike from z_s
        loss = T^2 * (target_weight * KL(b_t || b_s) + non_target_weight * KL(p' || q'))

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N]. Soft labels are refused: they name no target class.
        temperature: T > 0, no unit. Customary: 4 on CIFAR-100, 1 on ImageNet.
        target_weight: the paper's alpha, >= 0. Customary: 1.
        non_target_weight: the paper's beta, >= 0. Customary on CIFAR-100: 2, 6 or 8 by pair; on ImageNet 0.5 or 2.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". With both weights above 0, zero if and only if p = q.
        N = 0 gives 0. For C = 2 there is one non-target class, its softmax is 1 and its part is 0 with no gradient
        (our choice: the definition's limit, rather than a refusal); the loss is then target_weight * KD.

    Raises:
        ValueError: a shape, device, target, temperature, weight or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2203.08679, section 3: KD = TCKD + (1 - p_y) * NCKD, and DKD frees the two weights. Customary recipe:
        cross-entropy 1, DKD 1 with a warm-up of 20 epochs.
    """
    check_logits(student_logits, teacher_logits)
    target = check_target(target, student_logits, hard_only=True)
    _check_options(temperature, target_weight, non_target_weight, reduction)
    student_target, student_others = split_target(upcast(student_logits), target)
    teacher_target, teacher_others = split_target(upcast(teacher_logits.detach()), target)
    log_q = _target_or_not(student_target, student_others, temperature)
    log_p = _target_or_not(teacher_target, teacher_others, temperature)
    target_part = kl_terms(log_p, log_q).sum(dim=1)
    log_p, log_q = log_softmax(teacher_others, temperature), log_softmax(student_others, temperature)
    non_target_part = kl_terms(log_p, log_q).sum(dim=1)
    per_sample = target_weight * target_part + non_target_weight * non_target_part
    return reduce_loss(per_sample * temperature**2, reduction)


def _check_options(temperature: float, target_weight: float, non_target_weight: float, reduction: str) -> None:
    check_temperature(temperature)
    check_weight(target_weight, "target_weight")
    check_weight(non_target_weight, "non_target_weight")
    check_reduction(reduction)


def _target_or_not(target_logit: Tensor, other_logits: Tensor, temperature: float) -> Tensor:
    """log [p_y, 1 - p_y], [N, 2]; from the difference of the two, so that neither end of the range is lost."""
    top = other_logits.amax(dim=1)
    others = ((other_logits - top[:, None]) / temperature).logsumexp(dim=1)
    margin = (target_logit - top) / temperature - others
    return torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=1)


class DKDLoss(LogitLoss):
    """Module form of :func:`dkd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        target_weight: float = 1.0,
        non_target_weight: float = 8.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(temperature, target_weight, non_target_weight, reduction)
        self.temperature = temperature
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return dkd_loss(
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
