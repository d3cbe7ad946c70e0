"""Neuron selectivity transfer (NST): the student's channels are distributed over places as the teacher's are.

Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv 1707.01219 (2017).
"""

from collections.abc import Sequence

from torch import Tensor

from pcdistill.losses._common import Reduction, reduce_loss, upcast
from pcdistill.losses._features import (
    Features,
    check_map_lists,
    full_precision,
    match_size,
    pair_stages,
    stage_map,
    unit,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["NSTLoss", "nst_loss"]


def nst_loss(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, reduction: Reduction = "mean"
) -> Tensor:
    """Squared maximum mean discrepancy of the channels' patterns under the kernel k(a, b) = (a . b)^2, over the stages.

        f_d = vec(F_d) / |vec(F_d)|
        loss = sum_stages mean_{d,e} k(f^s_d, f^s_e) + mean_{d,e} k(f^t_d, f^t_e) - 2 mean_{d,e} k(f^s_d, f^t_e)

    Args:
        student_maps: F of each stage, [N, D, H, W]. Any floating dtype; the arithmetic is float32 or better.
        teacher_maps: as many, [N, D', H', W'], of any width. Constants: no gradient flows into them. Where the sizes
            differ, the larger map is average-pooled to the smaller.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". At least 0, up to rounding; 0 if the channels' patterns are the same, in any order
        and at any scale. A channel that is 0 everywhere has no pattern and gets no gradient. N = 0 gives 0.

    Raises:
        ValueError: a shape, device or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1707.01219, eq. 6 with the polynomial kernel of section 3.3 (degree 2, no constant).
    """
    check_map_lists(student_maps, teacher_maps)
    per_sample = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        f_s, f_t = match_size(upcast(student_map), upcast(teacher_map.detach()))
        with full_precision(f_s):
            f_s, f_t = unit(f_s.flatten(2), dim=2), unit(f_t.flatten(2), dim=2)
            per_sample.append(_kernel_mean(f_s, f_s) + _kernel_mean(f_t, f_t) - 2 * _kernel_mean(f_s, f_t))
    return reduce_loss(sum(per_sample[1:], per_sample[0]), reduction)


def _kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a_d . b_e)^2 over all pairs of channels of [N, D, L] and [N, E, L]: [N]."""
    return (a @ b.transpose(1, 2)).square().mean((1, 2))


class NSTLoss(FeatureLoss):
    """:func:`nst_loss` over all paired stages.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch.
    """

    def __init__(self, student: Features, teacher: Features) -> None:
        super().__init__()
        self.pairs = pair_stages(student.maps, teacher.maps)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        student_maps = [stage_map(student, i, "student") for i, _ in self.pairs]
        teacher_maps = [stage_map(teacher, j, "teacher") for _, j in self.pairs]
        return nst_loss(student_maps, teacher_maps)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}"
