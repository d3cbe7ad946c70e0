"""Feature terms in a run: taps on both models, what the losses are built from, and the student's new head (SimKD)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pcdistill.distillation.objective import Objective, build_loss, term_needs
from pcdistill.distillation.taps import Taps
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.modes import evaluating
from pcdistill.losses._features import Features
from pcdistill.losses.base import GivesHead
from pcdistill.models.feature_maps import Headed
from pcdistill.recipe import Recipe

PROJECTED = "head.projector"


@dataclass
class Tapped:
    """Both models as the feature terms see them.

    Attributes:
        student: the student to train, evaluate and ship: the one that came, or the same with a new head.
        run_student: images [N, C, H, W] and positions in the data set [N] -> the student's Features.
        run_teacher: images -> the teacher's Features, its logits in the order of the data's classes.
        context: what feature losses are built from.
        taps: the student's and the teacher's.
    """

    student: nn.Module
    run_student: Callable[..., Features]
    run_teacher: Callable[[Tensor], Features]
    context: dict[str, Any]
    taps: tuple[Taps, ...]

    def adopt(self, objective: Objective) -> None:
        """Let the term that learns the new head's projector and the head share it."""
        if isinstance(self.student, Headed):
            for term in objective.terms:
                if term.needs.new_head:
                    cast(GivesHead, term.loss).use_head(self.student.head)

    def remove(self) -> None:
        """Take the hooks out of both models."""
        for taps in self.taps:
            taps.remove()


def tap(recipe: Recipe, student: nn.Module, teacher: Teacher, data: Any) -> Tapped:
    """Tap both models and look at one batch.

    Args:
        recipe: names the features (`student.features`, `teacher.features`) and the terms.
        student: on its device.
        teacher: the frozen teacher.
        data: `train` gives the batch.

    Raises:
        InputError: models that show no features, or an option that a loss refuses.
    """
    device = next(student.parameters()).device
    teacher.to(device)
    student_taps = Taps(student, recipe.student.features)
    teacher_taps = Taps(teacher.model, recipe.teacher.features if recipe.teacher is not None else None)
    run_teacher = _run_teacher(teacher, teacher_taps)
    batch = next(iter(data.train.epoch(0)))
    images = batch.images[:4].to(device)
    needs = [term_needs(term, f"losses.{i}") for i, term in enumerate(recipe.losses)]
    index = None
    if batch.index is not None and any(need.index for need in needs):
        index = batch.index[: len(images)].to(device)
    context = {
        "student": _look(student_taps.run, student, images, index),
        "teacher": run_teacher(images),
        "n_data": data.train.num_samples,
        "labels": getattr(data.train, "labels", None),
        "num_classes": len(data.classes),
    }
    headed = [i for i, need in enumerate(needs) if need.new_head]
    if not headed:
        return Tapped(student, student_taps.run, run_teacher, context, (student_taps, teacher_taps))
    term = recipe.losses[headed[0]]
    loss = cast(GivesHead, build_loss(term.method, term.options, where=f"losses.{headed[0]}", context=context))
    student, own_taps, run_student = _with_new_head(student, student_taps, loss)
    context["student"] = _look(run_student, student, images, index)
    return Tapped(student, run_student, run_teacher, context, (own_taps, teacher_taps))


def _run_teacher(teacher: Teacher, taps: Taps) -> Callable[[Tensor], Features]:
    """images -> the teacher's Features, its outputs in the order of the data's classes."""

    def run(images: Tensor) -> Features:
        with torch.no_grad(), teacher.autocast(images):
            features = _joined([taps.run(teacher.prepare(part)) for part in teacher.parts(images)])
        classifier = select_rows(features.classifier, teacher.class_map)
        features = features._replace(logits=teacher.select(features.logits), classifier=classifier)
        return features if teacher.dtype == torch.float32 else _in_float32(features)

    return run


def _joined(parts: list[Features]) -> Features:
    """The teacher's Features of a batch from those of its parts, in order."""
    if len(parts) == 1:
        return parts[0]
    before = [part.pre_activations for part in parts]
    return parts[0]._replace(
        maps=[torch.cat(maps) for maps in zip(*(part.maps for part in parts), strict=True)],
        pre_activations=[torch.cat(maps) for maps in zip(*(one for one in before if one is not None), strict=True)],
        pooled=torch.cat([part.pooled for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
    )


def _in_float32(features: Features) -> Features:
    """Of a teacher in another precision; its classifier and its normalisations are copied."""
    return features._replace(
        maps=[x.float() for x in features.maps],
        pre_activations=None if features.pre_activations is None else [x.float() for x in features.pre_activations],
        pooled=features.pooled.float(),
        classifier=None if features.classifier is None else copy.deepcopy(features.classifier).float(),
        norms=None
        if features.norms is None
        else [None if norm is None else copy.deepcopy(norm).float() for norm in features.norms],
    )


def _look(run: Callable[..., Features], model: nn.Module, images: Tensor, index: Tensor | None) -> Features:
    """The model's features in eval mode, without a graph."""
    with evaluating(model), torch.no_grad():
        return run(images, index)


def _with_new_head(student: nn.Module, taps: Taps, loss: GivesHead) -> tuple[nn.Module, Taps, Callable[..., Features]]:
    """The student with the head that a loss gives it, its taps, and the run that shows what goes into that head."""
    names = taps.names
    assert names is not None
    taps.remove()
    headed = Headed(student, names[-1], loss.student_head())
    headed.training = student.training  # its parts stay in the modes that they have
    headed.head.train(student.training)
    own = Taps(headed, [*(f"model.{name}" for name in names), PROJECTED])

    def run(images: Tensor, index: Tensor | None = None) -> Features:
        features = own.run(images, index)
        assert features.pre_activations is not None
        assert features.norms is not None
        return features._replace(
            maps=features.maps[:-1],
            pre_activations=features.pre_activations[:-1],
            norms=features.norms[:-1],
            projected=features.maps[-1],
        )

    return headed, own, run


def select_rows(classifier: nn.Module | None, class_map: Tensor | None) -> nn.Module | None:
    """The rows of a linear classifier that belong to the data's classes, in their order; of float8 weights a copy."""
    if not isinstance(classifier, nn.Linear) or (class_map is None and not is_parametrized(classifier)):
        return classifier
    rows = slice(None) if class_map is None else class_map
    weight = classifier.weight.detach()[rows]
    own = nn.Linear(classifier.in_features, len(weight), bias=classifier.bias is not None, device="meta")
    own.weight = nn.Parameter(weight, requires_grad=False)
    if classifier.bias is not None:
        own.bias = nn.Parameter(classifier.bias.detach()[rows], requires_grad=False)
    return own
