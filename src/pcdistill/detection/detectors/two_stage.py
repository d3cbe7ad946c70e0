"""Faster R-CNN: logits are compared on the student's proposals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from pcdistill.detection.detectors.base import Pairing, StudentPass, Target, pyramid_of, pyramid_strides, scaled_size
from pcdistill.losses import Pyramid

if TYPE_CHECKING:
    from pcdistill.detection.teacher import TeacherDetector


class TwoStage:
    """Faster R-CNN. Logits are paired on the student's proposals.

    The regions are the student's training samples: its proposals and the true boxes, sampled with their share of
    foreground as for its own loss. They are pooled from both pyramids and go through both RoI heads, which gives
    [R, K + 1] logits, background first; boxes are not distilled.

    Args:
        model: a torchvision FasterRCNN.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.strides = pyramid_strides(model)
        self.outputs = int(model.roi_heads.box_predictor.cls_score.out_features)

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        """As the model's own forward in training mode, with what lies between kept."""
        model = self.model
        batch, resized = model.transform(list(images), list(targets))
        features = model.backbone(batch.tensors)
        proposals, losses = model.rpn(batch, features, resized)
        proposals, _, labels, wanted = model.roi_heads.select_training_samples(proposals, resized)
        logits, boxes = self._heads(features, proposals, batch.image_sizes)
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, boxes, labels, wanted)
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, **losses}
        return StudentPass(
            losses, self.pyramid(features, batch), batch, resized, (logits, proposals, torch.cat(labels))
        )

    def pyramid(self, features: Mapping[str, Tensor], batch: ImageList) -> Pyramid:
        return pyramid_of(features, self.strides, batch)

    def pair(self, seen: StudentPass, teacher: "TeacherDetector", features: Mapping[str, Tensor], **_: Any) -> Pairing:
        """The student's logits and the teacher's on the same proposals."""
        logits, proposals, labels = seen.raw
        with torch.no_grad():
            scaled = [boxes * teacher.factor for boxes in proposals]
            sizes = [scaled_size(size, teacher.factor) for size in seen.batch.image_sizes]
            wanted = teacher.adapter._heads(features, scaled, sizes)[0][:, teacher.columns]
        return Pairing(logits, wanted, labels, logits)

    def check_pair(self, teacher: "TeacherDetector", images: Sequence[Tensor]) -> None:
        """Two-stage detectors can always be paired: any region can be pooled from any pyramid."""

    def _heads(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(features, proposals, sizes)
        logits, boxes = heads.box_predictor(heads.box_head(pooled))
        return logits, boxes
