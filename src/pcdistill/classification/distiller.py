"""The distiller for classifiers: student + teacher + objective, one forward pass that returns a dict."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pcdistill.classification.metrics import count_correct
from pcdistill.data.loader import Batch
from pcdistill.distillation.objective import Objective
from pcdistill.distillation.teacher import Teacher, TeacherEnsemble, logits_of
from pcdistill.engine.modes import KeepsModes
from pcdistill.errors import InputError


class ClassificationDistiller(KeepsModes):
    """Turns a batch into `{"loss", "loss/NAME"..., "logits", "sum/NAME"...}`; the loop only calls backward and adds up.

    The teacher is no submodule: it is in no state dict, no optimiser, and no distributed wrapper.

    Args:
        student: images [N, C, H, W] -> logits [N, K].
        objective: the weighted terms; its parameters are trained with the student.
        teacher: None trains the student alone.
        student_taps: images, positions in the data set -> the student's Features, when a term compares features.
        teacher_taps: images -> the teacher's.
        cached: the batches bring the teacher's logits, so that the teacher itself may be missing.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teacher: Teacher | TeacherEnsemble | None = None,
        *,
        student_taps: Callable[[Tensor, Tensor | None], Any] | None = None,
        teacher_taps: Callable[[Tensor], Any] | None = None,
        cached: bool = False,
    ) -> None:
        super().__init__()
        if teacher is None and not cached and objective.needs_teacher:
            raise InputError(f"the terms {', '.join(objective.names)} need a teacher; name one, or use method none")
        self.student = student
        self.objective = objective
        self._hidden = (teacher, student_taps, teacher_taps)  # a tuple: nn.Module registers nothing of it
        self.watched: dict[str, Tensor] = {}  # of the last pass: the sum of each model's logits, finite if all are

    @property
    def teacher(self) -> Teacher | TeacherEnsemble | None:
        return self._hidden[0]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One pass.

        Args:
            batch: images as the student expects them; cached teacher logits stand in for a pass through the teacher.
                `index` is for losses with a memory.

        Returns:
            "loss" (scalar with a graph), "loss/NAME" (detached, unweighted), "logits" [N, K] (detached),
            "sum/correct" and "sum/counted": images whose largest logit is their class, of how many that have a label.
        """
        teacher, student_taps, teacher_taps = self._hidden
        images = batch.images
        student_out: Any
        teacher_out: Any = batch.teacher_logits
        if student_taps is not None and teacher_taps is not None:
            index = batch.index if self.objective.needs_index else None
            if index is not None and 0 < len(index) < len(images):
                index = index.repeat(len(images) // len(index))  # view-major, as the images
            student_out = student_taps(images, index)
            logits = student_out.logits
            teacher_out = teacher_taps(images)
        else:
            logits = student_out = logits_of(self.student(images))
            if teacher_out is None and teacher is not None and self.objective.needs_teacher:
                teacher_out = teacher(images)
        result = self.objective(student_out, teacher_out, batch.target, batch.labelled)
        logits = logits.detach()
        known = batch.labelled
        counted = (logits, batch.target) if known is None else (logits[known], batch.target[known])
        counts = count_correct(counted[0].float(), counted[1])
        self.watched = {"watch/student": logits.float().sum()}
        taught = getattr(teacher_out, "logits", teacher_out)
        if taught is not None:
            self.watched["watch/teacher"] = taught.float().sum()
        return {**result, "logits": logits, "sum/correct": counts[0], "sum/counted": counts[3]}
