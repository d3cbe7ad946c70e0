"""Attention transfer (AT): the student looks where the teacher looks.

Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", arXiv 1612.03928 (2017).
"""

from collections.abc import Sequence

from torch import Tensor

from pcdistill.losses._common import Reduction, check_weight, reduce_loss, upcast
from pcdistill.losses._features import (
    Features,
    check_map_lists,
    match_size,
    mse_per_sample,
    pair_stages,
    stage_map,
    unit,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["ATLoss", "at_loss"]


def attention(features: Tensor, *, p: float = 2.0) -> Tensor:
    """Where a map is active: the mean over channels of |F|^p as a vector of length 1.

    Args:
        features: F, [N, D, H, W], float32 or float64.
        p: the exponent, > 0. Larger values look at the strongest places only.

    Returns:
        [N, H W].

    Source:
        arXiv 1612.03928, section 3.1: F_sum^p; the mean in place of the sum is lost in the normalisation.
    """
    return unit(features.abs().pow(p).mean(1).flatten(1), dim=1)


def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    p: float = 2.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference between attention maps, summed over the stages.

        a(F) = vec(mean_d |F_d|^p) / |vec(mean_d |F_d|^p)|    loss = sum_stages 1 / (H W) * |a(F_s) - a(F_t)|^2

    Args:
        student_maps: F_s of each stage, [N, D, H, W]. Any floating dtype; the arithmetic is float32 or better.
        teacher_maps: F_t, [N, D', H', W'], as many. Constants: no gradient flows into them. Where the sizes differ, the
            larger map is average-pooled to the smaller.
        p: the exponent, > 0. Customary: 2.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero where the attention is the same; blind to the features' scale. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, exponent or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1612.03928, eq. 2, which has the norm itself and a factor beta / 2; the mean of squares is what the
        authors' code computes and what the weight 1000 is meant for.
    """
    check_map_lists(student_maps, teacher_maps)
    check_exponent(p)
    per_sample = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        f_s, f_t = match_size(upcast(student_map), upcast(teacher_map.detach()))
        per_sample.append(mse_per_sample(attention(f_s, p=p), attention(f_t, p=p)))
    return reduce_loss(sum(per_sample[1:], per_sample[0]), reduction)


def check_exponent(p: float) -> None:
    """Raise unless the exponent is a finite number above 0."""
    check_weight(p, "p")
    if p == 0:
        raise ValueError(f"p must be a finite number > 0, got {p}")


class ATLoss(FeatureLoss):
    """:func:`at_loss` over all paired stages.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch.
        p: the exponent of the attention.
    """

    def __init__(self, student: Features, teacher: Features, *, p: float = 2.0) -> None:
        super().__init__()
        check_exponent(p)
        self.pairs = pair_stages(student.maps, teacher.maps)
        self.p = p

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        student_maps = [stage_map(student, i, "student") for i, _ in self.pairs]
        teacher_maps = [stage_map(teacher, j, "teacher") for _, j in self.pairs]
        return at_loss(student_maps, teacher_maps, p=self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, pairs={self.pairs}"
