"""Where logits of student and teacher are compared, and their values there, whatever the two families are."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pcdistill.detection.detectors.base import (
    Adapter,
    Candidates,
    Observed,
    Pairing,
    Regions,
    StudentPass,
    label_of_boxes,
)
from pcdistill.detection.detectors.dense import Dense, label_of_centres
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.errors import InputError

ROUNDING = 1.5  # pixels by which torchvision rounds the sides of anchors


class PairingOptions(NamedTuple):
    """How regions are chosen.

    Attributes:
        where: "student": its own regions; "teacher": the teacher's; "anchors": those of dense detectors with the same
            anchors that the teacher rates highest; "auto": anchors where they are the same, else the student's regions
            where it has a sample of them and the teacher answers anywhere, else the teacher's.
        top_k: regions of an image at most, where they are not the student's training samples.
        threshold: a region must have this score at least.
        boxes: also give the boxes.
    """

    where: Literal["auto", "student", "teacher", "anchors"] = "auto"
    top_k: int = 100
    threshold: float = 0.0
    boxes: bool = False


class Pairer:
    """Pairs the logits of a student and of a teacher.

    Args:
        student: its adapter.
        teacher: the frozen detector.
        options: where.

    Raises:
        InputError: "anchors" of detectors that have none.
    """

    def __init__(self, student: Adapter, teacher: TeacherDetector, options: PairingOptions) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self._same: bool | None = None
        self.dense = isinstance(student, Dense) and type(teacher.adapter) is type(student)
        if options.where == "anchors" and not self.dense:
            raise InputError(
                f"detection.pairing: a {type(student.model).__name__} and a {type(teacher.model).__name__} have no "
                "anchors in common; leave pairing at auto, or set student or teacher"
            )

    def __call__(self, seen: StudentPass, found: Observed) -> Pairing:
        """The student's logits and the teacher's for the same regions of a batch."""
        where = self.options.where
        if self.dense and where in ("auto", "anchors"):
            if self._anchors_are_equal(seen, found):
                return self._on_anchors(seen, found)
            if where == "anchors":
                raise InputError(
                    "detection.pairing: the anchors of student and teacher are not the same boxes; leave pairing at "
                    "auto, or give both the same anchors and resolution"
                )
        own = where == "student" or (
            where == "auto" and self.student.own_regions and self.teacher.adapter.answers_anywhere
        )
        return self._on_students(seen, found) if own else self._on_teachers(seen, found)

    @property
    def _most(self) -> int:
        """Regions of an image: no more than either detector can be read at."""
        limits = (self.options.top_k, self.student.capacity, self.teacher.adapter.capacity)
        return min(limit for limit in limits if limit is not None)

    def _on_students(self, seen: StudentPass, found: Observed) -> Pairing:
        student, wanted = self.student, self.options.boxes
        regions = student.regions(seen.state, top_k=self._most, threshold=self.options.threshold)
        like = regions.logits.detach()
        theirs = self.teacher.logits_at(found, regions.boxes, like)
        own_boxes = student.boxes_at(seen.state, regions.boxes, theirs) if wanted else None
        their_boxes = self.teacher.boxes_at(found, regions.boxes, like) if wanted else None
        places = student.places(seen, own=True)
        return Pairing(regions.logits, theirs, _labels(regions, seen), places, own_boxes, their_boxes)

    def _on_teachers(self, seen: StudentPass, found: Observed) -> Pairing:
        student = self.student
        regions = self.teacher.regions(found, top_k=self._most, threshold=self.options.threshold)
        own = student.logits_at(seen.state, regions.boxes, regions.logits)
        own_boxes = their_boxes = None
        if self.options.boxes:
            own_boxes = student.boxes_at(seen.state, regions.boxes, regions.logits)
            their_boxes = torch.cat(regions.boxes)
        places = student.places(seen, own=False)
        return Pairing(own, regions.logits, _labels(regions, seen), places, own_boxes, their_boxes)

    def _anchors_are_equal(self, seen: StudentPass, found: Observed) -> bool:
        """Whether anchor number a is the same box in both; looked at once, but for their number."""
        own, theirs = self.student.anchors(seen.state), self.teacher.anchors(found)
        if own is None or theirs is None or own[0].shape != theirs[0].shape:
            return False
        if self._same is None:
            self._same = torch.allclose(own[0] * self.teacher.factor, theirs[0], atol=ROUNDING)
        return self._same

    def _on_anchors(self, seen: StudentPass, found: Observed) -> Pairing:
        """Logits on the teacher's best anchors of each image, which need no search."""
        student, teacher = self.student, self.teacher
        assert isinstance(student, Dense)
        own, _ = student.everywhere(seen.state)
        anchors = student.head_of(seen.state)[1]
        with torch.no_grad():
            logits, quality = teacher.everywhere(found)
            rating = teacher.adapter.rate(logits, quality)
            best, index = rating.topk(min(self.options.top_k, rating.shape[1]), dim=1)
            image, position = (best >= self.options.threshold).nonzero(as_tuple=True)
            place = index[image, position]
            labels = [
                label_of_centres(boxes[place[image == i]], target)
                for i, (boxes, target) in enumerate(zip(anchors, seen.batch.targets, strict=True))
            ]
        own_boxes = their_boxes = None
        if self.options.boxes:
            own_boxes = _picked(student.candidates(seen.state), image, place)
            with torch.no_grad():
                their_boxes = _picked(teacher.adapter.candidates(found.state), image, place) / teacher.factor
        places = student.places(seen, own=False)
        return Pairing(own[image, place], logits[image, place], torch.cat(labels), places, own_boxes, their_boxes)


def _picked(candidates: list[Candidates], image: Tensor, place: Tensor) -> Tensor:
    return torch.cat([found.boxes[place[image == i]] for i, found in enumerate(candidates)])


def _labels(regions: Regions, seen: StudentPass) -> Tensor:
    """The regions' own labels, or those of the true boxes that they show."""
    if regions.labels is not None:
        return regions.labels
    pairs = zip(regions.boxes, seen.batch.targets, strict=True)
    return torch.cat([label_of_boxes(boxes, target) for boxes, target in pairs])
