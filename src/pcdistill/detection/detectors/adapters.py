"""What a distiller needs of torchvision's detectors: one pass of the student, one of the teacher, over the same images.

The student's own transform resizes, normalises and pads the images; the teacher is given that very batch, only with the
normalisation exchanged for its own where they differ. So both see the same pixels at the same places, proposals and
boxes mean the same in both, and nothing is resized twice. A teacher that wants another resolution gets the batch
interpolated, and the proposals scaled, by the ratio of the two sides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection as zoo
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from pcdistill.distillation.teacher import align_classes
from pcdistill.errors import InputError
from pcdistill.losses._pyramid import Pyramid

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
        return _pyramid(features, self.strides, batch)

    def pair(self, seen: StudentPass, teacher: "TeacherDetector", features: Mapping[str, Tensor], **_: Any) -> Pairing:
        """The student's logits and the teacher's on the same proposals."""
        logits, proposals, labels = seen.raw
        with torch.no_grad():
            scaled = [boxes * teacher.factor for boxes in proposals]
            sizes = [_scaled_size(size, teacher.factor) for size in seen.batch.image_sizes]
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
        return _pyramid(features, self.strides, batch)

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


Adapter = TwoStage | Dense


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter for a detector.

    Raises:
        InputError: it is none of torchvision's FasterRCNN, RetinaNet and FCOS, or predicts masks or keypoints too.
    """
    if isinstance(model, zoo.FasterRCNN):
        if model.roi_heads.has_mask() or model.roi_heads.has_keypoint():
            raise InputError(
                f"{type(model).__name__} predicts more than boxes; only detectors of boxes can be distilled"
            )
        return TwoStage(model)
    if isinstance(model, zoo.RetinaNet | zoo.FCOS):
        return Dense(model)
    raise InputError(
        f"{type(model).__name__} is not a detector that can be distilled; it must be torchvision's FasterRCNN, "
        "RetinaNet or FCOS"
    )


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
            size = _scaled_size((images.shape[2], images.shape[3]), self.factor)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return images


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


def _pyramid(features: Mapping[str, Tensor], strides: list[int], batch: ImageList) -> Pyramid:
    return Pyramid(list(features.values()), strides, (batch.tensors.shape[2], batch.tensors.shape[3]))


def _scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return (size[0], size[1]) if factor == 1.0 else (round(size[0] * factor), round(size[1] * factor))


def _misfit(own: int, theirs: int) -> str:
    return (
        f"the student has {own} anchors on an image and the teacher {theirs}, so their logits cannot be compared; take "
        "a teacher of the same family, anchors and resolution, or a loss on features"
    )
