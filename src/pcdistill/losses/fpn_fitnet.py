"""FitNet on the levels of a feature pyramid: the plain squared error that the other methods are compared with.

Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550 (2015),
equation 3, applied to every level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcdistill.losses._pyramid import AlignedLevels, Pyramid, Targets, no_autocast
from pcdistill.losses.base import PyramidLoss

__all__ = ["FPNFitNetLoss"]


class FPNFitNetLoss(PyramidLoss):
    """Mean squared error between aligned student features and teacher features, summed over the levels.

        loss = sum over levels of mean((align(F_s) - F_t)^2)

    Where the widths differ, align is a learnt 1x1 convolution (FitNet's regressor); where they are equal, nothing.

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's; a constant.
        strides: the strides to compare; None takes all that both have.
    """

    def __init__(self, student: Pyramid, teacher: Pyramid, *, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        self.align = AlignedLevels(student, teacher, strides)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            losses = [(own - wanted).square().mean() for own, wanted in self.align(student, teacher)]
            return torch.stack(losses).sum()
