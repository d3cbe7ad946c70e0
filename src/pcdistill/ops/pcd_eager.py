"""PCD stage by stage in plain PyTorch, differentiated by autograd: for any device, and for torch.compile."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from pcdistill.ops.segments import kl_terms, log_softmax, rank_classes, remember, stage_edges

EMPTY = -1e30  # its exp is 0, and unlike -inf it leaves 0 when it is taken off itself


@dataclass(frozen=True)
class Options:
    """The options of PCD that its programs know."""

    temperature: float
    ranking: bool
    weighting: bool
    detach_weight: bool


def pcd_eager(student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options) -> Tensor:
    """Loss [N] of logits [N, C], differentiable any number of times."""
    student, teacher, _ = _ranked(student, teacher, options)
    total = student.new_zeros(len(student))
    for groups, count in Counter(stage_sizes).items():
        total = total + count * stage_loss(student, teacher, groups, options)
    return total


def loss_and_gradient(
    student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C].

    The graph of a stage is freed before the next one is built: memory does not grow with the number of stages.
    """
    student, teacher, order = _ranked(student.detach(), teacher.detach(), options)
    loss, gradient = student.new_zeros(len(student)), torch.zeros_like(student)
    for groups, count in Counter(stage_sizes).items():
        with torch.enable_grad():
            z = student.detach().requires_grad_()
            per_sample = stage_loss(z, teacher, groups, options)
            (slope,) = torch.autograd.grad(per_sample.sum(), z)
        loss += count * per_sample.detach()
        gradient += count * slope
    return loss, gradient if order is None else torch.empty_like(gradient).scatter_(1, order, gradient)


def stage_loss(student: Tensor, teacher: Tensor, groups: int, options: Options) -> Tensor:
    """Sum over the groups of one stage of lambda * KL(p || q) * T^2, [N], for ranked logits [N, C].

    All groups at once, as [N, groups, width]. Their sizes differ by one class at most: a place that is left over gets
    the logit -inf, so that it has no probability, and the log-probability EMPTY in p and q alike: no term of KL.
    """
    n, classes = student.shape
    places, empty = _places(classes, groups, student.device)
    cut = (n, groups, len(places) // groups)
    if empty is None:
        log_p = log_softmax(teacher.reshape(cut), options.temperature)
        log_q = log_softmax(student.reshape(cut), options.temperature)
    else:
        student, teacher = (z.index_select(1, places).view(cut).masked_fill(empty, -inf) for z in (student, teacher))
        log_p = log_softmax(teacher, options.temperature).masked_fill(empty, EMPTY)
        log_q = log_softmax(student, options.temperature).masked_fill(empty, EMPTY)
    loss = kl_terms(log_p, log_q).sum(dim=-1)
    if options.weighting:
        weight = cosine_distance(log_p, log_q)
        loss = loss * (weight.detach() if options.detach_weight else weight)
    return loss.sum(dim=1) * options.temperature**2


def cosine_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - cos(p, q) = |p / |p| - q / |q||^2 / 2 over the last dim: exact to rounding as q nears p, unlike 1 - cos."""
    p, q = log_p.exp(), log_q.exp()
    apart: Tensor = p / p.norm(dim=-1, keepdim=True) - q / q.norm(dim=-1, keepdim=True)
    return apart.square().sum(dim=-1) / 2


def _ranked(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both logits [N, C] with the classes of every sample by rank, and the class of every rank [N, C]."""
    if not options.ranking:
        return student, teacher, None
    with torch.no_grad():
        order = rank_classes(student, teacher)
    return student.gather(1, order), teacher.gather(1, order), order


@remember
def _places(classes: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rank at every place [groups * width], and which places are empty [groups, width]; None where none is."""
    edges = stage_edges(classes, groups)
    width = max(stop - start for start, stop in pairwise(edges))
    with torch.inference_mode(False):  # they are kept, and a training step may be the next to use them
        ranks = torch.tensor(edges[:-1], device=device)[:, None] + torch.arange(width, device=device)
        empty = ranks >= torch.tensor(edges[1:], device=device)[:, None]
        return ranks.clamp(max=classes - 1).flatten(), None if classes % groups == 0 else empty
