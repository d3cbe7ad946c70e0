"""The distiller for detectors: student + teacher + objective, one pass that returns a dict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.base import Adapter, Pairing, StudentPass
from pcdistill.detection.detectors.pairing import Pairer, PairingOptions
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.objective import Objective, Pull, Term
from pcdistill.engine.modes import KeepsModes
from pcdistill.errors import InputError
from pcdistill.losses._pyramid import Pyramid


class Compared(NamedTuple):
    """What the terms of a detector's objective look at; None where no term asks for it."""

    seen: StudentPass
    pairing: Pairing | None
    teacher_pyramid: Pyramid | None


class DetectionObjective(Objective):
    """Weighted sum of the detector's own losses, losses on paired logits and on boxes, and losses on feature pyramids.

    Args:
        terms: as of every objective.
        boxes: how the boxes of paired regions are compared: "none", "l1" or "giou"; see :func:`box_loss`.
        boxes_weight: the factor of that.
    """

    def __init__(self, terms: Sequence[Term], *, boxes: str = "none", boxes_weight: float = 1.0) -> None:
        super().__init__(terms)
        self.boxes, self.boxes_weight = boxes, boxes_weight

    @property
    def needs_pairing(self) -> bool:
        """Whether a term compares logits, or boxes are compared."""
        return self.boxes != "none" or any(term.kind == "logits" for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return self.boxes != "none" or super().needs_teacher

    @property
    def needs_pyramid(self) -> bool:
        """Whether a term compares feature pyramids."""
        return any(term.kind == "pyramids" and not term.needs.own_losses for term in self.terms)

    def forward(
        self, student: Any, teacher: Any = None, target: Any = None, labelled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sum the terms.

        Args:
            student: a :class:`Compared`.
            teacher: not used: what a term compares with is in the Compared.
            target: the boxes in pixels of the student's batch, one mapping per image.
            labelled: not used: all images have their boxes.

        Returns:
            "loss" with a graph, "loss/NAME" of every term, unweighted and detached, and the detector's own losses.
        """
        seen, pairing, pyramid = student

        def value_of(term: Term) -> Tensor:
            labels = term.needs.labels
            if term.needs.own_losses:
                value: Tensor = term.loss(seen.losses)
            elif term.kind == "pyramids":
                value = term.loss(seen.pyramid, pyramid, target if labels else None)
            else:
                value = term.loss(pairing.student, pairing.teacher, pairing.labels if labels else None)
            return value

        def places_of(term: Term) -> list[Tensor]:
            return pairing.places if term.kind == "logits" else list(seen.pyramid.levels)

        def labels_alone() -> Tensor:
            return torch.stack(list(seen.losses.values())).sum()

        own = {f"loss/{name.removeprefix('loss_')}": value.detach() for name, value in seen.losses.items()}
        result = {**self.weigh(value_of, Pull(places_of, labels_alone)), **own}
        if self.boxes != "none":
            value = box_loss(pairing, self.boxes, seen.batch.image_size)
            result.update({"loss": result["loss"] + self.boxes_weight * value, "loss/boxes": value.detach()})
        return result


def box_loss(pairing: Pairing, kind: str, image_size: tuple[int, int]) -> Tensor:
    """Distance of the student's boxes from the teacher's, as set prediction measures it against true boxes.

        l1: sum of |b_s - b_t| over the four sides, in shares of the image    giou: 1 - GIoU(b_s, b_t)

    Each region weighs as much as the teacher is sure that there is an object: 1 - its probability of background.

    Args:
        pairing: with boxes [R, 4] of both.
        kind: "l1" or "giou".
        image_size: height and width of the padded batch in pixels.

    Returns:
        Scalar, the weighted mean over the regions; 0 with a graph, if there are none.
    """
    student, teacher = pairing.student_boxes, pairing.teacher_boxes
    assert student is not None
    assert teacher is not None
    weights = 1 - pairing.teacher.float().softmax(dim=1)[:, 0]
    sides = student.new_tensor([image_size[1], image_size[0]] * 2).float()
    own, wanted = student.float() / sides, teacher.detach().float() / sides
    each = (own - wanted).abs().sum(dim=1) if kind == "l1" else generalized_box_iou_loss(own, wanted)
    return (weights * each).sum() / weights.sum().clamp(min=1e-6)


class DetectionDistiller(KeepsModes):
    """Turns images and boxes into `{"loss", "loss/NAME"...}`; the loop only calls backward.

    The teacher is no submodule: it is in no state dict, no optimiser, and no distributed wrapper.

    Args:
        student: a detector that :func:`adapter_of` knows.
        objective: the weighted terms; its parameters (adapters, generators) are trained with the student.
        teacher: None trains the student alone.
        pairing: where logits are compared.

    Raises:
        InputError: a term that needs a teacher without one; anchors to compare on, of detectors that have none.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: DetectionObjective,
        teacher: TeacherDetector | None = None,
        pairing: PairingOptions | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and (objective.needs_pairing or objective.needs_pyramid):
            raise InputError(f"the terms {', '.join(objective.names)} need a teacher; name one, or use method none")
        self.student = student
        self.objective = objective
        adapter = adapter_of(student)
        pairer = None
        if teacher is not None and objective.needs_pairing:
            options = (pairing or PairingOptions())._replace(boxes=objective.boxes != "none")
            pairer = Pairer(adapter, teacher, options)
        self._hidden = (teacher, adapter, pairer)  # a tuple: nn.Module registers nothing of it
        self.watched: dict[str, Tensor] = {}  # of the last pass: a sum over each model's maps and logits

    @property
    def teacher(self) -> TeacherDetector | None:
        return self._hidden[0]

    @property
    def adapter(self) -> Adapter:
        return self._hidden[1]

    def compare(self, batch: DetectionBatch) -> Compared:
        """One pass of the student in training mode, and what the terms need of the teacher on the same batch."""
        teacher, adapter, pairer = self._hidden
        seen = adapter.student_pass(batch.images, batch.targets)
        if teacher is None or not self.objective.needs_teacher:
            return Compared(seen, None, None)
        found = teacher.observe(seen.batch)
        pyramid = found.pyramid if self.objective.needs_pyramid else None
        return Compared(seen, None if pairer is None else pairer(seen, found), pyramid)

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """One pass: "loss" (scalar with a graph) and "loss/NAME" (detached, unweighted)."""
        found = self.compare(batch)
        self.watched = _sums(found)
        result: dict[str, Tensor] = self.objective(found, None, found.seen.batch.targets)
        return result


def _sums(found: Compared) -> dict[str, Tensor]:
    """ "watch/student" and "watch/teacher": finite if the maps and logits that the terms compare are."""
    pairing, pyramid = found.pairing, found.teacher_pyramid
    shown = {
        "student": [*found.seen.pyramid.levels, *(() if pairing is None else (pairing.student,))],
        "teacher": [*(() if pyramid is None else pyramid.levels), *(() if pairing is None else (pairing.teacher,))],
    }
    return {
        f"watch/{who}": torch.stack([values.detach().float().sum() for values in parts]).sum()
        for who, parts in shown.items()
        if parts
    }
