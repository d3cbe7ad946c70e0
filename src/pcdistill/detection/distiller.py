"""The distiller for detectors: student + teacher + objective, one pass that returns a dict."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.base import Adapter, Pairing, StudentPass
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.objective import Objective, Pull, Term
from pcdistill.errors import InputError
from pcdistill.losses._pyramid import Pyramid


class Compared(NamedTuple):
    """What the terms of a detector's objective look at; None where no term asks for it."""

    seen: StudentPass
    pairing: Pairing | None
    teacher_pyramid: Pyramid | None


class DetectionObjective(Objective):
    """Weighted sum of the detector's own losses, losses on paired logits and losses on feature pyramids."""

    @property
    def needs_pairing(self) -> bool:
        """Whether a term compares logits."""
        return any(term.kind == "logits" for term in self.terms)

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
            return [pairing.place] if term.kind == "logits" else list(seen.pyramid.levels)

        def labels_alone() -> Tensor:
            return torch.stack(list(seen.losses.values())).sum()

        own = {f"loss/{name.removeprefix('loss_')}": value.detach() for name, value in seen.losses.items()}
        return {**self.weigh(value_of, Pull(places_of, labels_alone)), **own}


class DetectionDistiller(nn.Module):
    """Turns images and boxes into `{"loss", "loss/NAME"...}`; the loop only calls backward.

    The teacher is no submodule: it is in no state dict, no optimiser, and no distributed wrapper.

    Args:
        student: a torchvision FasterRCNN, RetinaNet or FCOS.
        objective: the weighted terms; its parameters (adapters, generators) are trained with the student.
        teacher: None trains the student alone.
        top_k: dense detectors compare logits on so many anchors of an image, those that the teacher rates highest.
        threshold: and only where it rates them at least this.

    Raises:
        InputError: a term that needs a teacher without one; logits of detectors that cannot be paired.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: DetectionObjective,
        teacher: TeacherDetector | None = None,
        *,
        top_k: int = 100,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if teacher is None and (objective.needs_pairing or objective.needs_pyramid):
            raise InputError(f"the terms {', '.join(objective.names)} need a teacher; name one, or use method none")
        self.student = student
        self.objective = objective
        adapter = adapter_of(student)
        if teacher is not None and objective.needs_pairing and type(teacher.adapter) is not type(adapter):
            raise InputError(
                f"logits of a {type(teacher.model).__name__} and of a {type(student).__name__} cannot be compared: one "
                "has regions and the other anchors; use a loss on features (dfmsd, pkd, ...), or a teacher of its kind"
            )
        self._top_k, self._threshold = top_k, threshold
        self._hidden = (teacher, adapter)  # a tuple: nn.Module registers nothing of it

    @property
    def teacher(self) -> TeacherDetector | None:
        return self._hidden[0]

    @property
    def adapter(self) -> Adapter:
        return self._hidden[1]

    def compare(self, batch: DetectionBatch) -> Compared:
        """One pass of the student in training mode, and what the terms need of the teacher on the same batch."""
        teacher, adapter = self._hidden
        seen = adapter.student_pass(batch.images, batch.targets)
        if teacher is None or not self.objective.needs_teacher:
            return Compared(seen, None, None)
        features = teacher.features(seen.batch)
        pyramid = teacher.adapter.pyramid(features, seen.batch) if self.objective.needs_pyramid else None
        pairing = None
        if self.objective.needs_pairing:
            pairing = adapter.pair(seen, teacher, features, top_k=self._top_k, threshold=self._threshold)
        return Compared(seen, pairing, pyramid)

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """One pass: "loss" (scalar with a graph) and "loss/NAME" (detached, unweighted)."""
        found = self.compare(batch)
        result: dict[str, Tensor] = self.objective(found, None, found.seen.targets)
        return result
