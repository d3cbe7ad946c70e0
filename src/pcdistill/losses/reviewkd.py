"""ReviewKD: the teacher's stages are learned from fusions of the student's own and all deeper stages.

Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", arXiv 2104.09044 (2021).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.losses._common import Reduction, reduce_loss, upcast
from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    check_map_lists,
    check_map_pair,
    full_precision,
    mse_per_sample,
    nothing,
    pair_stages,
    pre_activations,
    stage_map,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["ReviewKDLoss", "reviewkd_loss"]

LEVELS = (4, 2, 1)


def reviewkd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    levels: Sequence[int] = LEVELS,
    reduction: Reduction = "mean",
) -> Tensor:
    """Hierarchical context loss: squared differences at full size and pooled to coarser grids, summed over the stages.

        loss = sum_stages (mse(F_s, F_t) + sum_k 2^-k mse(P_k F_s, P_k F_t)) / (1 + sum_k 2^-k)

    P_k averages over the bins of the k-th grid, l x l for the l in `levels` that are smaller than the map.

    Args:
        student_maps: F_s of each stage after the fusion, [N, D, H, W]. Any floating dtype; the arithmetic is float32 or
            better.
        teacher_maps: F_t, [N, D, H, W]. Constants: no gradient flows into them.
        levels: sides of the grids, large to small.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero if and only if the maps are equal. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, level or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 2104.09044, section 3.4; the grids and their weights are the authors' code's.
    """
    check_map_lists(student_maps, teacher_maps)
    _check_levels(levels)
    per_sample = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        check_map_pair(student_map, teacher_map, same_width=True)
        f_s, f_t = upcast(student_map), upcast(teacher_map.detach())
        loss, weight, total = mse_per_sample(f_s, f_t), 1.0, 1.0
        for level in levels:
            if level < min(f_s.shape[2:]):
                weight /= 2
                total += weight
                pooled = F.adaptive_avg_pool2d(f_s, level), F.adaptive_avg_pool2d(f_t, level)
                loss = loss + weight * mse_per_sample(*pooled)
        per_sample.append(loss / total)
    return reduce_loss(sum(per_sample[1:], per_sample[0]), reduction)


def _check_levels(levels: Sequence[int]) -> None:
    if any(isinstance(level, bool) or not isinstance(level, int) or level < 1 for level in levels):
        raise ValueError(f"levels must be whole numbers from 1 on, got {tuple(levels)}")


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of one stage of the student with what the deeper stages left.

        x = BN(conv1x1(F));  a, b = sigmoid(conv1x1([x, up(r)]));  x' = a x + b up(r);  out = BN(conv3x3(x')), r' = x'

    The deepest stage has no r: x' = x. `up` and the step to the teacher's size take the nearest neighbour.

    Args:
        student_width: channels of F.
        middle_width: channels of x and r.
        teacher_width: channels of the output.
        fuse: whether there is a deeper stage.
    """

    def __init__(self, student_width: int, middle_width: int, teacher_width: int, *, fuse: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(student_width, middle_width, 1, bias=False)
        leave = nn.Conv2d(middle_width, teacher_width, 3, padding=1, bias=False)
        for conv in (enter, leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(enter, AdapterNorm(middle_width))
        self.leave = nn.Sequential(leave, AdapterNorm(teacher_width))
        self.attention = nn.Conv2d(2 * middle_width, 2, 1) if fuse else None

    def forward(self, student_map: Tensor, residual: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """F [N, D_s, H, W] and r [N, M, H', W'] -> out [N, D_t, *size] and r' [N, M, *size]."""
        x: Tensor = self.enter(student_map)
        if self.attention is not None and residual is not None:
            residual = _nearest(residual, (x.shape[2], x.shape[3]))
            gates = self.attention(torch.cat([x, residual], dim=1)).sigmoid()
            x = gates[:, :1] * x + gates[:, 1:] * residual
        x = _nearest(x, size)
        return self.leave(x), x


def _nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="nearest")


class ReviewKDLoss(FeatureLoss):
    """:func:`reviewkd_loss` of fused student stages and, deepest of all, of what the classifiers read.

    The student's maps after their activation are compared with the teacher's before it.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch with `pre_activations`.
        middle_width: channels of the fusion; None is the width of what the student's classifier reads, at most 512.
        levels: sides of the grids of the loss.
    """

    def __init__(
        self,
        student: Features,
        teacher: Features,
        *,
        middle_width: int | None = None,
        levels: Sequence[int] = LEVELS,
    ) -> None:
        super().__init__()
        _check_levels(levels)
        if middle_width is not None and middle_width < 1:
            raise ValueError(f"middle_width must be > 0, got {middle_width}")
        self.levels = tuple(levels)
        self.pairs = pair_stages(student.maps, teacher.maps)
        middle = middle_width or min(512, student.pooled.shape[1])
        fusions = [Fusion(student.pooled.shape[1], middle, teacher.pooled.shape[1], fuse=False)]
        for i, j in reversed(self.pairs):
            student_map, teacher_map = student.maps[i], pre_activations(teacher, "teacher")[j]
            check_map_pair(student_map, teacher_map)
            fusions.append(Fusion(student_map.shape[1], middle, teacher_map.shape[1], fuse=True))
        self.fusions = nn.ModuleList(fusions).to(student.pooled.device)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        if student.logits.shape[0] == 0:
            return nothing(student)
        before = pre_activations(teacher, "teacher")
        stages = [(student.pooled[:, :, None, None], teacher.pooled[:, :, None, None])]
        for i, j in reversed(self.pairs):
            stage_map(teacher, j, "teacher")
            stages.append((stage_map(student, i, "student"), before[j]))
        fused, goals = [], []
        residual: Tensor | None = None
        with full_precision(student.pooled):
            for fusion, (student_map, teacher_map) in zip(self.fusions, stages, strict=True):
                size = (teacher_map.shape[2], teacher_map.shape[3])
                out, residual = fusion(upcast(student_map), residual, size)
                fused.append(out)
                goals.append(teacher_map)
            return reviewkd_loss(fused, goals, levels=self.levels)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, levels={self.levels}"
