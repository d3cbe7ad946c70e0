"""PCD's two passes over the logits in plain PyTorch, for any device and for torch.compile."""

from collections.abc import Callable

import torch
from torch import Tensor

from pcdistill.ops import pcd_cpu
from pcdistill.ops.pcd_combine import Options, Statistics, combine
from pcdistill.ops.pcd_plan import Plan, Tables, make_tables
from pcdistill.ops.segments import kl_terms, rank_classes

Kernel = Callable[[Tensor, Tensor, Plan, Options], tuple[Tensor, Tensor]]
Ranked = Callable[[Tensor, Tensor, Plan, Tables, Options], tuple[Tensor, Tensor]]


def _split(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """[N, C] -> the columns of every segment."""
    return torch.split(x, list(plan.sizes), dim=1)


def segment_statistics(
    student: Tensor, teacher: Tensor, plan: Plan, options: Options
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics per segment of ranked logits [N, C], and the probabilities q, p in their segment [N, C]."""
    s_parts, t_parts = _split(student, plan), _split(teacher, plan)
    columns: list[list[Tensor]] = []
    qs, ps = [], []
    for s, t in zip(s_parts, t_parts, strict=True):
        s_top, t_top = s.amax(dim=1, keepdim=True), t.amax(dim=1, keepdim=True)
        s, t = (s - s_top) / options.temperature, (t - t_top) / options.temperature
        q, p = s.exp(), t.exp()
        q_mass, p_mass = q.sum(dim=1, keepdim=True), p.sum(dim=1, keepdim=True)
        q, p = q / q_mass, p / p_mass
        log_p = t_top.double() / options.temperature + p_mass.double().log()
        log_q = s_top.double() / options.temperature + q_mass.double().log()
        kl = kl_terms(t - p_mass.log(), s - q_mass.log()).sum(dim=1, keepdim=True)
        column = [log_p, log_q, kl.double() + log_p - log_q]
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


def ranked_loss_and_gradient(
    student: Tensor, teacher: Tensor, plan: Plan, tables: Tables, options: Options
) -> tuple[Tensor, Tensor]:
    """Loss [N] of ranked logits [N, C], and its gradient with respect to the student's."""
    stats, q, p = segment_statistics(student, teacher, plan, options)
    loss, coefficients = combine(stats, plan, tables, options)
    factors = coefficients.to(student.dtype).transpose(1, 2)
    parts = []
    for k, (q_k, p_k) in enumerate(zip(_split(q, plan), _split(p, plan), strict=True)):
        c = [factor[:, k : k + 1] for factor in factors]
        inner = c[0] + c[2] * p_k + c[3] * q_k if len(c) == 4 else c[0]
        parts.append(q_k * inner + c[1] * p_k)
    return loss.to(student.dtype), torch.cat(parts, dim=1)


def loss_and_gradient(
    student: Tensor, teacher: Tensor, plan: Plan, options: Options, *, ranked: Ranked | None = None
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C]; `ranked` stands in for the default."""
    tables = make_tables(plan, student.device)
    ranked = ranked or ranked_loss_and_gradient
    if not options.ranking:
        return ranked(student, teacher, plan, tables, options)
    numpy_sorts = student.device.type == "cpu" and student.dtype == torch.float32 and not torch.compiler.is_compiling()
    order = pcd_cpu.rank_classes(student, teacher) if numpy_sorts else rank_classes(student, teacher)
    loss, gradient = ranked(student.gather(1, order), teacher.gather(1, order), plan, tables, options)
    return loss, torch.empty_like(gradient).scatter(1, order, gradient)
