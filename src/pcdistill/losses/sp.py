"""Similarity-preserving distillation (SP): samples that are alike to the teacher are alike to the student.

Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682 (2019).
"""

from torch import Tensor

from pcdistill.losses._common import shape, upcast
from pcdistill.losses._features import (
    Features,
    check_vector_pair,
    full_precision,
    pair_stages,
    pick_stage,
    stage_map,
    unit,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["SPLoss", "sp_loss"]


def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference between the two networks' row-normalised matrices of inner products.

        Q = F F^T    G_i = Q_i / |Q_i|    loss = 1 / N^2 * sum_ij (G^s_ij - G^t_ij)^2

    Args:
        student_features: F_s, [N, ...], flattened per sample. Any floating dtype; the arithmetic is float32 or better.
        teacher_features: F_t, [N, ...], of any width. A constant: no gradient flows into it.

    Returns:
        A scalar, in [0, 4 / N]. Zero if the features differ by a rotation and one scale. N = 0 gives 0.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1907.09682, eq. 1 to 4.
    """
    for name, x in (("student", student_features), ("teacher", teacher_features)):
        if x.ndim < 2:
            raise ValueError(f"{name} features must be [N, ...], got {shape(x)}")
    f_s, f_t = upcast(student_features).flatten(1), upcast(teacher_features.detach()).flatten(1)
    check_vector_pair(f_s, f_t)
    with full_precision(f_s):
        difference = unit(f_s @ f_s.T, dim=1) - unit(f_t @ f_t.T, dim=1)
    return difference.square().sum() / max(f_s.shape[0], 1) ** 2


class SPLoss(FeatureLoss):
    """:func:`sp_loss` at one stage.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch.
        stage: which of the paired stages, counted from 0; -1 is the deepest, the literature's choice.
    """

    def __init__(self, student: Features, teacher: Features, *, stage: int = -1) -> None:
        super().__init__()
        self.pair = pick_stage(pair_stages(student.maps, teacher.maps), stage)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        return sp_loss(stage_map(student, self.pair[0], "student"), stage_map(teacher, self.pair[1], "teacher"))

    def extra_repr(self) -> str:
        return f"student stage {self.pair[0]}, teacher stage {self.pair[1]}"
