"""The contracts: three kinds of losses, what a loss needs of a run, and what it is asked before anything is trained.

A loss derives from the base of its kind, says its needs in the class attribute `needs`, and computes in `forward`. A
plain nn.Module is a loss on logits with the needs `PLAIN`, unless it has attributes `kind` and `needs` of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from pcdistill.losses._common import shape
from pcdistill.losses._features import Features
from pcdistill.losses._pyramid import Pyramid

__all__ = ["FeatureLoss", "Features", "LogitLoss", "Loss", "Needs", "Pyramid", "PyramidLoss", "Shapes"]

Kind = Literal["logits", "features", "pyramids"]
KINDS: tuple[Kind, ...] = ("logits", "features", "pyramids")
FORMER_FLAGS = {
    "hard_target_only": "soft_labels=False",
    "ignores_teacher": "teacher=False",
    "views": "views=2",
}


@dataclass(frozen=True)
class Needs:
    """What a loss needs of a run. The engine gives no more than this.

    Attributes:
        teacher: the teacher runs for it; without, a run of such terms alone needs none.
        labels: `forward` gets the target; without, None.
        soft_labels: the target may be probabilities [N, C], as mixup and cutmix make them.
        views: views of each image, 1 or 2; of two, the rows of the first come before those of the second.
        index: features hold the positions of the samples in the data set.
        own_losses: of pyramids: `forward` gets the losses that the student itself computes, by name, and no pyramids.
        replaces_labels: it stands for cross-entropy too, as an objective of its own; it has no `strength` beside it.
        new_head: of features: the student makes its logits by a head that the loss gives (see :class:`GivesHead`).
    """

    teacher: bool = True
    labels: bool = False
    soft_labels: bool = True
    views: int = 1
    index: bool = False
    own_losses: bool = False
    replaces_labels: bool = False
    new_head: bool = False


PLAIN = Needs(labels=True, index=True)  # a class that says nothing gets what there is


@dataclass(frozen=True)
class Shapes:
    """What is known of a run before its teacher is trained.

    Attributes:
        num_classes: C, columns of the logits.
        views: views of each image.
        soft_labels: whether targets are probabilities [N, C].
    """

    num_classes: int
    views: int = 1
    soft_labels: bool = False


class Loss(nn.Module):
    """What the three bases share."""

    kind: ClassVar[Kind]
    needs: Needs = Needs()
    note: str | None = None  # what its user should know of how it was built

    def set_progress(self, *, progress: float, epoch: float) -> None:
        """Called before every step: `progress` in [0, 1), `epoch` from 0 with its fraction. Most losses stay."""

    @property
    def moves(self) -> bool:
        """Whether the loss depends on what `set_progress` tells it."""
        return type(self).set_progress is not Loss.set_progress

    def check(self, shapes: Shapes) -> None:
        """Raise unless the loss can be trained in a run of these shapes.

        Raises:
            ValueError: in one sentence, with the remedy.
        """
        check_needs(self.needs, shapes)


class LogitLoss(Loss):
    """Compares logits: `forward(student_logits [N, C], teacher_logits [N, C], target=None)` -> scalar."""

    kind: ClassVar[Kind] = "logits"

    def check(self, shapes: Shapes) -> None:
        """Beside the needs: one step on random logits of the run's shape."""
        super().check(shapes)
        try_on_logits(self, shapes)


class FeatureLoss(Loss):
    """Compares features of classifiers: `forward(student: Features, teacher: Features, target=None)` -> scalar.

    The constructor's arguments `student`, `teacher`, `n_data`, `labels` and `num_classes` are filled in by the engine.
    """

    kind: ClassVar[Kind] = "features"


class PyramidLoss(Loss):
    """Compares pyramids of detectors: `forward(student: Pyramid, teacher: Pyramid, targets=None)` -> scalar.

    The constructor's arguments `student`, `teacher`, `n_data` and `num_classes` are filled in by the engine.
    """

    kind: ClassVar[Kind] = "pyramids"

    def kept(self, student: Pyramid, teacher: Pyramid, targets: Any = None) -> list[tuple[int, Tensor, Tensor]]:
        """What a loss that masks levels keeps now, to be drawn: stride, places [N, H, W] and channels [N, D] of 0 or 1.

        Most losses mask nothing: an empty list.
        """
        return []


class GivesHead(Protocol):
    """A loss with `new_head`: it gives the student a head, and learns through the head that was put on."""

    def student_head(self) -> nn.Module:
        """The head: deepest map [N, D, H, W] -> logits [N, C]; its `projector` makes the map to compare."""

    def use_head(self, head: nn.Module) -> None:
        """Learn through this head from now on."""


def kind_of(loss: Any) -> Kind:
    """What a loss, or its class, compares; logits, if it does not say.

    Raises:
        ValueError: a kind that is none of the three.
    """
    kind = getattr(loss, "kind", "logits")
    if kind not in KINDS:
        raise ValueError(f"kind must be {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}, got {kind!r}")
    found: Kind = kind
    return found


def needs_of(loss: Any) -> Needs:
    """What a loss needs, or its class as far as its options do not matter; `PLAIN`, if it does not say.

    Raises:
        ValueError: a flag of an older form, which would have no effect.
    """
    found = getattr(loss, "needs", None)
    if isinstance(found, Needs):
        return found
    own = vars(loss if isinstance(loss, type) else type(loss))
    for flag, now in FORMER_FLAGS.items():
        if flag in own:
            raise ValueError(f"{flag} has no effect; write needs = Needs({now}), with Needs from pcdistill.losses")
    return PLAIN


def check_fit(loss: nn.Module, shapes: Shapes) -> None:
    """Ask a loss whether it can be trained in a run of these shapes; a plain module is tried as its kind is.

    Raises:
        ValueError: it cannot, with the remedy.
    """
    if isinstance(loss, Loss):
        loss.check(shapes)
        return
    check_needs(needs_of(loss), shapes)
    if kind_of(loss) == "logits":
        try_on_logits(loss, shapes)


def check_needs(needs: Needs, shapes: Shapes) -> None:
    """Raise unless the run has the views and the labels that are needed."""
    if needs.views > shapes.views:
        raise ValueError("compares two views of each image; set data.views to 2")
    if shapes.soft_labels and needs.labels and not needs.soft_labels:
        raise ValueError(
            "target must be hard labels for this loss, and this run makes soft ones; turn mixup, cutmix and label "
            "smoothing off"
        )


def try_on_logits(loss: nn.Module, shapes: Shapes) -> None:
    """One step of a loss on random logits, without a trace in the generators or in gradients.

    Raises:
        ValueError: with the loss's own sentence, or that its value is no scalar with a gradient to the student.
    """
    per_view, classes = 4, shapes.num_classes
    n = per_view * shapes.views
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, classes, generator=generator) for _ in range(2))
    student.requires_grad_()
    target = torch.arange(per_view).repeat(shapes.views) % classes
    if shapes.soft_labels:
        target = nn.functional.one_hot(target, classes).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            value = loss(student, teacher, target if needs_of(loss).labels else None)
            if not isinstance(value, Tensor) or value.ndim:
                got = shape(value) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"must give a scalar, got {got}; reduce over the samples")
            if not value.requires_grad or torch.autograd.grad(value, student, allow_unused=True)[0] is None:
                raise ValueError("must depend on the student's logits, its value has no gradient to them")
        except (ValueError, TypeError) as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            kind = "probabilities" if shapes.soft_labels else "class indices"
            raise ValueError(
                f"cannot be computed on logits {shape(student)} with {kind} {shape(target)}: "
                f"{type(error).__name__}: {error}"
            ) from error
