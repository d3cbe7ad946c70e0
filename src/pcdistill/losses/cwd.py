"""CWD: each channel of a feature map is a distribution over places, and the student's must be the teacher's.

Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", arXiv 2011.13256 (ICCV
2021), equations 4 and 5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pcdistill.losses._common import check_temperature, shape, upcast
from pcdistill.losses._pyramid import AlignedLevels, Pyramid, Targets, no_autocast
from pcdistill.losses.base import PyramidLoss

__all__ = ["CWDLoss", "cwd_loss"]


def cwd_loss(student_features: Tensor, teacher_features: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of the channels' distributions over places, mean over channels and images.

        phi(F)[n, d] = softmax over the H W places of F[n, d] / T    loss = T^2 / (N D) sum KL(phi(F_t) || phi(F_s))

    Args:
        student_features: F_s, [N, D, H, W]. Any floating dtype; the arithmetic is float32, or float64 for float64.
        teacher_features: F_t, [N, D, H, W]. A constant: no gradient flows into it.
        temperature: T > 0.

    Returns:
        Scalar >= 0; zero if and only if the maps are equal up to an offset of each channel.

    Raises:
        ValueError: shapes that differ, a temperature that is not a finite number above 0.

    Source:
        arXiv 2011.13256, equations 4 and 5.
    """
    check_temperature(temperature)
    if student_features.shape != teacher_features.shape or student_features.ndim != 4:
        raise ValueError(
            "features must be two [N, D, H, W] of one shape, got "
            f"{shape(student_features)} and {shape(teacher_features)}"
        )
    student, teacher = upcast(student_features).flatten(2), upcast(teacher_features.detach()).flatten(2)
    log_s, log_t = (student / temperature).log_softmax(dim=2), (teacher / temperature).log_softmax(dim=2)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)
    return temperature**2 * divergence.mean()


class CWDLoss(PyramidLoss):
    """:func:`cwd_loss` summed over the levels of equal stride.

    Where the widths differ, a learnt 1x1 convolution maps the student's to the teacher's, as in the paper. Customary
    are temperatures of 1 to 5 and weights of 1 to 10.

    Args:
        student: the student's observed pyramid.
        teacher: the teacher's.
        temperature: T > 0.
        strides: the strides to compare; None takes all that both have.
    """

    def __init__(
        self, student: Pyramid, teacher: Pyramid, *, temperature: float = 1.0, strides: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.align = AlignedLevels(student, teacher, strides)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            pairs = self.align(student, teacher)
            return torch.stack([cwd_loss(own, wanted, temperature=self.temperature) for own, wanted in pairs]).sum()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"
