"""PCD's groups from the statistics of their segments: losses, and the four coefficients of the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcdistill.ops.pcd_plan import Plan, Tables


@dataclass(frozen=True)
class Options:
    """The options of PCD that the kernels know."""

    temperature: float
    ranking: bool
    weighting: bool
    detach_weight: bool


@dataclass(frozen=True)
class Statistics:
    """What one pass over the logits gives per segment, each [K, N] float64; p and q sum to 1 in the segment.

    Args:
        log_p, log_q: log-sum-exp of z_t / T and of z_s / T.
        gap: E_p[(z_t - z_s) / T].
        norm_p, norm_q: Euclidean norms of p and q.
        angle: 1 - cos(p, q).
    """

    log_p: Tensor
    log_q: Tensor
    gap: Tensor
    norm_p: Tensor | None = None
    norm_q: Tensor | None = None
    angle: Tensor | None = None


def combine(stats: Statistics, plan: Plan, tables: Tables, options: Options) -> tuple[Tensor, Tensor]:
    """Loss [N] and coefficients [4, K, N] of the gradient (the first two without the gradient of a weight).

    Sums over the segments of a group are taken relative to the largest segment of that same group, in float64: its
    matrix products are what neither autocast nor TensorFloat-32 touches, and 1 - cos needs the digits.
    """
    layers, segments, n = len(plan.layers), plan.segments, stats.log_p.shape[1]

    def to_segments(x: Tensor) -> Tensor:
        """[G, M] -> [layers, K, M]: every segment sees the group that holds it."""
        return x.index_select(0, tables.group_of).view(layers, segments, -1)

    def to_groups(x: Tensor) -> Tensor:
        """[layers, K, M] -> [G, M]: sum over the segments of every group."""
        return torch.bmm(tables.member, x).view(-1, x.shape[2]).index_select(0, tables.rows)

    logs = torch.cat((stats.log_p, stats.log_q), dim=1)
    # Maxima over runs of 1, 2, 4, ... segments; two runs, which may overlap, cover any group.
    level, width, levels = logs, 1, [logs]
    while 2 * width <= segments:
        level = torch.maximum(level[:-width], level[width:])
        levels.append(level)
        width *= 2
    maxima = torch.cat(levels)
    top = torch.maximum(maxima.index_select(0, tables.first), maxima.index_select(0, tables.second))
    shares = (logs - to_segments(top)).exp()
    share_p, share_q = shares[..., :n], shares[..., n:]

    parts = [shares, share_p * stats.gap]
    if stats.norm_p is not None and stats.norm_q is not None and stats.angle is not None:
        x, y = share_p * stats.norm_p, share_q * stats.norm_q
        parts += [x * x, y * y, x * y * (1 - stats.angle)]
    sums = torch.split(to_groups(torch.cat(parts, dim=2)), n, dim=1)
    loss, per_group = distil_groups(torch, sums, top[:, :n] - top[:, n:], tables.count, options)
    factors = torch.split(to_segments(torch.cat(per_group, dim=1)), n, dim=2)
    coefficients = [(factors[0] * share_q).sum(dim=0), (factors[1] * share_p).sum(dim=0)]
    if len(factors) == 4:
        coefficients.append((factors[2] * share_p * share_q).sum(dim=0))
        coefficients.append((factors[3] * share_q * share_q).sum(dim=0))
    return loss, torch.stack(coefficients)


def distil_groups(xp: Any, sums: Sequence[Any], shift: Any, count: Any, options: Options) -> tuple[Any, list[Any]]:
    """Loss [N] and the group's factors of the gradient's coefficients, 4 or 2 of [G, N].

    With p and q unnormalised, P = p / sum p and Q = q / sum q:

        KL = sum p (log p - log q) / sum p - log(sum p / sum q) - shift        cos = sum p q / (|p| |q|)
        d (lambda KL T^2) / d z_s = T [ lambda (Q - P) - KL Q (P / (|P| |Q|) - cos Q / |Q|^2) ]
                                  = q (c0 + c2 p + c3 q) + c1 p

    Args:
        xp: torch or numpy, whichever the arrays belong to.
        sums: over every group, [G, N] float64 each: p, q, p (log p - log q), and with weighting p^2, q^2, p q.
        shift: log of what p was divided by, less that of q.
        count: [G, 1].
        options: of the loss.
    """
    mass_p, mass_q, gap = sums[:3]
    # Rounding can leave a KL of -1e-16, and the loss is never negative.
    kl = xp.clip(gap / mass_p - xp.log(mass_p / mass_q) - shift, 0.0, None)
    scale = count * options.temperature
    if not options.weighting:
        return (count * kl).sum(0) * options.temperature**2, [scale / mass_q, -scale / mass_p]
    norms = xp.sqrt(sums[3] * sums[4])
    cosine = sums[5] / norms
    weight = xp.clip(1.0 - cosine, 0.0, None)
    loss = (count * weight * kl).sum(0) * options.temperature**2
    weight = scale * weight
    factors = [weight / mass_q, -weight / mass_p]
    if not options.detach_weight:
        kl = scale * kl
        factors += [-kl / norms, kl * cosine / sums[4]]
    return loss, factors
