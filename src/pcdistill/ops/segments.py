"""How PCD cuts the classes: the ranking, the groups of a stage, and the common refinement of all stages."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

R = TypeVar("R")
A = TypeVarTuple("A")


def remember(function: Callable[[*A], R]) -> Callable[[*A], R]:
    """Cache by the arguments, except while torch.compile traces, which would warn of every cache that it meets."""
    cached: Any = lru_cache(maxsize=128)(function)

    def wrapper(*args: *A) -> R:
        result: R = function(*args) if torch.compiler.is_compiling() else cached(*args)
        return result

    return wrapper


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work, or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


@dataclass(frozen=True, order=True)
class Group:
    """Ranks start to stop - 1 of every sample form one group, whose loss is summed `count` times."""

    start: int
    stop: int
    count: int


def check_stages(stages: int, classes: int | None = None) -> None:
    """Raise unless S is an integer >= 1 and, where C is known, no group would be left with a single class."""
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages must be an integer >= 1, got {stages!r}")
    if classes is not None and stages > classes // 2:
        raise ValueError(f"stages must be at most C // 2 = {classes // 2} for {classes} classes, got {stages}")


def stage_edges(classes: int, groups: int) -> list[int]:
    """The boundaries of a stage, 0 first, C last: group j of k holds ranks j * C // k to (j + 1) * C // k - 1."""
    return [j * classes // groups for j in range(groups + 1)]


def summed_groups(classes: int, stage_sizes: Iterable[int]) -> tuple[Group, ...]:
    """The groups of all given stages, sorted; a group that several stages share comes once, with its count."""
    counts: Counter[tuple[int, int]] = Counter()
    for k in stage_sizes:
        counts.update(pairwise(stage_edges(classes, k)))
    return tuple(Group(start, stop, count) for (start, stop), count in sorted(counts.items()))


def refinement(groups: Iterable[Group]) -> tuple[int, ...]:
    """Every boundary of every group, ascending: 0 first, C last. Each group is a union of neighbouring segments."""
    return tuple(sorted({edge for group in groups for edge in (group.start, group.stop)}))


def difference(student: Tensor, teacher: Tensor) -> Tensor:
    """|z_t - z_s|, what classes are ranked by.

    Rounded once, to the dtype of the logits: every backend, and the reference in the tests, compares these same
    numbers, so that classes whose differences round to one number are ties for all of them.
    """
    return (teacher - student).abs()


def rank_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """Class indices [N, C], the largest difference first; ties go to the lower class index."""
    return difference(student, teacher).sort(dim=1, descending=True, stable=True).indices


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) over the last dim, with the maximum taken off before the division, which would round it."""
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).log_softmax(dim=-1)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Elements that sum to KL(p || q), each >= 0: p (expm1(d) - d), d = log q - log p.

    p (log p - log q) sums to the same, but through terms of both signs that cancel as q comes close to p.
    """
    d = log_q - log_p
    p = log_p.exp()
    near = d.clamp(-0.5, 0.5)
    # expm1(d) - d by its series: the difference itself would cancel. Twelve terms reach 1e-16 at |d| = 0.5.
    series = torch.full_like(near, 1.0 / 479001600)
    for factorial in (39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
        series = series * near + 1.0 / factorial
    return torch.where(d.abs() < 0.5, p * series * near * near, log_q.exp() - p - p * d)
