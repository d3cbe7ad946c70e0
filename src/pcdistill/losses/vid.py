"""Variational information distillation (VID): the student's features predict the teacher's, with a learned variance.

Source: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", arXiv
1904.05835 (2019).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.losses._common import Reduction, reduce_loss, shape, upcast
from pcdistill.losses._features import (
    Features,
    check_map_pair,
    full_precision,
    match_size,
    pair_stages,
    stage_map,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["VIDLoss", "vid_loss"]


def vid_loss(mean: Tensor, variance: Tensor, teacher_map: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Negative log-likelihood of the teacher's feature map under a Gaussian that the student predicts.

        loss = 1 / (D H W) * sum_{d,h,w} ((F_t - mean)^2 / variance_d + log variance_d) / 2

    Args:
        mean: [N, D, H, W], the regressor's output. Any floating dtype; the arithmetic is float32 or better.
        variance: [D], > 0; one for each channel of the teacher.
        teacher_map: F_t, [N, D, H, W]. A constant: no gradient flows into it.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Least where the mean is F_t; then negative for variances below 1. N = 0 gives 0.

    Raises:
        ValueError: a shape, device or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1904.05835, eq. 6 without its constant log(2 pi) / 2. The paper has the sum; the mean over channels and
        places is the authors' code, for which the weight 1 is meant.
    """
    check_map_pair(mean, teacher_map, same_width=True)
    if list(variance.shape) != [mean.shape[1]]:
        raise ValueError(f"variance must be [{mean.shape[1]}], one for each channel, got {shape(variance)}")
    square = (upcast(mean) - upcast(teacher_map.detach())).square()
    variance = upcast(variance)[:, None, None]
    return reduce_loss(((square / variance + variance.log()) / 2).flatten(1).mean(1), reduction)


class VariationalRegressor(nn.Module):
    """Three 1x1 convolutions with ReLU between them for the mean, and one variance for each of the teacher's channels.

        variance = softplus(raw) + eps

    Args:
        student_width: channels of the student's map.
        teacher_width: channels of the teacher's map, and of the layers between.
        initial_variance: > eps, where the variance starts.
        eps: >= 0, below which the variance cannot fall.
    """

    def __init__(
        self, student_width: int, teacher_width: int, *, initial_variance: float = 5.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, got {eps}")
        if not (math.isfinite(initial_variance) and initial_variance > eps):
            raise ValueError(f"initial_variance must be a finite number > eps = {eps}, got {initial_variance}")
        widths = [student_width, teacher_width, teacher_width, teacher_width]
        layers: list[nn.Module] = []
        for in_width, width in pairwise(widths):
            layers += [nn.Conv2d(in_width, width, 1, bias=False), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        self.raw = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(initial_variance - eps))))
        self.eps = eps

    def forward(self, student_map: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D_s, H, W] -> mean [N, D_t, H, W] and variance [D_t]."""
        return self.mean(student_map), F.softplus(self.raw) + self.eps


class VIDLoss(FeatureLoss):
    """:func:`vid_loss` summed over all paired stages, with a regressor for each.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch.
        initial_variance: where the variances start.
        eps: below which they cannot fall.
    """

    def __init__(
        self, student: Features, teacher: Features, *, initial_variance: float = 5.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.pairs = pair_stages(student.maps, teacher.maps)
        self.regressors = nn.ModuleList()
        for i, j in self.pairs:
            student_map, teacher_map = student.maps[i], teacher.maps[j]
            check_map_pair(student_map, teacher_map)
            widths = student_map.shape[1], teacher_map.shape[1]
            regressor = VariationalRegressor(*widths, initial_variance=initial_variance, eps=eps)
            self.regressors.append(regressor.to(student_map.device))

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        terms = []
        for (i, j), regressor in zip(self.pairs, self.regressors, strict=True):
            student_map, teacher_map = stage_map(student, i, "student"), stage_map(teacher, j, "teacher")
            check_map_pair(student_map, teacher_map)
            with full_precision(student_map):
                f_s, f_t = match_size(upcast(student_map), upcast(teacher_map.detach()))
                mean, variance = regressor(f_s)
                terms.append(vid_loss(mean, variance, f_t))
        return sum(terms[1:], terms[0])

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}"
