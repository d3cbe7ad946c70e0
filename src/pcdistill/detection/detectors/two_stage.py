"""Faster R-CNN: logits of any region are pooled from the pyramid."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection as zoo
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import clip_boxes_to_image

from pcdistill.detection.detectors.base import (
    Candidates,
    Observed,
    PreparedBatch,
    Regions,
    StudentPass,
    Target,
    TorchvisionAdapter,
)


class Sampled(NamedTuple):
    """The regions that a student's own losses read: boxes per image, logits [R, K + 1], offsets, labels [R]."""

    boxes: list[Tensor]
    logits: Tensor
    offsets: Tensor
    labels: Tensor


class TwoStageState(NamedTuple):
    """The backbone's maps by name, the batch that they were made of, and a student's training samples."""

    features: Mapping[str, Tensor]
    batch: PreparedBatch
    sampled: Sampled | None = None


class TwoStage(TorchvisionAdapter):
    """Faster R-CNN. As a student it is compared on its training samples.

    These are its proposals and the true boxes, sampled with their share of foreground as for its own loss. As a teacher
    it pools any region from its pyramid and puts it through its RoI heads: [R, K + 1] logits, background first.

    Args:
        model: a torchvision FasterRCNN.
    """

    own_regions = True

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, zoo.FasterRCNN)

    @property
    def outputs(self) -> int:
        return int(self.model.roi_heads.box_predictor.cls_score.out_features)

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        model = self.model
        batch = self.prepare(images, targets)
        features, pyramid = self.features(batch)
        proposals, losses = model.rpn(ImageList(batch.pixels, batch.sizes), features, batch.targets)
        proposals, _, labels, wanted = model.roi_heads.select_training_samples(proposals, batch.targets)
        logits, offsets = self._heads(features, proposals, batch.sizes)
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, offsets, labels, wanted)
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, **losses}
        sampled = Sampled(proposals, logits, offsets, torch.cat(labels))
        return StudentPass(losses, pyramid, batch, TwoStageState(features, batch, sampled))

    def observe(self, batch: PreparedBatch) -> Observed:
        features, pyramid = self.features(batch)
        return Observed(pyramid, TwoStageState(features, batch))

    def places(self, seen: StudentPass, *, own: bool) -> list[Tensor]:
        """The logits of its own regions; on the teacher's regions, which its own losses do not read, the pyramid."""
        return [seen.state.sampled.logits] if own else super().places(seen, own=own)

    def regions(self, state: TwoStageState, *, top_k: int, threshold: float, columns: Tensor | None = None) -> Regions:
        """A student's training samples, all of them; else as every detector's."""
        if state.sampled is None:
            return super().regions(state, top_k=top_k, threshold=threshold, columns=columns)
        boxes, logits, _, labels = state.sampled
        return Regions(boxes, logits, self.rate(logits), labels)

    def candidates(self, state: TwoStageState) -> list[Candidates]:
        """What its proposals become: for each the box of its best class."""
        with torch.no_grad():
            model, batch = self.model, state.batch
            proposals, _ = model.rpn(ImageList(batch.pixels, batch.sizes), state.features)
        logits, offsets = self._heads(state.features, proposals, batch.sizes)
        boxes = self._moved(proposals, offsets, logits, batch.sizes)
        counts = [len(own) for own in proposals]
        return [Candidates(b, z) for b, z in zip(boxes.split(counts), logits.split(counts), strict=True)]

    def logits_at(self, state: TwoStageState, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        return self._heads(state.features, list(boxes), state.batch.sizes)[0]

    def boxes_at(self, state: TwoStageState, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """The regions moved by the offsets of the class that the other detector, or else this one, rates highest."""
        sampled = state.sampled
        if sampled is not None and boxes is sampled.boxes:
            logits, offsets = sampled.logits, sampled.offsets
        else:
            logits, offsets = self._heads(state.features, list(boxes), state.batch.sizes)
        return self._moved(list(boxes), offsets, logits if like is None else like, state.batch.sizes)

    def _heads(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        logits, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
        return logits, offsets

    def _moved(self, boxes: list[Tensor], offsets: Tensor, logits: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """[R, 4] boxes after the offsets [R, 4 (K + 1)] of the class with the highest of logits [R, K + 1]."""
        moved = self.model.roi_heads.box_coder.decode(offsets, boxes)  # [R, K + 1, 4]
        best = logits[:, 1:].detach().argmax(dim=1) + 1
        own = moved[torch.arange(len(best), device=best.device), best]
        parts = own.split([len(one) for one in boxes])
        return torch.cat([clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)])
