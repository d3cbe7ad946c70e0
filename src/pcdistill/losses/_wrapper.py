"""What the losses around another loss share: they have its needs and its options that move, and train as it does."""

from typing import Any

from torch import nn

from pcdistill.losses.base import LogitLoss, needs_of


class WrappedLoss(LogitLoss):
    """A loss on logits around another one, with that one's needs, temperature, reduction and progress.

    Args:
        loss: a module with forward(student_logits, teacher_logits, target=None). Its parameters stay its own.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss: Any = loss
        self.needs = needs_of(loss)

    @property
    def temperature(self) -> Any:
        """The wrapped loss's."""
        return self.loss.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.loss.temperature = value

    @property
    def reduction(self) -> Any:
        """The wrapped loss's."""
        return self.loss.reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self.loss.reduction = value

    @property
    def moves(self) -> bool:
        """As the wrapped loss."""
        return bool(getattr(self.loss, "moves", hasattr(self.loss, "set_progress")))

    def set_progress(self, *, progress: float, epoch: float) -> None:
        """Pass the training progress on to the wrapped loss, if it wants it."""
        if hasattr(self.loss, "set_progress"):
            self.loss.set_progress(progress=progress, epoch=epoch)
