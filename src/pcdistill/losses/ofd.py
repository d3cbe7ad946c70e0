"""Overhaul of feature distillation (OFD): features before the activation, matched where they matter after it.

Source: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", arXiv 1904.01866 (2019).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pcdistill.losses._common import Reduction, reduce_loss, shape, upcast
from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    check_map_lists,
    check_map_pair,
    full_precision,
    match_size,
    nothing,
    pair_stages,
    pre_activations,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["OFDLoss", "ofd_loss"]

RARE = 1e-3  # below this probability of a negative value the margin is -3 standard deviations


def normal_margin(mean: Tensor, deviation: Tensor) -> Tensor:
    """Expected value of the negative part of a Gaussian: E[X | X < 0] for X ~ N(mean, deviation^2).

        m = mean - deviation * phi(mean / deviation) / Phi(-mean / deviation),  or -3 deviation where Phi <= 0.001

    Args:
        mean: [D].
        deviation: [D], >= 0.

    Returns:
        [D], < 0 wherever the Gaussian is not a single point above 0.

    Source:
        arXiv 1904.01866, eq. 4; the rule for channels that are hardly ever negative is the authors' code's.
    """
    ratio = mean / deviation.clamp(min=1e-30)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    rare = negative <= RARE
    return torch.where(rare, -3 * deviation, mean - deviation * density / torch.where(rare, 1.0, negative))


def ofd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    margins: Sequence[Tensor],
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared distance to the teacher's features under a margin ReLU, not counted where both are inactive.

        t' = max(t, m)
        loss = sum_{i=0}^{n-1} 2^-(n-i-1) * sum_{d,h,w} (s - t')^2 [s > t' or t > 0]

    Args:
        student_maps: s of each of the n stages, shallow to deep, after the connectors and before the activation,
            [N, D, H, W]. Any floating dtype; the arithmetic is float32 or better.
        teacher_maps: t, before the activation, [N, D, H', W']. Constants: no gradient flows into them. Where the sizes
            differ, the larger map is average-pooled to the smaller.
        margins: m of each stage, [D], < 0.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero where s = t' or where the teacher is inactive and the student below t'.
        N = 0 gives 0.

    Raises:
        ValueError: a shape, device or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1904.01866, eq. 2 and 3 (partial L2 distance and margin ReLU); the halving from stage to stage and the
        sum over channels and places are the authors' code's, for which the weight 1e-3 is meant.
    """
    check_map_lists(student_maps, teacher_maps)
    if len(margins) != len(student_maps):
        raise ValueError(f"margins must be one for each of the {len(student_maps)} stages, got {len(margins)}")
    per_sample = []
    for i, (student_map, teacher_map, margin) in enumerate(zip(student_maps, teacher_maps, margins, strict=True)):
        width = student_map.shape[1]
        if teacher_map.shape[1] != width or list(margin.shape) != [width]:
            raise ValueError(
                f"a stage's student map, teacher map and margin must have one number of channels, got {width}, "
                f"{teacher_map.shape[1]} and {shape(margin)}; pass the student's map through a connector first"
            )
        s, t = match_size(upcast(student_map), upcast(teacher_map.detach()))
        goal = torch.maximum(t, upcast(margin.detach())[:, None, None])
        counts = (s > goal) | (t > 0)
        # where, not a product: an infinite square times 0 would be NaN
        square = torch.where(counts, s - goal, 0.0).square().flatten(1).sum(1)
        per_sample.append(square / 2 ** (len(student_maps) - i - 1))
    return reduce_loss(sum(per_sample[1:], per_sample[0]), reduction)


class OFDLoss(FeatureLoss):
    """:func:`ofd_loss` over all paired stages, with a connector (1x1 convolution, batch normalisation) for each.

    The margins come from the batch normalisation before the teacher's activation: its bias is the mean, its weight the
    deviation. A stage without one gets the mean of its negative values in the example batch (our choice).

    Args:
        student: features of an example batch with `pre_activations`; only shapes are used.
        teacher: features of the same batch with `pre_activations`, and `norms` where there are any.
    """

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        self.pairs = pair_stages(student.maps, teacher.maps)
        before_s, before_t = pre_activations(student, "student"), pre_activations(teacher, "teacher")
        self.connectors = nn.ModuleList()
        for n, (i, j) in enumerate(self.pairs):
            check_map_pair(before_s[i], before_t[j])
            width = before_t[j].shape[1]
            conv = nn.Conv2d(before_s[i].shape[1], width, 1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / width))
            self.connectors.append(nn.Sequential(conv, AdapterNorm(width)).to(before_s[i].device))
            norm = None if teacher.norms is None else teacher.norms[j]
            self.register_buffer(f"margin_{n}", stage_margin(norm, before_t[j]))

    @property
    def margins(self) -> list[Tensor]:
        return [self.get_buffer(f"margin_{n}") for n in range(len(self.pairs))]

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        if student.logits.shape[0] == 0:
            return nothing(student)
        before_s, before_t = pre_activations(student, "student"), pre_activations(teacher, "teacher")
        for owner, maps, last in (("student", before_s, self.pairs[-1][0]), ("teacher", before_t, self.pairs[-1][1])):
            if last >= len(maps):
                raise ValueError(f"the {owner} shows {len(maps)} maps now, {last + 1} or more when the loss was built")
        with full_precision(before_s[0]):
            connected = [
                connector(upcast(before_s[i])) for (i, _), connector in zip(self.pairs, self.connectors, strict=True)
            ]
            return ofd_loss(connected, [before_t[j] for _, j in self.pairs], self.margins)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}"


def stage_margin(norm: nn.Module | None, before: Tensor) -> Tensor:
    """The margin of a stage: from its batch normalisation, or from the example's negative values without one.

    Args:
        norm: the batch normalisation before the activation; one without weights counts as none.
        before: the example's features before the activation, [N, D, H, W].

    Returns:
        [D], float32 or better, <= 0.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.shape[0] == before.shape[1]:
        return normal_margin(upcast(bias.detach()), upcast(weight.detach()).abs())
    x = upcast(before.detach()).clamp(max=0)
    count = (x < 0).sum((0, 2, 3)).clamp(min=1)
    return x.sum((0, 2, 3)) / count
