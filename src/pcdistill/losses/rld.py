"""Refined logit distillation (RLD): how sure the teacher is, and what it says below the true class, without its errors.

Source: "Knowledge Distillation with Refined Logits", arXiv 2408.07703 (2024).
"""

import torch
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

__all__ = ["RLDLoss", "rld_loss"]


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
    scd_weight: float = 1.0,
    mcd_weight: float = 8.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The teacher's top confidence asked of the true class (SCD), and KD among the classes it puts below it (MCD).

        p = softmax(z_t / Tc)   q = softmax(z_s / Tc)                            Tc = confidence_temperature
        SCD  = Tc^2 * KL([max_c p_c, 1 - max_c p_c] || [q_y, 1 - q_y])
        B    = {c : z_t,c < z_t,y}
        MCD  = T^2 * KL(softmax(z_t[B] / T) || softmax(z_s[B] / T))              0 where B is empty
        loss = scd_weight * SCD + mcd_weight * MCD

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N], required. Soft labels are refused: the terms are about one true class.
        temperature: T > 0 of the masked term. Customary: 4 on CIFAR-100, 1 on ImageNet.
        confidence_temperature: Tc > 0 of the confidence term. Customary: 1.
        scd_weight: weight of the sample confidence term, the paper's alpha.
        mcd_weight: weight of the masked correlation term, the paper's beta. Customary: 8 in the released code for
            CIFAR-100 (a note of the paper says 4); 0.5 to 2 on ImageNet.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". Never negative; zero if the teacher is right and z_s = z_t, or in
        general if the student gives y the teacher's top confidence and agrees with it in proportion within B.
        With two classes B has at most one, so that MCD is 0. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, target, temperature, weight or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2408.07703. The released code lowers the classes outside B by 1e9, which half precision cannot hold and
        which makes an empty B uniform; here they are left out of both softmaxes, and an empty B counts as 0, the same
        value.
    """
    check_logits(student_logits, teacher_logits)
    index = check_target(target, student_logits, hard_only=True)[:, None]
    check_temperature(temperature)
    check_temperature(confidence_temperature, "confidence_temperature")
    check_weight(scd_weight, "scd_weight")
    check_weight(mcd_weight, "mcd_weight")
    z_s, z_t = upcast(student_logits), upcast(teacher_logits.detach())
    scd = _confidence_kl(z_s / confidence_temperature, index, z_t / confidence_temperature)
    mcd = _subset_kl(z_s / temperature, z_t / temperature, z_t < z_t.gather(1, index))
    per_sample = scd_weight * confidence_temperature**2 * scd + mcd_weight * temperature**2 * mcd
    return reduce_loss(per_sample, reduction)


def _confidence_kl(z_s: Tensor, index: Tensor, z_t: Tensor) -> Tensor:
    """KL([p_max, 1 - p_max] || [q_y, 1 - q_y]), [N]."""
    log_q, log_not_q = _log_one_and_rest(z_s, index)
    log_p, log_not_p = _log_one_and_rest(z_t, z_t.argmax(dim=1, keepdim=True))
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)


def _log_one_and_rest(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of one class and of all others together, each [N]; the second without 1 - p, which cancels."""
    log_prob = z.log_softmax(dim=1)
    others = log_prob.scatter(1, index, -torch.inf)
    return log_prob.gather(1, index)[:, 0], others.logsumexp(dim=1)


def _subset_kl(z_s: Tensor, z_t: Tensor, inside: Tensor) -> Tensor:
    """KL over the classes where `inside` [N, C] is true, [N]; 0 where there are none."""
    # a row without classes has no softmax: it runs as a row with all of them, and its result is not used
    empty = ~inside.any(dim=1, keepdim=True)
    outside = ~(inside | empty)
    log_q = z_s.masked_fill(outside, -torch.inf).log_softmax(dim=1)
    log_p = z_t.masked_fill(outside, -torch.inf).log_softmax(dim=1)
    difference = (log_p - log_q).masked_fill(outside | empty, 0.0)  # -inf - -inf is nan
    return (log_p.exp() * difference).sum(dim=1)


class RLDLoss(LogitLoss):
    """Module form of :func:`rld_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        confidence_temperature: float = 1.0,
        scd_weight: float = 1.0,
        mcd_weight: float = 8.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_temperature(confidence_temperature, "confidence_temperature")
        check_weight(scd_weight, "scd_weight")
        check_weight(mcd_weight, "mcd_weight")
        check_reduction(reduction)
        self.temperature = temperature
        self.confidence_temperature = confidence_temperature
        self.scd_weight = scd_weight
        self.mcd_weight = mcd_weight
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return rld_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            confidence_temperature=self.confidence_temperature,
            scd_weight=self.scd_weight,
            mcd_weight=self.mcd_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, confidence_temperature={self.confidence_temperature:g}, "
            f"scd_weight={self.scd_weight:g}, mcd_weight={self.mcd_weight:g}, reduction={self.reduction!r}"
        )
