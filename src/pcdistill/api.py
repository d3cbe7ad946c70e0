"""Distillation from Python, on plain modules and loaders."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from pcdistill.classification.data import LoaderBatches
from pcdistill.classification.task import Classification
from pcdistill.commands.run import run_with_report
from pcdistill.commands.tasks import passed_detection
from pcdistill.data.contents import loader_contents
from pcdistill.distillation.teacher import Teacher, logits_of
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.recipe import ALONE, LOADERS, Recipe, TeacherConfig, load_recipe, make_recipe


@dataclass(frozen=True)
class Distilled:
    """What :func:`distill` gives back; it unpacks into `student, history`.

    Attributes:
        student: the module that was passed in, on the device it was trained on, in eval mode, with the kept weights;
            with SimKD a module around it that has the teacher's classifier.
        history: one dict per epoch: "epoch", "lr", "train/loss", "train/NAME" per term, "val/top1" or, of boxes,
            "val/map", "seconds", ...
        summary: what result.json holds: "best" and "last" with their metrics on "val" and "test", the teacher's, ...
    """

    student: nn.Module
    history: list[dict[str, float]]
    summary: dict[str, Any]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.student, self.history))


@dataclass(frozen=True)
class _Loaders:
    """What a run asks of data, for the caller's loaders."""

    classes: list[str]
    train: LoaderBatches
    val: LoaderBatches
    test: LoaderBatches | None
    in_channels: int
    image_size: int
    contents: dict[str, str]


