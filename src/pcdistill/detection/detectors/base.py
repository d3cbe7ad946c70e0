"""What every family's adapter shares: what a pass of the student shows, pairs of logits, and the contract itself."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from pcdistill.losses import Pyramid

if TYPE_CHECKING:
    from pcdistill.detection.teacher import TeacherDetector

Target = dict[str, Tensor]
PROBE = 256  # pixels: every stride up to 128 divides it


class StudentPass(NamedTuple):
    """One pass of the student in training mode.

    Attributes:
        losses: the detector's own, by torchvision's names.
        pyramid: the FPN's levels.
        batch: the images as the student's transform made them, with their sizes before padding.
        targets: boxes in pixels of that batch.
        raw: what the pairing of logits needs, as the adapter of the family gives it.
    """

    losses: dict[str, Tensor]
    pyramid: Pyramid
    batch: ImageList
    targets: list[Target]
    raw: Any


class Pairing(NamedTuple):
    """Logits of both detectors for the same R regions, background first.

    Attributes:
        student: [R, K + 1].
        teacher: [R, K + 1].
        labels: [R].
        place: the student's class logits that its own losses read and `student` was taken from, any shape.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    place: Tensor


class Adapter(Protocol):
    """What a distiller needs of a family of detectors.

    Attributes:
        model: the detector.
        outputs: K + 1 class logits of a region, background included.
    """

    model: Any
    outputs: int

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        """As the model's own forward in training mode, with what lies between kept."""

    def pyramid(self, features: Mapping[str, Tensor], batch: ImageList) -> Pyramid:
        """The backbone's maps of a batch as the losses take them."""

    def pair(
        self,
        seen: StudentPass,
        teacher: "TeacherDetector",
        features: Mapping[str, Tensor],
        *,
        top_k: int,
        threshold: float,
    ) -> Pairing:
        """The student's logits and the teacher's for the same regions."""

    def check_pair(self, teacher: "TeacherDetector", images: Sequence[Tensor]) -> None:
        """Raise unless logits of both can be paired."""


@torch.no_grad()
def pyramid_strides(model: Any) -> list[int]:
    """Image pixels per cell of every level of a detector's pyramid, found with one blank image in eval mode."""
    known = getattr(model.backbone, "strides", None)
    if known is not None:
        return list(known)
    modes = {module: module.training for module in model.backbone.modules()}
    model.backbone.eval()
    device = next(model.backbone.parameters()).device
    features = model.backbone(torch.zeros(1, 3, PROBE, PROBE, device=device))
    for module, mode in modes.items():
        module.training = mode
    return [PROBE // level.shape[2] for level in features.values()]


def pyramid_of(features: Mapping[str, Tensor], strides: list[int], batch: ImageList) -> Pyramid:
    """Maps by level, finest first, with the size of the padded batch."""
    return Pyramid(list(features.values()), strides, (batch.tensors.shape[2], batch.tensors.shape[3]))


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width in pixels, times a factor."""
    return (size[0], size[1]) if factor == 1.0 else (round(size[0] * factor), round(size[1] * factor))
