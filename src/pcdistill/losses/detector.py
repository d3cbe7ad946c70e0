"""The detector's own losses, as a term that a recipe can weight beside the distillation losses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pcdistill.losses.base import Needs, PyramidLoss

__all__ = ["DetectorLoss"]


class DetectorLoss(PyramidLoss):
    """Sum of what the student computes against the boxes: Faster R-CNN's, RetinaNet's or FCOS's losses by torchvision.

    It is to a detector what cross-entropy is to a classifier: the term that every recipe has, and the only one of
    `--method none`.
    """

    needs = Needs(teacher=False, own_losses=True)

    def forward(self, losses: Mapping[str, Tensor], teacher: object = None, target: object = None) -> Tensor:
        """Sum the losses by name; teacher and target were used, or not, where they were computed."""
        if not losses:
            raise ValueError("losses must be the detector's own by name, got none: is the student in eval mode?")
        return torch.stack([value.float() for value in losses.values()]).sum()
