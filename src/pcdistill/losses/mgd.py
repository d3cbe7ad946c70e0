"""MGD: the student must generate the teacher's whole feature map from a randomly masked one of its own.

Source: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation", arXiv 2205.01529 (ECCV 2022), section 3.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pcdistill.losses._pyramid import (
    AlignedLevels,
    GenerationBlock,
    Pyramid,
    Targets,
    check_pyramid_reduction,
    check_ratio,
    no_autocast,
    squared_error,
)
from pcdistill.losses.base import PyramidLoss

__all__ = ["MGDLoss"]


class MGDLoss(PyramidLoss):
    """Squared error of what a small generator makes of the masked student feature, summed over the levels.

        M = 0 with probability mask_ratio, one draw per place
        loss = sum over levels of |G(align(F_s) * M) - F_t|^2 / N

    The square is summed over channels and places: this is why the paper's weights are small, 5e-7 for two-stage
    students (mask_ratio 0.45) and 2e-5 for one-stage ones (0.65). `reduction="mean"` divides by channels and places as
    well, so that a weight means the same for every size of network and image (our addition).

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's; a constant.
        mask_ratio: probability that a place is masked, in [0, 1].
        reduction: "batch" as in the paper, or "mean".
        strides: the strides to compare; None takes all that both have.

    Raises:
        ValueError: a ratio or a reduction that is none, pyramids that share no stride.
    """

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid,
        *,
        mask_ratio: float = 0.45,
        reduction: Literal["batch", "mean"] = "batch",
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_ratio(mask_ratio, "mask_ratio")
        self.mask_ratio = mask_ratio
        self.align = AlignedLevels(student, teacher, strides)
        self.generators = nn.ModuleList(GenerationBlock(width) for width in self.align.widths)
        self.reduction = check_pyramid_reduction(reduction)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            losses = []
            for generator, (own, wanted) in zip(self.generators, self.align(student, teacher), strict=True):
                n, _, h, w = own.shape
                mask = torch.rand(n, 1, h, w, device=own.device) >= self.mask_ratio
                losses.append(squared_error(generator(own * mask), wanted, self.reduction))
            return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"mask_ratio={self.mask_ratio:g}, reduction={self.reduction!r}"
