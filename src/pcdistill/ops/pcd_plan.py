"""What of PCD's one-pass algorithm depends on the groups alone: segments, layers and index tables."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from pcdistill.ops.segments import Group, refinement, summed_groups

MAX_MEMBERS_PER_CLASS = 4


@dataclass(frozen=True)
class Plan:
    """Groups as unions of segments.

    Groups that overlap lie in different layers, and every layer covers every segment once: where no group does, a
    filler with count 0 stands in. Statistics of all groups are then sums over [layers, segments, N] arrays, without
    masks and without one operation per group.

    Args:
        edges: boundaries of the K segments in ranks, 0 first, C last.
        groups: first segment, segment after the last one, and count, layer by layer.
        layers: number of groups in every layer.
    """

    edges: tuple[int, ...]
    groups: tuple[tuple[int, int, int], ...]
    layers: tuple[int, ...]

    @property
    def segments(self) -> int:
        return len(self.edges) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.edges))

    @property
    def members(self) -> int:
        """Pairs of a segment and a group that holds it: what combining the statistics of one sample costs."""
        return len(self.layers) * self.segments

    @property
    def crowded(self) -> bool:
        """Whether there are so many groups that eager one-pass code loses to the reference, and needs huge tables.

        One pass costs C + members per sample, the reference C per layer: with many stages almost every rank is a
        boundary, and there is nothing left to share.
        """
        return self.members > MAX_MEMBERS_PER_CLASS * self.edges[-1]


R = TypeVar("R")
A = TypeVarTuple("A")


def remember(function: Callable[[*A], R]) -> Callable[[*A], R]:
    """Cache by the arguments, except while torch.compile traces, which would warn of every cache that it meets."""
    cached: Any = lru_cache(maxsize=128)(function)

    def wrapper(*args: *A) -> R:
        result: R = function(*args) if torch.compiler.is_compiling() else cached(*args)
        return result

    return wrapper


@remember
def groups_of_stages(classes: int, stage_sizes: tuple[int, ...]) -> tuple[Group, ...]:
    """:func:`pcdistill.ops.segments.summed_groups`, remembered: a training run asks for the same ones at every step."""
    return summed_groups(classes, stage_sizes)


@remember
def make_plan(groups: tuple[Group, ...], classes: int) -> Plan:
    """Segments and layers of these groups, which are sorted by start, as summed_groups returns them."""
    edges = refinement((*groups, Group(0, classes, 0)))
    index = {edge: i for i, edge in enumerate(edges)}
    last = len(edges) - 1
    layers: list[list[tuple[int, int, int]]] = []
    for group in groups:
        start, stop = index[group.start], index[group.stop]
        for layer in layers:
            if layer[-1][1] <= start:
                break
        else:
            layer = []
            layers.append(layer)
        reached = layer[-1][1] if layer else 0
        if reached < start:
            layer.append((reached, start, 0))
        layer.append((start, stop, group.count))
    for layer in layers:
        if layer[-1][1] < last:
            layer.append((layer[-1][1], last, 0))
    return Plan(edges, tuple(group for layer in layers for group in layer), tuple(map(len, layers)))


@dataclass(frozen=True)
class Tables:
    """The plan as tensors.

    Args:
        member: [layers, most groups of a layer, K] float64, 1 where the group holds the segment.
        dense: [G, K] float64, the same for all groups at once.
        rows: [G], where group g lies among the rows of `member`, layers and groups flattened.
        group_of: [layers * K], the group that holds the segment in the layer.
        first, second: [G], rows of the table of maxima whose larger one is the maximum over the group.
        count: [G, 1] float64.
        edges: [K - 1] int32, the inner boundaries in ranks.
        spans: [groups, 3] int32, first segment, segment after the last one and count; without the fillers.
    """

    member: Tensor
    dense: Tensor
    rows: Tensor
    group_of: Tensor
    first: Tensor
    second: Tensor
    count: Tensor
    edges: Tensor
    spans: Tensor


@remember
def make_tables(plan: Plan, device: torch.device) -> Tables:
    """Tensors of the plan on a device."""
    widest = max(plan.layers)
    member = torch.zeros(len(plan.layers), widest, plan.segments, dtype=torch.float64)
    rows: list[int] = []
    group_of: list[int] = []
    first: list[int] = []
    second: list[int] = []
    level_start = [0]
    while 2 ** len(level_start) <= plan.segments:
        level_start.append(level_start[-1] + plan.segments - 2 ** (len(level_start) - 1) + 1)
    groups = iter(enumerate(plan.groups))
    for layer, number in enumerate(plan.layers):
        for j in range(number):
            g, (start, stop, _) = next(groups)
            member[layer, j, start:stop] = 1.0
            rows.append(layer * widest + j)
            group_of += [g] * (stop - start)
            level = (stop - start).bit_length() - 1
            first.append(level_start[level] + start)
            second.append(level_start[level] + stop - 2**level)
    index = [torch.tensor(values, device=device) for values in (rows, group_of, first, second)]
    count = torch.tensor([[float(group[2])] for group in plan.groups], dtype=torch.float64, device=device)
    dense = member.view(-1, plan.segments)[rows].to(device)
    edges = torch.tensor(plan.edges[1:-1], dtype=torch.int32, device=device)
    spans = torch.tensor([group for group in plan.groups if group[2]], dtype=torch.int32, device=device)
    return Tables(member.to(device), dense, index[0], index[1], index[2], index[3], count, edges, spans)
