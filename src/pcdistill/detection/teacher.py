"""The teacher of a detector: frozen, over the student's classes, and given the student's very batch.

The student's own transform resizes, normalises and pads the images; the teacher is given that very batch, only with the
normalisation exchanged for its own where they differ. So both see the same pixels at the same places, regions and boxes
mean the same in both, and nothing is resized twice. A teacher that wants another resolution gets the batch
interpolated, and the boxes scaled, by the ratio of the two sides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.detection.detectors.base import ABSENT, Adapter, Observed, PreparedBatch, Regions
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.distillation.teacher import align_classes
from pcdistill.errors import InputError


class TeacherDetector(nn.Module):
    """A frozen detector, always in eval mode, over the student's classes.

    Args:
        model: a detector that :func:`adapter_of` knows.
        classes: names of its classes 1..K', None if they are the student's.
        student_classes: names of the student's classes 1..K; each must be among the teacher's.
        student: the student, whose images it is given in training.
        image_size: the side that the teacher's images should have where the student's have their own; None for the
            student's own resolution.

    Raises:
        InputError: it lacks classes of the student's, or its outputs do not fit its own; it is not in float32.
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
        lower = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
        if lower is not None:
            raise InputError(
                f"the teacher has weights in {str(lower).removeprefix('torch.')}; a detector teaches in float32: pass "
                "teacher.float()"
            )
        self.model = model.eval().requires_grad_(False)
        self.adapter: Adapter = adapter_of(model)
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
        if student is not None and image_size is not None:
            self.factor = image_size / adapter_of(student).image_size

    def train(self, mode: bool = True) -> "TeacherDetector":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections by its own transform, labels in the student's numbering; of other classes there are none."""
        found = self.adapter.predict(images)
        to_student = self.columns.new_zeros(self.adapter.outputs)
        to_student[self.columns] = torch.arange(len(self.columns), device=self.columns.device)
        kept = []
        for one in found:
            labels = to_student[one["labels"]]
            kept.append({**{key: value[labels > 0] for key, value in one.items()}, "labels": labels[labels > 0]})
        return kept

    @torch.no_grad()
    def observe(self, batch: PreparedBatch) -> Observed:
        """What the teacher shows of the student's batch; its pyramid is that of the student's images and boxes."""
        seen = self.adapter.observe(self.prepare(batch))
        return Observed(seen.pyramid._replace(image_size=batch.image_size), seen.state)

    def prepare(self, batch: PreparedBatch) -> PreparedBatch:
        """The student's batch in the teacher's normalisation and resolution; padding stays 0."""
        pixels, sizes = batch.pixels, batch.sizes
        mean, std = self.adapter.stats
        if not _equal(batch.stats, (mean, std)):
            s_mean, s_std, t_mean, t_std = (
                torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None]
                for v in (*batch.stats, mean, std)
            )
            pixels = torch.zeros_like(batch.pixels)
            for i, (height, width) in enumerate(batch.sizes):
                part = batch.pixels[i, :, :height, :width]
                pixels[i, :, :height, :width] = (part * s_std + s_mean - t_mean) / t_std
        if self.factor != 1.0:
            size = scaled_size(batch.image_size, self.factor)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
            sizes = [scaled_size(size, self.factor) for size in batch.sizes]
        return PreparedBatch(pixels, sizes, (mean, std), [])

    @torch.no_grad()
    def regions(self, found: Observed, *, top_k: int, threshold: float) -> Regions:
        """Its regions, boxes in pixels of the student's batch and logits [R, K + 1] of the student's classes."""
        regions = self.adapter.regions(found.state, top_k=top_k, threshold=threshold, columns=self.columns)
        return regions._replace(boxes=[boxes / self.factor for boxes in regions.boxes])

    @torch.no_grad()
    def logits_at(self, found: Observed, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """[R, K + 1] logits of the student's classes for regions in pixels of the student's batch."""
        return self.adapter.logits_at(found.state, self._own(boxes), self._like(like))[:, self.columns]

    @torch.no_grad()
    def boxes_at(self, found: Observed, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """[R, 4] the boxes that it predicts there, in pixels of the student's batch."""
        return self.adapter.boxes_at(found.state, self._own(boxes), self._like(like)) / self.factor

    @torch.no_grad()
    def anchors(self, found: Observed) -> list[Tensor] | None:
        """Its anchors, in pixels of its own batch."""
        return self.adapter.anchors(found.state)

    @torch.no_grad()
    def everywhere(self, found: Observed) -> tuple[Tensor, Tensor | None]:
        """Of a dense detector: logits [N, A, K + 1] of the student's classes on its anchors, and their quality."""
        adapter: Any = self.adapter
        logits, quality = adapter.everywhere(found.state)
        return logits[..., self.columns], quality

    def _own(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        return [own * self.factor for own in boxes]

    def _like(self, like: Tensor | None) -> Tensor | None:
        """The student's logits over the teacher's classes."""
        if like is None:
            return None
        whole = like.new_full((len(like), self.adapter.outputs), ABSENT)
        whole[:, self.columns] = like
        return whole


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width in pixels, times a factor."""
    return (size[0], size[1]) if factor == 1.0 else (round(size[0] * factor), round(size[1] * factor))


def _equal(one: Any, other: Any) -> bool:
    return all(list(a) == list(b) for a, b in zip(one, other, strict=True))
