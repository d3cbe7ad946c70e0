"""PKD: the student's feature maps correlate with the teacher's, whatever their scale and offset.

Source: Cao, Zhang, Gao, Cheng, Wang, Cheng, Ji, "PKD: General Distillation Framework for Object Detectors via Pearson
Correlation Coefficient", arXiv 2207.02039 (NeurIPS 2022).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcdistill.losses._common import shape, upcast
from pcdistill.losses._pyramid import AlignedLevels, Pyramid, Targets, no_autocast, normalize_channels
from pcdistill.losses.base import PyramidLoss

__all__ = ["PKDLoss", "pkd_loss"]


def pkd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Half the mean squared difference of features that are normalised per channel.

        F' = (F - mean) / (std + 1e-6) over images and places    loss = mean((F'_s - F'_t)^2) / 2

    Up to the factor (M - 1) / M of M values per channel this is 1 - r, with r the mean Pearson correlation.

    Args:
        student_features: F_s, [N, D, H, W]. Any floating dtype; the arithmetic is float32, or float64 for float64.
        teacher_features: F_t, [N, D, H, W]. A constant: no gradient flows into it.

    Returns:
        Scalar; zero if and only if the normalised features are equal. At most 2.

    Raises:
        ValueError: shapes that differ.

    Source:
        arXiv 2207.02039, as in the released code: unbiased deviation, no affine part.
    """
    if student_features.shape != teacher_features.shape or student_features.ndim != 4:
        raise ValueError(
            "features must be two [N, D, H, W] of one shape, got "
            f"{shape(student_features)} and {shape(teacher_features)}"
        )
    student, teacher = upcast(student_features), upcast(teacher_features.detach())
    return 0.5 * (normalize_channels(student) - normalize_channels(teacher)).square().mean()


class PKDLoss(PyramidLoss):
    """:func:`pkd_loss` summed over the levels of equal stride.

    The paper needs equal widths; where they differ, a learnt 1x1 convolution maps the student's to the teacher's (our
    choice). The paper's weight is 6 for two-stage and 10 for one-stage students.

    Args:
        student: the student's observed pyramid.
        teacher: the teacher's.
        strides: the strides to compare; None takes all that both have.
    """

    def __init__(self, student: Pyramid, teacher: Pyramid, *, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        self.align = AlignedLevels(student, teacher, strides)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            losses = [pkd_loss(own, wanted) for own, wanted in self.align(student, teacher)]
            return torch.stack(losses).sum()
