"""PCD's two passes over the logits in plain PyTorch, for any device and for torch.compile."""

import torch
from torch import Tensor

from pcdistill.ops.pcd_combine import Options, Statistics, combine
from pcdistill.ops.pcd_plan import Plan, Tables
from pcdistill.ops.segments import rank_classes


def segment_statistics(
    student: Tensor, teacher: Tensor, plan: Plan, options: Options
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics per segment of ranked logits [N, C], and the probabilities q, p in their segment [N, C]."""
    s_parts, t_parts = student.split(plan.sizes, dim=1), teacher.split(plan.sizes, dim=1)
    columns: list[list[Tensor]] = []
    qs, ps = [], []
    for s, t in zip(s_parts, t_parts, strict=True):
        s_top, t_top = s.amax(dim=1, keepdim=True), t.amax(dim=1, keepdim=True)
        s, t = (s - s_top) / options.temperature, (t - t_top) / options.temperature
        q, p = s.exp(), t.exp()
        q_mass, p_mass = q.sum(dim=1, keepdim=True), p.sum(dim=1, keepdim=True)
        q, p = q / q_mass, p / p_mass
        shift = (t_top.double() - s_top.double()) / options.temperature
        column = [
            t_top.double() / options.temperature + p_mass.double().log(),
            s_top.double() / options.temperature + q_mass.double().log(),
            (p * (t - s)).sum(dim=1, keepdim=True).double() + shift,
        ]
        if options.weighting:
            p_norm, q_norm = p.square().sum(dim=1, keepdim=True).sqrt(), q.square().sum(dim=1, keepdim=True).sqrt()
            # Half the squared distance of the unit vectors: 1 - p.q / (|p| |q|) would cancel in float32.
            angle = (p / p_norm - q / q_norm).square().sum(dim=1, keepdim=True) / 2
            column += [p_norm.double(), q_norm.double(), angle.double()]
        columns.append(column)
        qs.append(q)
        ps.append(p)
    stats = Statistics(*(torch.cat(rows, dim=1).t() for rows in zip(*columns, strict=True)))
    return stats, torch.cat(qs, dim=1), torch.cat(ps, dim=1)


def loss_and_gradient(
    student: Tensor, teacher: Tensor, plan: Plan, tables: Tables, options: Options
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C]."""
    order = rank_classes(student, teacher) if options.ranking else None
    s = student if order is None else student.gather(1, order)
    t = teacher if order is None else teacher.gather(1, order)
    stats, q, p = segment_statistics(s, t, plan, options)
    loss, coefficients = combine(stats, plan, tables, options)
    factors = coefficients.to(s.dtype).transpose(1, 2)
    lengths = plan.sizes
    parts = []
    for k, (q_k, p_k) in enumerate(zip(q.split(lengths, dim=1), p.split(lengths, dim=1), strict=True)):
        c = [factor[:, k : k + 1] for factor in factors]
        inner = c[0] + c[2] * p_k + c[3] * q_k if len(c) == 4 else c[0]
        parts.append(q_k * inner + c[1] * p_k)
    gradient = torch.cat(parts, dim=1)
    if order is not None:
        gradient = torch.empty_like(gradient).scatter(1, order, gradient)
    return loss.to(s.dtype), gradient
