"""PCD from the equations of arXiv 2505.24310, one sample, stage and group at a time, in float64.

Two programs: values by Python floats, gradients by autograd over the same lists of classes.
"""

import math
import struct

import torch

from tests.references import log_softmax


def ranked(z_s: list[float], z_t: list[float], dtype: torch.dtype) -> list[int]:
    """Classes by falling |z_t - z_s|, ties by index; the difference is rounded as the dtype of the logits rounds it."""

    def rounded(x: float) -> float:
        return x if dtype == torch.float64 else struct.unpack("f", struct.pack("f", x))[0]

    return sorted(range(len(z_s)), key=lambda c: (-rounded(abs(z_t[c] - z_s[c])), c))


def groups_of(order: list[int], stage_sizes: list[int]) -> list[list[int]]:
    """The classes of every group of every stage; a stage of k groups, group j: ranks j C // k to (j + 1) C // k - 1."""
    c = len(order)
    return [order[j * c // k : (j + 1) * c // k] for k in stage_sizes for j in range(k)]


def both_directions(stages: int) -> list[int]:
    """Groups of stage i: S - i + 1 from fine to coarse, then i from coarse to fine."""
    fine_to_coarse = [stages - i + 1 for i in range(1, stages + 1)]
    coarse_to_fine = list(range(1, stages + 1))
    return fine_to_coarse + coarse_to_fine


def pcd(
    student: list[list[float]],
    teacher: list[list[float]],
    stage_sizes: list[int],
    temperature: float,
    *,
    dtype: torch.dtype = torch.float64,
    ranking: bool = True,
    weighting: bool = True,
) -> list[float]:
    """Sum over groups of lambda * KL(p || q) * T^2, one value per sample."""
    losses = []
    for z_s, z_t in zip(student, teacher, strict=True):
        order = ranked(z_s, z_t, dtype) if ranking else list(range(len(z_s)))
        parts = []
        for group in groups_of(order, stage_sizes):
            log_p = log_softmax([z_t[c] for c in group], temperature)
            log_q = log_softmax([z_s[c] for c in group], temperature)
            p, q = [math.exp(v) for v in log_p], [math.exp(v) for v in log_q]
            kl = math.fsum(a * (la - lb) for a, la, lb in zip(p, log_p, log_q, strict=True))
            dot = math.fsum(a * b for a, b in zip(p, q, strict=True))
            cosine = dot / math.sqrt(math.fsum(a * a for a in p) * math.fsum(b * b for b in q))
            parts.append(((1 - cosine) if weighting else 1.0) * kl * temperature**2)
        losses.append(math.fsum(parts))
    return losses


def pcd_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    stage_sizes: list[int],
    temperature: float,
    *,
    ranking: bool = True,
    weighting: bool = True,
    detach_weight: bool = False,
) -> torch.Tensor:
    """d (sum over samples of the loss) / d student, [N, C] in float64."""
    z_s = student.detach().double().requires_grad_()
    z_t = teacher.detach().double()
    total = 0.0 * z_s.sum()
    for n in range(len(z_s)):
        c = z_s.shape[1]
        order = ranked(z_s[n].tolist(), z_t[n].tolist(), student.dtype) if ranking else list(range(c))
        for group in groups_of(order, stage_sizes):
            log_p = ((z_t[n, group] - z_t[n, group].max()) / temperature).log_softmax(0)
            log_q = ((z_s[n, group] - z_s[n, group].max()) / temperature).log_softmax(0)
            p, q = log_p.exp(), log_q.exp()
            weight = 1 - (p * q).sum() / (p.norm() * q.norm()) if weighting else torch.tensor(1.0)
            total = total + (weight.detach() if detach_weight else weight) * (p * (log_p - log_q)).sum()
    return torch.autograd.grad(total * temperature**2, z_s)[0]


def pcd_by_group(
    student: torch.Tensor,
    teacher: torch.Tensor,
    stage_sizes: tuple[int, ...],
    temperature: float,
    *,
    weighting: bool = True,
    detach_weight: bool = False,
) -> torch.Tensor:
    """Loss [N] of logits [N, C] whose classes stand in their order already, a slice for every group.

    Whole batches, for inputs that take the lists above too long. Its forms do not cancel as q comes close to p.
    """
    c = student.shape[1]
    total = student.new_zeros(len(student))
    for k in stage_sizes:
        for j in range(k):
            part = slice(j * c // k, (j + 1) * c // k)
            log_p, log_q = (
                ((z[:, part] - z[:, part].amax(1, keepdim=True)) / temperature).log_softmax(1)
                for z in (teacher, student)
            )
            p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
            near = d.clamp(-1, 1)  # q - p is p expm1(d), which far away would be zero times infinity
            loss = torch.where(d.abs() < 1, p * near.expm1(), q - p).sub(p * d).sum(1)
            if weighting:
                weight = (p / p.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)).square().sum(1) / 2
                loss = loss * (weight.detach() if detach_weight else weight)
            total = total + loss
    return total * temperature**2
