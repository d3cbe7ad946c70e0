"""RetinaNet and FCOS: logits are compared on the anchors, or points, that the teacher rates highest."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.models import detection as zoo
from torchvision.models.detection.image_list import ImageList

from pcdistill.detection.detectors.base import Pairing, StudentPass, Target, pyramid_of, pyramid_strides
from pcdistill.errors import InputError
from pcdistill.losses import Pyramid

if TYPE_CHECKING:
    from pcdistill.detection.teacher import TeacherDetector


class Dense:
    """RetinaNet and FCOS. Logits are paired on the anchors, or points, that the teacher rates highest in each image.

    A teacher's rating is its highest class probability, for FCOS the geometric mean of it and the centreness, as the
    detector itself scores boxes. The classes of these detectors are sigmoids without a background; the losses here are
    made for a softmax. Each class logit z_k is what its sigmoid compares with 0, so a background logit of 0 is put in
    front (our choice): softmax(0, z_1, ..., z_K) is the sigmoid itself for one class, and keeps how sure a detector is
    that there is anything, which a softmax over z_1..z_K alone would drop. Labels, for losses that want them, are those
    of the smallest true box around the anchor's centre, else background.

    Args:
        model: a torchvision RetinaNet or FCOS.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.strides = pyramid_strides(model)
        self.outputs = int(model.head.classification_head.num_classes)

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        """As the model's own forward in training mode, with what lies between kept."""
        model = self.model
        batch, resized = model.transform(list(images), list(targets))
        features = model.backbone(batch.tensors)
        levels = list(features.values())
        outputs = model.head(levels)
        anchors = model.anchor_generator(batch, levels)
        per_level = ([x.shape[2] * x.shape[3] for x in levels],) if isinstance(model, zoo.FCOS) else ()
        losses = model.compute_loss(resized, outputs, anchors, *per_level)
        return StudentPass(losses, self.pyramid(features, batch), batch, resized, (outputs["cls_logits"], anchors))

    def pyramid(self, features: Mapping[str, Tensor], batch: ImageList) -> Pyramid:
        return pyramid_of(features, self.strides, batch)

    def pair(
        self,
        seen: StudentPass,
        teacher: "TeacherDetector",
        features: Mapping[str, Tensor],
        *,
        top_k: int = 100,
        threshold: float = 0.0,
    ) -> Pairing:
        """Logits on the teacher's best `top_k` anchors of each image, those that it rates `threshold` at least."""
        own, anchors = seen.raw
        with torch.no_grad():
            outputs = teacher.adapter.model.head(list(features.values()))
            everywhere = with_background(outputs["cls_logits"], teacher.columns)
            if everywhere.shape[1] != own.shape[1]:
                raise InputError(_misfit(own.shape[1], everywhere.shape[1]))
            rating = everywhere[:, :, 1:].sigmoid().amax(dim=2)
            if "bbox_ctrness" in outputs:
                rating = (rating * outputs["bbox_ctrness"].squeeze(2).sigmoid()).sqrt()
            best, index = rating.topk(min(top_k, rating.shape[1]), dim=1)
            image, position = (best >= threshold).nonzero(as_tuple=True)
            place = index[image, position]
            labels = [
                label_of_centres(boxes[place[image == i]], target)
                for i, (boxes, target) in enumerate(zip(anchors, seen.targets, strict=True))
            ]
        student = with_background(own[image, place], torch.arange(own.shape[2], device=own.device))
        return Pairing(student, everywhere[image, place], torch.cat(labels), own)

    def check_pair(self, teacher: "TeacherDetector", images: Sequence[Tensor]) -> None:
        """Raise unless anchor number a is the same box in both detectors."""
        with torch.no_grad():
            batch, _ = self.model.transform(list(images), None)
            own = self._anchors(batch)
            inner = teacher.adapter.model
            theirs = teacher.adapter._anchors(ImageList(teacher.prepare(batch), batch.image_sizes))
        if own.shape != theirs.shape:
            raise InputError(_misfit(len(own), len(theirs)))
        if not torch.allclose(own * teacher.factor, theirs, atol=1.5):  # torchvision rounds sides to whole pixels
            raise InputError(
                f"the anchors of the student and of the teacher ({type(inner).__name__}) are not the same boxes, so "
                "their logits cannot be compared; give both the same anchors, or use a loss on features"
            )

    def _anchors(self, batch: ImageList) -> Tensor:
        """The anchors of the first image, [A, 4]."""
        was_training = self.model.training
        self.model.eval()
        anchors: Tensor = self.model.anchor_generator(batch, list(self.model.backbone(batch.tensors).values()))[0]
        self.model.train(was_training)
        return anchors


def with_background(logits: Tensor, columns: Tensor) -> Tensor:
    """A dense head's class logits [..., K + 1], whose column 0 no label uses, as [..., K + 1] with 0 for background."""
    chosen = logits[..., columns[1:]]
    return torch.cat([torch.zeros_like(chosen[..., :1]), chosen], dim=-1)


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


def _misfit(own: int, theirs: int) -> str:
    return (
        f"the student has {own} anchors on an image and the teacher {theirs}, so their logits cannot be compared; take "
        "a teacher of the same family, anchors and resolution, or a loss on features"
    )
