"""The seam: what the rest of detection asks of a detector. Each family has one adapter, and so may a user's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou, nms

from pcdistill.losses import Pyramid

Target = dict[str, Tensor]
Stats = tuple[Sequence[float], Sequence[float]]
PROBE = 256  # pixels: every stride up to 128 divides it
SAME_OBJECT = 0.5  # IoU of a region and of a true box, as COCO counts them at its loosest
DUPLICATE = 0.7  # IoU of two regions that show the same object
ABSENT = -1e4  # logit of a class that a detector was not asked about


class PreparedBatch(NamedTuple):
    """A batch as one detector's own transform made it.

    Attributes:
        pixels: [N, 3, H, W], normalised and padded with 0 at right and bottom.
        sizes: height and width of each image before padding.
        stats: mean and std per channel that it was normalised with.
        targets: boxes in pixels of the batch; none where none were given.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    stats: Stats
    targets: list[Target]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the padded batch."""
        return self.pixels.shape[2], self.pixels.shape[3]


class Observed(NamedTuple):
    """What a detector shows of a batch.

    Attributes:
        pyramid: its feature maps; without levels, if it has none to show.
        state: what :meth:`Adapter.candidates` and its like read; the adapter alone knows what it is.
    """

    pyramid: Pyramid
    state: Any


class StudentPass(NamedTuple):
    """One pass of the student in training mode.

    Attributes:
        losses: the detector's own, by its library's names; their sum is what the library minimises.
        pyramid: its feature maps.
        batch: the images as its transform made them, with the boxes.
        state: as in :class:`Observed`, with a graph.
    """

    losses: dict[str, Tensor]
    pyramid: Pyramid
    batch: PreparedBatch
    state: Any


class Candidates(NamedTuple):
    """All boxes that a detector considers in one image.

    Attributes:
        boxes: [A, 4] xyxy in pixels of the batch.
        logits: [A, K + 1], background first.
        quality: [A] in 0..1 that scores are multiplied with (FCOS's centreness), or None.
    """

    boxes: Tensor
    logits: Tensor
    quality: Tensor | None = None


class Regions(NamedTuple):
    """Places of the images of a batch where a detector was read.

    Attributes:
        boxes: [R_i, 4] xyxy in pixels of the batch for each image.
        logits: [R, K + 1] of all images in their order, background first.
        scores: [R]: how sure the detector is of an object.
        labels: [R] where they are known; None where not.
    """

    boxes: list[Tensor]
    logits: Tensor
    scores: Tensor
    labels: Tensor | None = None


class Pairing(NamedTuple):
    """Logits of both detectors for the same R regions, background first.

    Attributes:
        student: [R, K + 1].
        teacher: [R, K + 1].
        labels: [R].
        places: the student's tensors that its own losses read and `student` was made from, any shape.
        student_boxes: [R, 4] in pixels of the student's batch, where boxes are distilled.
        teacher_boxes: [R, 4] in the same pixels.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    places: list[Tensor]
    student_boxes: Tensor | None = None
    teacher_boxes: Tensor | None = None


class Adapter(ABC):
    """What distillation asks of a detector; a family implements this once, and nothing else reads its parts.

    A user's own derives from it and implements the abstract methods. `logits_at`, `boxes_at` and `regions` then follow
    from `candidates`. See docs/detection.md, "Your own detector".

    Attributes:
        sigmoid: class logits are sigmoids without a background, in front of which stands a 0.
        own_regions: the student's regions are what its own losses read, whatever the teacher finds.
        answers_anywhere: `logits_at` has an answer for any box, not only for boxes that it found itself.
        capacity: the most regions of an image that it can be read at; None: no limit.

    Args:
        model: the detector; in training or in evaluation mode, as the caller set it.
    """

    sigmoid: ClassVar[bool] = False
    own_regions: ClassVar[bool] = False
    answers_anywhere: ClassVar[bool] = True
    capacity: int | None = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether this adapter is for that model."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """K + 1: the classes and the background."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """Mean and std per channel that its images in 0..1 are normalised with."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side in pixels that its images are scaled to: the shorter one, where their proportion is kept."""

    @abstractmethod
    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> PreparedBatch:
        """Images [3, H, W] in 0..1 and their boxes in its own size and normalisation, padded to one batch."""

    @abstractmethod
    def student_pass(self, images: Sequence[Tensor], targets: Sequence[Target]) -> StudentPass:
        """As the model's own forward in training mode, with what lies between kept."""

    @abstractmethod
    def observe(self, batch: PreparedBatch) -> Observed:
        """What it shows of a batch that is in its normalisation, in the mode that the model is in, without losses."""

    @abstractmethod
    def candidates(self, state: Any) -> list[Candidates]:
        """All that it considers in each image; logits and boxes with a graph, if the state has one."""

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections in images [3, H, W] in 0..1: "boxes" [M, 4] in their pixels, "labels" [M] from 1, "scores" [M]."""
        found: list[dict[str, Tensor]] = self.model(list(images))
        return found

    def places(self, seen: StudentPass, *, own: bool) -> list[Tensor]:
        """The student's tensors that its own losses and the compared logits both come from: there pulls are measured.

        `own` says that the logits are those of its own regions.
        """
        return list(seen.pyramid.levels)

    def anchors(self, state: Any) -> list[Tensor] | None:
        """Boxes [A, 4] of each image that number a of another detector of the kind may share; None: it has none."""
        return None

    def regions(self, state: Any, *, top_k: int, threshold: float, columns: Tensor | None = None) -> Regions:
        """The `top_k` candidates of each image with the highest scores, each object once, if they reach `threshold`.

        Args:
            state: of a pass or an observation.
            top_k: of each image.
            threshold: lowest score in 0..1.
            columns: [K' + 1] which logits count, 0 (the background) first; None: all.
        """
        boxes, logits, scores = [], [], []
        for found in self.candidates(state):
            own = found.logits if columns is None else found.logits[:, columns]
            rating = self.rate(own, found.quality)
            with torch.no_grad():
                best = rating.topk(min(20 * top_k, len(rating))).indices
                best = best[nms(found.boxes[best].float(), rating[best], DUPLICATE)]
                best = best[:top_k]
                best = best[rating[best] >= threshold]
            boxes.append(found.boxes[best].detach())
            logits.append(own[best])
            scores.append(rating[best])
        return Regions(boxes, torch.cat(logits), torch.cat(scores))

    def rate(self, logits: Tensor, quality: Tensor | None = None) -> Tensor:
        """[...] how sure logits [..., K + 1] are of an object; with a quality, the geometric mean of both."""
        best = self.shares(logits.detach().float()).amax(dim=-1)
        return best if quality is None else (best * quality.detach().float()).sqrt()

    def shares(self, logits: Tensor) -> Tensor:
        """[..., K] probabilities of the classes as the detector itself reads its logits [..., K + 1]."""
        return logits[..., 1:].sigmoid() if self.sigmoid else logits.softmax(dim=-1)[..., 1:]

    def choose(self, state: Any, boxes: Sequence[Tensor], like: Tensor | None = None) -> list[Tensor]:
        """For each region the number of the candidate that stands for it: the one that overlaps it most.

        Args:
            state: of a pass or an observation.
            boxes: [R_i, 4] of each image, in pixels of the batch.
            like: [R, K + 1] what the other detector says of them, for a matching by class.

        Returns:
            [R_i] for each image.
        """
        return [overlapping_most(found.boxes, own) for found, own in zip(self.candidates(state), boxes, strict=True)]

    def logits_at(self, state: Any, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """[R, K + 1] logits, background first, for regions of each image; arguments as :meth:`choose`."""
        chosen = self.choose(state, boxes, like)
        return torch.cat([f.logits[index] for f, index in zip(self.candidates(state), chosen, strict=True)])

    def boxes_at(self, state: Any, boxes: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """[R, 4] boxes that it predicts for regions of each image; arguments as :meth:`choose`."""
        chosen = self.choose(state, boxes, like)
        return torch.cat([f.boxes[index] for f, index in zip(self.candidates(state), chosen, strict=True)])


@torch.no_grad()
def overlapping_most(boxes: Tensor, wanted: Tensor) -> Tensor:
    """[R] which of boxes [A, 4] overlaps each wanted one [R, 4] most; without any overlap, the nearest by GIoU."""
    boxes, wanted = boxes.detach().float(), wanted.detach().float()
    if len(wanted) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    best, index = _overlap(wanted, boxes).max(dim=1)
    alone = best == 0
    if bool(alone.any()):
        nearness = torch.nan_to_num(generalized_box_iou(wanted[alone], boxes), nan=-1.0)
        index[alone] = nearness.argmax(dim=1)
    return index


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """IoU of boxes [R, 4] and [A, 4]; 0, and not 0 / 0, for those without area, as a fresh FCOS makes them."""
    return torch.nan_to_num(box_iou(one.float(), other.float()), nan=0.0)


def label_of_boxes(boxes: Tensor, target: Target) -> Tensor:
    """[R] labels of the true boxes that boxes [R, 4] overlap most, by an IoU of at least 0.5; else 0."""
    if len(target["boxes"]) == 0 or len(boxes) == 0:
        return target["labels"].new_zeros(len(boxes))
    best, index = _overlap(boxes, target["boxes"]).max(dim=1)
    return torch.where(best >= SAME_OBJECT, target["labels"][index], torch.zeros_like(index))


class TorchvisionAdapter(Adapter):
    """What torchvision's detectors share: a transform, a backbone that gives maps by name, and strides."""

    @property
    def stats(self) -> Stats:
        return self.model.transform.image_mean, self.model.transform.image_std

    @property
    def image_size(self) -> int:
        fixed = self.model.transform.fixed_size
        return int(self.model.transform.min_size[-1] if fixed is None else min(fixed))

    @cached_property
    def strides(self) -> list[int]:
        return pyramid_strides(self.model)

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> PreparedBatch:
        batch, resized = self.model.transform(list(images), None if targets is None else list(targets))
        return PreparedBatch(batch.tensors, batch.image_sizes, self.stats, resized or [])

    def features(self, batch: PreparedBatch) -> tuple[dict[str, Tensor], Pyramid]:
        """The backbone's maps by name, and as the losses take them."""
        maps: dict[str, Tensor] = self.model.backbone(batch.pixels)
        return maps, Pyramid(list(maps.values()), list(self.strides), batch.image_size)


@torch.no_grad()
def pyramid_strides(model: Any) -> list[int]:
    """Image pixels per cell of every level of a detector's pyramid, found with one blank image in eval mode.

    Where a map's side does not divide the image's, as in SSD, it is the nearest power of two.
    """
    known = getattr(model.backbone, "strides", None)
    if known is not None:
        return list(known)
    modes = {module: module.training for module in model.backbone.modules()}
    model.backbone.eval()
    side = PROBE if model.transform.fixed_size is None else model.transform.fixed_size[0]
    features = model.backbone(torch.zeros(1, 3, side, side, device=next(model.backbone.parameters()).device))
    for module, mode in modes.items():
        module.training = mode
    ratios = torch.tensor([side / level.shape[2] for level in features.values()])
    return [int(stride) for stride in 2 ** ratios.log2().round()]
