"""The teacher of a detector: frozen, over the student's classes, and given the student's very batch.

The student's own transform resizes, normalises and pads the images; the teacher is given that very batch, only with the
normalisation exchanged for its own where they differ. So both see the same pixels at the same places, proposals and
boxes mean the same in both, and nothing is resized twice. A teacher that wants another resolution gets the batch
interpolated, and the proposals scaled, by the ratio of the two sides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from pcdistill.detection.detectors.base import scaled_size
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.distillation.teacher import align_classes
from pcdistill.errors import InputError


class TeacherDetector(nn.Module):
    """A frozen detector, always in eval mode, over the student's classes.

    Args:
        model: a detector that :func:`adapter_of` knows.
        classes: names of its classes 1..K', None if they are the student's.
        student_classes: names of the student's classes 1..K; each must be among the teacher's.
        student: the student, whose transform prepares the images.
        image_size: the side that the teacher's images should have where the student's have `student.min_size`; None
            for the student's own resolution.

    Raises:
        InputError: it lacks classes of the student's, or its outputs do not fit its own.
    """

    columns: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        student_classes: Sequence[str],
        classes: Sequence[str] | None = None,
        student: nn.Module | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.adapter: Any = adapter_of(model)
        known = list(student_classes if classes is None else classes)
        if self.adapter.outputs != len(known) + 1:
            raise InputError(
                f"the teacher gives {self.adapter.outputs - 1} classes of boxes, but {len(known)} are named; name them "
                "all (teacher.classes), or train it on this data (teacher.epochs)"
            )
        positions = align_classes(known, student_classes)
        self.left_out = len(known) - len(positions)
        self.register_buffer("columns", torch.tensor([0, *(p + 1 for p in positions)]), persistent=False)
        self.image_size = image_size
        self.factor = 1.0
        self._student_transform: Any = None
        if student is not None:
            transform: Any = student.transform
            self._student_transform = (transform.image_mean, transform.image_std)
            if image_size is not None:
                self.factor = image_size / transform.min_size[-1]

    def train(self, mode: bool = True) -> "TeacherDetector":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections by its own transform, labels in the student's numbering; of other classes there are none."""
        found = self.model(list(images))
        to_student = self.columns.new_zeros(self.adapter.outputs)
        to_student[self.columns] = torch.arange(len(self.columns), device=self.columns.device)
        kept = []
        for one in found:
            labels = to_student[one["labels"]]
            kept.append({**{key: value[labels > 0] for key, value in one.items()}, "labels": labels[labels > 0]})
        return kept

    @torch.no_grad()
    def features(self, batch: ImageList) -> dict[str, Tensor]:
        """The teacher's feature maps of the student's batch."""
        features: dict[str, Tensor] = self.adapter.model.backbone(self.prepare(batch))
        return features

    def prepare(self, batch: ImageList) -> Tensor:
        """The student's padded batch [N, 3, H, W] in the teacher's normalisation and resolution; padding stays 0."""
        images: Tensor = batch.tensors
        mean, std = self.adapter.model.transform.image_mean, self.adapter.model.transform.image_std
        if self._student_transform is not None and self._student_transform != (mean, std):
            s_mean, s_std, t_mean, t_std = (
                torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None]
                for v in (*self._student_transform, mean, std)
            )
            images = torch.zeros_like(batch.tensors)
            for i, (height, width) in enumerate(batch.image_sizes):
                part = batch.tensors[i, :, :height, :width]
                images[i, :, :height, :width] = (part * s_std + s_mean - t_mean) / t_std
        if self.factor != 1.0:
            size = scaled_size((images.shape[2], images.shape[3]), self.factor)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return images
