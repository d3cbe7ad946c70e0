"""Local dense relational logit distillation (LDRLD): the student's strongest classes, compared two by two.

Source: "Local Dense Relational Logit Distillation", arXiv 2507.15911 (2025).
"""

import torch
from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    check_weight,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss

__all__ = ["LDRLDLoss", "ldrld_loss"]

DEFAULT_TOP = 7


def _check_top_classes(top_classes: int) -> None:
    if not isinstance(top_classes, int) or top_classes < 2:
        raise ValueError(f"top_classes must be a whole number >= 2, got {top_classes}; one class alone has no relation")


def ldrld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    top_classes: int = DEFAULT_TOP,
    local_weight: float = 10.5,
    rest_weight: float = 7.0,
    pair_scale: float = 2.0,
    pair_offset: float = 1.5,
    pair_decay: float = 0.05,
    average_groups: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence inside every pair of the student's d best classes, inside all d of them, and inside the rest.

        kl(G)  = T^2 * KL(softmax(z_t[G] / T) || softmax(z_s[G] / T))       softmax over the classes of G only
        w(i,j) = pair_scale / (pair_offset + j - i) * exp(-pair_decay * (i + j))             ranks 1 <= i < j <= d
        local  = (sum_{i<j} w(i,j) kl({i, j}) + kl({1..d})) / (d (d - 1) / 2 + 1)
        loss   = local_weight * local + rest_weight * kl({d+1..C})

    The ranks are the student's, sample by sample; both networks' logits are taken in this order. Equal logits are
    ranked by class index.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused, so labels may be soft or missing: the true class may be among the d or in the rest.
        temperature: T > 0. Customary: 4 on CIFAR-100.
        top_classes: d, from 2 to C - 1.
        local_weight: the paper's alpha.
        rest_weight: the paper's beta.
        pair_scale: the paper's delta, the size of the pair weights.
        pair_offset: the paper's epsilon > 0; the smaller, the more neighbours in rank outweigh distant pairs.
        pair_decay: the paper's lambda; the larger, the more the first ranks outweigh the later ones.
        average_groups: divide the local sum by the number of groups; False is the plain sum.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Never negative; zero if z_s = z_t. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, weight, number of classes or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2507.15911. The released code divides the local sum by the number of groups (22 for d = 7), the paper's
        equation is a plain sum; the default is the code's, for which the weights 10.5 and 7 were published. The code
        pushes the classes outside a group down by 1000 / T; here they are left out, which is the same in exact terms.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    _check_top_classes(top_classes)
    for name, weight in (("local_weight", local_weight), ("rest_weight", rest_weight), ("pair_scale", pair_scale)):
        check_weight(weight, name)
    check_weight(pair_decay, "pair_decay")
    check_temperature(pair_offset, "pair_offset")
    classes = student_logits.shape[1]
    if top_classes > classes - 1:
        raise ValueError(
            f"top_classes must be at most C - 1 = {classes - 1}, got {top_classes}; "
            + ("set a smaller one" if classes > 2 else "LDRLD needs at least three classes")
        )
    z_s, z_t = upcast(student_logits) / temperature, upcast(teacher_logits.detach()) / temperature
    # a stable sort, not topk: topk leaves the order of equal logits open, and half precision has many
    order = z_s.detach().sort(dim=1, descending=True, stable=True).indices
    z_s, z_t = z_s.gather(1, order), z_t.gather(1, order)

    first, second = torch.triu_indices(top_classes, top_classes, offset=1, device=z_s.device)
    pairs = torch.stack([first, second], dim=1)  # [P, 2], ranks from 0
    distance, rank_sum = (second - first).to(z_s.dtype), (first + second + 2).to(z_s.dtype)
    weight = pair_scale / (pair_offset + distance) * torch.exp(-pair_decay * rank_sum)
    local = (_group_kl(z_s[:, pairs], z_t[:, pairs]) * weight).sum(dim=1)
    local = local + _group_kl(z_s[:, :top_classes], z_t[:, :top_classes])
    if average_groups:
        local = local / (len(pairs) + 1)
    rest = _group_kl(z_s[:, top_classes:], z_t[:, top_classes:])
    return reduce_loss((local_weight * local + rest_weight * rest) * temperature**2, reduction)


def _group_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    """KL over the last axis, which holds the classes of one group."""
    log_q, log_p = z_s.log_softmax(dim=-1), z_t.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class LDRLDLoss(LogitLoss):
    """Module form of :func:`ldrld_loss`, for recipes; other arguments, shapes and errors are the function's.

    Args:
        top_classes: d; None is 7, or C - 1 where `num_classes` tells of fewer than eight classes.
        num_classes: C, where it is known: the engine gives it.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        top_classes: int | None = None,
        local_weight: float = 10.5,
        rest_weight: float = 7.0,
        pair_scale: float = 2.0,
        pair_offset: float = 1.5,
        pair_decay: float = 0.05,
        average_groups: bool = True,
        num_classes: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if top_classes is None:
            top_classes = DEFAULT_TOP if num_classes is None else max(min(DEFAULT_TOP, num_classes - 1), 2)
            if top_classes < DEFAULT_TOP:
                self.note = f"d is {top_classes}, not {DEFAULT_TOP}: logits of {num_classes} classes allow no more"
        check_temperature(temperature)
        _check_top_classes(top_classes)
        check_weight(local_weight, "local_weight")
        check_weight(rest_weight, "rest_weight")
        check_weight(pair_scale, "pair_scale")
        check_temperature(pair_offset, "pair_offset")
        check_weight(pair_decay, "pair_decay")
        check_reduction(reduction)
        self.temperature = temperature
        self.top_classes = top_classes
        self.local_weight = local_weight
        self.rest_weight = rest_weight
        self.pair_scale = pair_scale
        self.pair_offset = pair_offset
        self.pair_decay = pair_decay
        self.average_groups = average_groups
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return ldrld_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            top_classes=self.top_classes,
            local_weight=self.local_weight,
            rest_weight=self.rest_weight,
            pair_scale=self.pair_scale,
            pair_offset=self.pair_offset,
            pair_decay=self.pair_decay,
            average_groups=self.average_groups,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, top_classes={self.top_classes}, local_weight={self.local_weight:g}, "
            f"rest_weight={self.rest_weight:g}, average_groups={self.average_groups}, reduction={self.reduction!r}"
        )