class _Passed(Classification):
    """Classification on modules and loaders that were passed in, where a recipe would name them."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        train: LoaderBatches,
        val: LoaderBatches,
        test: LoaderBatches | None,
        stats: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._train, self._val, self._test = train, val, test
        self._stats = stats

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        """The loaders; how many classes there are is read off the student."""
        student = self._student.to(accelerator.device)
        images = next(iter(self._val.epoch(0))).images
        was_training = student.training
        with torch.no_grad():
            num_classes = int(logits_of(student.eval()(images[:2].to(accelerator.device))).shape[1])
        student.train(was_training)
        classes = [str(i) for i in range(num_classes)]
        contents = {
            f"data.{name}.{what}": value
            for name, batches in (("train", self._train), ("val", self._val), ("test", self._test))
            for what, value in ({} if batches is None else loader_contents(batches.loader)).items()
        }
        return _Loaders(classes, self._train, self._val, self._test, images.shape[1], images.shape[-1], contents)

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        return self._student

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """Without multiply-adds: what is passed in runs on nothing but its own data."""
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        return True

    def teacher(self, config: TeacherConfig, student: nn.Module | None, data: Any, allow: Sequence[str]) -> Teacher:
        assert self._teacher is not None
        return self._teacher

    def metadata(self, data: Any) -> dict[str, Any]:
        return {} if self._stats is None else {"mean": list(self._stats[0]), "std": list(self._stats[1])}


def distill(
    *,
    teacher: nn.Module | None,
    student: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any],
    test: Iterable[Any] | None = None,
    task: Literal["classification", "detection"] = "classification",
    method: str | None = None,
    losses: Sequence[Mapping[str, Any]] | None = None,
    epochs: int = 30,
    lr: float = 0.05,
    optim: Mapping[str, Any] | None = None,
    train_options: Mapping[str, Any] | None = None,
    views: int = 1,
    class_map: Sequence[int] | None = None,
    student_stats: tuple[Sequence[float], Sequence[float]] | None = None,
    teacher_stats: tuple[Sequence[float], Sequence[float]] | None = None,
    teacher_image_size: int | None = None,
    classes: Sequence[str] | None = None,
    teacher_classes: Sequence[str] | None = None,
    detection: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    allow: Sequence[str] = (),
    verbose: bool = True,
) -> Distilled:
    """Train `student` with `teacher` on your own loaders.

    Args:
        teacher: images [N, C, H, W] -> logits [N, K]; frozen and kept in eval mode. None trains the student alone. For
            detection a detector of torchvision or transformers, or one with a registered adapter.
        student: images -> logits [N, K], or a detector; trained in place.
        train: batches (images, target [N]); any iterable that can be iterated once per epoch. With views = 2,
            ((weak, strong), target). For detection (images, targets): images [3, H, W] in 0..1, a list or stacked, and
            for each a mapping of "boxes" [M, 4] xyxy in pixels and "labels" [M] from 1.
        val: batches of held-out data; picks the best epoch, and the teacher must pass its gate on them.
        test: batches that best and last epoch and the teacher are evaluated on once, at the end.
        task: "detection" for boxes.
        method: a name of `pcdistill list methods`, or path/to/file.py:Class; None takes the default of the task's
            recipe, "default" or "detection". Names that this recipe gives a strength have it here too.
        losses: terms in the recipe's form, in place of the method's own, e.g.
            [{"method": "ce"}, {"method": "pcd", "strength": 4, "stages": 5}].
        epochs: length of the training.
        lr: base learning rate.
        optim: further keys of the recipe's `optim`, e.g. {"name": "adamw", "weight_decay": 0.05}.
        train_options: further keys of the recipe's `train`, e.g. {"precision": "bfloat16", "ema": 0.999}.
        views: images per sample.
        class_map: [K] positions of the student's classes in the teacher's output, where the orders differ.
        student_stats: (mean, std) that your loader normalises with; needed only with `teacher_stats`.
        teacher_stats: (mean, std) that the teacher expects, where they differ.
        teacher_image_size: the teacher's resolution in pixels, where it differs.
        classes: of detection: names of the labels 1..K.
        teacher_classes: of detection: names of the teacher's labels, in its order, where they differ.
        detection: keys of the recipe's `detection`, e.g. {"pairing": "teacher", "boxes": "giou"}.
        seed: of everything that the training draws.
        out: folder of the run, with all that the command writes: recipe.yaml, checkpoints, metrics.csv, result.json,
            student.safetensors with its card, report.html. The same call continues an interrupted run, exactly so if
            the loader's order depends on the epoch alone (`sampler.set_epoch` is called where it exists).
        allow: ("weak-teacher",) turns the teacher gate into a warning.
        verbose: print a line per epoch.

    Returns:
        The student with its best weights (`train_options={"keep": "last"}` keeps the last), the history, the summary.

    Raises:
        InputError: what does not fit, in one sentence.
        TrainingStopped: the loss is not finite, or accuracy collapsed.
        PcdistillError: Ctrl-C or a polite kill, after a checkpoint was written.
    """
    if (student_stats is None) != (teacher_stats is None):
        raise InputError("student_stats and teacher_stats must be given together")
    if task == "detection" and (class_map is not None or student_stats is not None or views != 1):
        raise InputError(
            "class_map, student_stats, teacher_stats and views are for classifiers; detectors are matched by "
            "teacher_classes, and normalise by themselves"
        )
    if task != "detection" and (classes or teacher_classes or detection):
        raise InputError('classes, teacher_classes and detection are for detectors; give task="detection"')
    default = load_recipe("detection" if task == "detection" else "default").to_dict()
    tree: dict[str, Any] = {
        "task": task,
        "detection": dict(detection or {}),
        "method": method or default["method"] if teacher is not None or losses else ALONE,
        "methods": default["methods"],
        "losses": [dict(term) for term in losses or ()],
        "teacher": None if teacher is None else {"name": type(teacher).__name__},
        "student": {"name": type(student).__name__},
        "data": {"name": LOADERS, "views": None if task == "detection" else views},
        "optim": {"lr": lr, **(optim or {})},
        "train": {"epochs": epochs, "seed": seed, **(train_options or {})},
        "allow": list(allow),
    }
    recipe = make_recipe(tree, "distill()")
    if out is None and recipe.train.trackers:
        raise InputError("train.trackers need a folder; give out")
    if task == "detection":
        passed = passed_detection(
            student=student,
            teacher=teacher,
            train=train,
            val=val,
            test=test,
            classes=classes,
            teacher_classes=teacher_classes,
            teacher_image_size=teacher_image_size,
        )
        return _distilled(recipe, out, passed, verbose)
    wrapped = (
        None
        if teacher is None
        else Teacher(
            teacher,
            class_map=class_map,
            student_stats=student_stats,
            teacher_stats=teacher_stats,
            image_size=teacher_image_size,
        )
    )
    loaders = (LoaderBatches(train, views=views), LoaderBatches(val), None if test is None else LoaderBatches(test))
    return _distilled(recipe, out, _Passed(student, wrapped, *loaders, student_stats), verbose)


def _distilled(recipe: Recipe, out: str | Path | None, task: Any, verbose: bool) -> Distilled:
    console = Console(recipe.method, quiet=not verbose)
    result = run_with_report(recipe, None if out is None else Path(out), console=console, task=task)
    return Distilled(result.student.eval(), result.history, result.summary)
