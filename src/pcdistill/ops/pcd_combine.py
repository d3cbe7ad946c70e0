"""PCD's groups from the statistics of their segments: losses, and the four coefficients of the gradient."""

from dataclasses import dataclass

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
    """Loss [N] and gradient coefficients [4, K, N] (only two of the four without the gradient of a weight).

    With P = a p and Q = b q the probabilities in a group that holds the segment, A and B the norms of P and Q:

        KL = sum a gap - (log sum exp log_p - log sum exp log_q)      cos = sum a b norm_p norm_q (1 - angle) / (A B)
        d D / d z_s = T [ lambda (Q - P) - KL Q (P / (A B) - cos Q / B^2) ]
                    = q (c0 + c2 p + c3 q) + c1 p    for coefficients that depend on the segment alone

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
    weighted = stats.norm_p is not None and stats.norm_q is not None and stats.angle is not None
    if weighted:
        x, y = share_p * stats.norm_p, share_q * stats.norm_q
        parts += [x * x, y * y, x * y * (1 - stats.angle)]
    sums = to_groups(torch.cat(parts, dim=2)).split(n, dim=1)
    mass_p, mass_q = sums[:2]
    # Rounding can leave a KL of -1e-16; the loss is never negative.
    kl = (sums[2] / mass_p - (top[:, :n] - top[:, n:]) - (mass_p / mass_q).log()).clamp_min(0.0)
    if weighted:
        norms = (sums[3] * sums[4]).sqrt()
        cosine = sums[5] / norms
        weight = (1 - cosine).clamp_min(0.0)
        loss = (tables.count * weight * kl).sum(dim=0)
    else:
        weight = torch.ones_like(kl)
        loss = (tables.count * kl).sum(dim=0)

    scale = tables.count * options.temperature
    per_group = [scale * weight / mass_q, -scale * weight / mass_p]
    if weighted and not options.detach_weight:
        per_group += [-scale * kl / norms, scale * kl * cosine / sums[4]]
    factors = to_segments(torch.cat(per_group, dim=1)).split(n, dim=2)
    coefficients = [(factors[0] * share_q).sum(dim=0), (factors[1] * share_p).sum(dim=0)]
    if len(factors) == 4:
        coefficients.append((factors[2] * share_p * share_q).sum(dim=0))
        coefficients.append((factors[3] * share_q * share_q).sum(dim=0))
    return loss * options.temperature**2, torch.stack(coefficients)
