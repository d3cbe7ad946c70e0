"""PCD group by group, as the equations read: slices of the ranked logits, differentiated by autograd.

The backend that the others are checked against on any device, and the one that can be differentiated twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcdistill.ops.segments import Group, kl_terms, log_softmax, rank_classes


def pcd_reference(
    student: Tensor,
    teacher: Tensor,
    groups: Sequence[Group],
    *,
    temperature: float,
    ranking: bool,
    weighting: bool,
    detach_weight: bool,
) -> Tensor:
    """Sum over the groups of count * lambda * KL(p || q) * T^2, [N], for logits [N, C] of one dtype."""
    if ranking:
        with torch.no_grad():
            order = rank_classes(student, teacher)
        student, teacher = student.gather(1, order), teacher.gather(1, order)
    total = student.new_zeros(len(student))
    for start, stop, count in groups:
        log_p = log_softmax(teacher[:, start:stop], temperature)
        log_q = log_softmax(student[:, start:stop], temperature)
        loss = kl_terms(log_p, log_q).sum(dim=1)
        if weighting:
            weight = cosine_distance(log_p, log_q)
            loss = loss * (weight.detach() if detach_weight else weight)
        total = total + count * loss
    return total * temperature**2


def cosine_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - cos(p, q) = |p / |p| - q / |q||^2 / 2 per row: unlike 1 - cos itself, exact to rounding as q nears p."""
    u, v = (x.exp() / x.exp().norm(dim=1, keepdim=True) for x in (log_p, log_q))
    return (u - v).square().sum(dim=1) / 2
