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
    for group in groups:
        part = slice(group.start, group.stop)
        log_p = log_softmax(teacher[:, part], temperature)
        log_q = log_softmax(student[:, part], temperature)
        loss = kl_terms(log_p, log_q).sum(dim=1)
        if weighting:
            weight = cosine_distance(log_p, log_q)
            loss = loss * (weight.detach() if detach_weight else weight)
        total = total + group.count * loss
    return total * temperature**2


def cosine_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - cos(p, q) = |p / |p| - q / |q||^2 / 2 per row: unlike 1 - cos itself, exact to rounding as q nears p."""
    p, q = log_p.exp(), log_q.exp()
    apart: Tensor = p / p.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)
    return apart.square().sum(dim=1) / 2
