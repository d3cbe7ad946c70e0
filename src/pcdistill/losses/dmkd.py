"""DMKD: what the teacher attends to is masked, once by place and once by channel, and both reconstructions are fused.

Source: Yang, Tang, Wu, Li, Xu, Wan, "DMKD: Improving Feature-based Knowledge Distillation for Object Detection Via Dual
Masking Augmentation", arXiv 2309.02719 (2023). Its equations were not at hand: this is after the abstract, with the
attention of FGD, the generator and reduction of MGD, and our shares of what is masked.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pcdistill.losses._common import check_temperature
from pcdistill.losses._pyramid import (
    AlignedLevels,
    DualMasking,
    Pyramid,
    Targets,
    channel_attention,
    check_pyramid_reduction,
    no_autocast,
    spatial_attention,
    squared_error,
)
from pcdistill.losses.base import PyramidLoss

__all__ = ["DMKDLoss"]


class DMKDLoss(PyramidLoss):
    """Squared error between the teacher's feature and two fused reconstructions, summed over the levels.

        A_S, A_C = attention of F_t over places and over channels (temperature T)
        M_S, M_C = 0 on the share spatial_ratio of places, channel_ratio of channels, with the highest attention
        F_f = a G_S(align(F_s) * M_S) + (1 - a) G_C(align(F_s) * M_C)
        loss = sum over levels of |F_f - F_t|^2 / N

    a is the softmax of two learnt numbers per level. Weights as for MGD: 5e-7 for two-stage and 2e-5 for one-stage
    students with "batch"; `reduction="mean"` divides by channels and places as well.

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's; a constant.
        spatial_ratio: share of places that is masked (our choice: 0.5).
        channel_ratio: share of channels that is masked (our choice: 0.3).
        temperature: T of the attention; 0.5 in FGD.
        reduction: "batch" or "mean".
        strides: the strides to compare; None takes all that both have.

    Raises:
        ValueError: a ratio, temperature or reduction that is none, pyramids that share no stride.
    """

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid,
        *,
        spatial_ratio: float = 0.5,
        channel_ratio: float = 0.3,
        temperature: float = 0.5,
        reduction: Literal["batch", "mean"] = "batch",
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.align = AlignedLevels(student, teacher, strides)
        self.masking = nn.ModuleList(
            DualMasking(width, spatial_ratio=spatial_ratio, channel_ratio=channel_ratio) for width in self.align.widths
        )
        self.reduction = check_pyramid_reduction(reduction)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            losses = []
            for masking, (own, wanted) in zip(self.masking, self.align(student, teacher), strict=True):
                places, channels = (
                    spatial_attention(wanted, self.temperature),
                    channel_attention(wanted, self.temperature),
                )
                losses.append(squared_error(masking(own, places, channels), wanted, self.reduction))
            return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}"
