"""RetinaNet, FCOS and SSD: every anchor, or point, is a candidate with a box and logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as zoo
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image

from pcdistill.detection.detectors.base import (
    Candidates,
    Observed,
    PreparedBatch,
    StudentPass,
    Target,
    TorchvisionAdapter,
)


@dataclass
class DenseState:
    """Maps of a batch, and what the head makes of them, which is computed when it is first asked for.

    Attributes:
        levels: the backbone's maps.
        batch: what they were made of.
        outputs: "cls_logits" [N, A, ...], "bbox_regression" [N, A, 4] and, of FCOS, "bbox_ctrness" [N, A, 1].
        anchors: [A, 4] for each image.
    """

    levels: list[Tensor]
    batch: PreparedBatch
    outputs: dict[str, Tensor] | None = None
    anchors: list[Tensor] | None = None


class Dense(TorchvisionAdapter):
    """RetinaNet and FCOS. Of detectors with the same anchors those are compared that the teacher rates highest.

    A teacher's rating is its highest class probability, for FCOS the geometric mean of it and the centreness, as the
    detector itself scores boxes. The classes of these detectors are sigmoids without a background; the losses here are
    made for a softmax. Each class logit z_k is what its sigmoid compares with 0, so a background logit of 0 is put in
    front (our choice): softmax(0, z_1, ..., z_K) is the sigmoid itself for one class, and keeps how sure a detector is
    that there is anything, which a softmax over z_1..z_K alone would drop. Labels, for losses that want them, are those
    of the smallest true box around the anchor's centre, else background.

    Args:
        model: a torchvision RetinaNet or FCOS.
    """

    sigmoid = True

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, zoo.RetinaNet | zoo.FCOS)

    @property
    def outputs(self) -> int:
        return int(self.model.head.classification_head.num_classes)

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        batch = self.prepare(images, targets)
        features, pyramid = self.features(batch)
        state = DenseState(list(features.values()), batch)
        outputs, anchors = self.head_of(state)
        return StudentPass(self.losses_of(batch.targets, outputs, anchors, state.levels), pyramid, batch, state)

    def losses_of(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        """The library's own losses."""
        per_level = ([x.shape[2] * x.shape[3] for x in levels],) if isinstance(self.model, zoo.FCOS) else ()
        losses: dict[str, Tensor] = self.model.compute_loss(targets, outputs, anchors, *per_level)
        return losses

    def observe(self, batch: PreparedBatch) -> Observed:
        features, pyramid = self.features(batch)
        return Observed(pyramid, DenseState(list(features.values()), batch))

    def places(self, seen: StudentPass, *, own: bool) -> list[Tensor]:
        return [self.head_of(seen.state)[0]["cls_logits"]]

    def anchors(self, state: DenseState) -> list[Tensor]:
        return self.head_of(state)[1]

    def head_of(self, state: DenseState) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the head gives, and the anchors of each image."""
        if state.outputs is None or state.anchors is None:
            state.outputs = self.model.head(state.levels)
            images = ImageList(state.batch.pixels, state.batch.sizes)
            state.anchors = self.model.anchor_generator(images, state.levels)
        return state.outputs, state.anchors

    def everywhere(self, state: DenseState) -> tuple[Tensor, Tensor | None]:
        """Logits [N, A, K + 1] of all anchors, background first, and their quality [N, A]."""
        outputs = self.head_of(state)[0]
        quality = outputs["bbox_ctrness"].squeeze(2).sigmoid() if "bbox_ctrness" in outputs else None
        return self.as_softmax(outputs["cls_logits"]), quality

    def as_softmax(self, logits: Tensor) -> Tensor:
        """The head's class logits with those of the background first."""
        return with_background(logits)

    def candidates(self, state: DenseState) -> list[Candidates]:
        outputs, anchors = self.head_of(state)
        logits, quality = self.everywhere(state)
        coder = self.model.box_coder
        decode: Any = coder.decode if isinstance(self.model, zoo.FCOS) else coder.decode_single
        found = []
        for i, (own, size) in enumerate(zip(anchors, state.batch.sizes, strict=True)):
            boxes = clip_boxes_to_image(decode(outputs["bbox_regression"][i], own), size)
            found.append(Candidates(boxes, logits[i], None if quality is None else quality[i]))
        return found


class SSD(Dense):
    """SSD and SSDLite, whose head has a softmax with the background first.

    Args:
        model: a torchvision SSD.
    """

    sigmoid = False

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, zoo.ssd.SSD)

    @property
    def outputs(self) -> int:
        return int(self.model.head.classification_head.num_columns)

    def as_softmax(self, logits: Tensor) -> Tensor:
        return logits

    def losses_of(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        """The library's own losses, with the matching that its forward does."""
        matched = [
            self.model.proposal_matcher(box_iou(target["boxes"], boxes))
            if len(target["boxes"])
            else torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
            for boxes, target in zip(anchors, targets, strict=True)
        ]
        losses: dict[str, Tensor] = self.model.compute_loss(targets, outputs, anchors, matched)
        return losses


def with_background(logits: Tensor) -> Tensor:
    """A sigmoid head's class logits [..., K + 1], whose column 0 no label uses, with 0 there for the background."""
    return torch.cat([torch.zeros_like(logits[..., :1]), logits[..., 1:]], dim=-1)


def label_of_centres(anchors: Tensor, target: Target) -> Tensor:
    """[R] labels of the smallest true boxes around the centres of anchors [R, 4]; 0 outside of all."""
    boxes, labels = target["boxes"], target["labels"]
    if len(boxes) == 0:
        return labels.new_zeros(len(anchors))
    centres = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2
    inside = ((centres > boxes[None, :, :2]) & (centres < boxes[None, :, 2:])).all(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand_as(inside).masked_fill(~inside, torch.inf)
    smallest = area.argmin(dim=1)
    return torch.where(inside.any(dim=1), labels[smallest], torch.zeros_like(smallest))
