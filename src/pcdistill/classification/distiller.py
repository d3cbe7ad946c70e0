"""The distiller for classifiers: student + teacher + objective, one forward pass that returns a dict."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pcdistill.distill.objective import Objective
from pcdistill.distill.teacher import Teacher, logits_of
from pcdistill.errors import InputError


class ClassificationDistiller(nn.Module):
    """Turns a batch into `{"loss", "loss/NAME"..., "logits"}`; the loop only calls backward.

    The teacher is no submodule: it is in no state dict, no optimiser, and no distributed wrapper.

    Args:
        student: images [N, C, H, W] -> logits [N, K].
        objective: the weighted terms; its parameters are trained with the student.
        teacher: None trains the student alone.
        student_taps: images, positions in the data set -> the student's Features, when a term compares features.
        teacher_taps: images -> the teacher's.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teacher: Teacher | None = None,
        *,
        student_taps: Callable[[Tensor, Tensor | None], Any] | None = None,
        teacher_taps: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and objective.needs_teacher:
            raise InputError(f"the terms {', '.join(objective.names)} need a teacher; name one, or use method none")
        self.student = student
        self.objective = objective
        self._hidden = (teacher, student_taps, teacher_taps)  # a tuple: nn.Module registers nothing of it

    @property
    def teacher(self) -> Teacher | None:
        return self._hidden[0]

    @property
    def wants_index(self) -> bool:
        """Whether the samples' positions in the data set are of use."""
        return self._hidden[1] is not None

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One pass.

        Args:
            images: [N, C, H, W] as the student expects them; with two views [2N, ...], view-major.
            target: [N] (or [2N]) class indices, or probabilities [N, K].
            teacher_logits: [N, K] already known (a cache), in place of a pass through the teacher.
            index: [N] positions of the samples in the data set, for losses with a memory; of two views once.

        Returns:
            "loss" (scalar with a graph), "loss/NAME" (detached, unweighted), "logits" [N, K] (detached).
        """
        teacher, student_taps, teacher_taps = self._hidden
        student_out: Any
        teacher_out: Any = teacher_logits
        if student_taps is not None and teacher_taps is not None:
            if index is not None and 0 < len(index) < len(images):
                index = index.repeat(len(images) // len(index))  # view-major, as the images
            student_out = student_taps(images, index)
            logits = student_out.logits
            teacher_out = teacher_taps(images)
        else:
            logits = student_out = logits_of(self.student(images))
            if teacher_out is None and teacher is not None and self.objective.needs_teacher:
                teacher_out = teacher(images)
        result = self.objective(student_out, teacher_out, target)
        return {**result, "logits": logits.detach()}
