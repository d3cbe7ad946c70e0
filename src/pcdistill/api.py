"""Distillation from Python, on plain modules and loaders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import nn

from pcdistill.classification.data import LoaderBatches
from pcdistill.classification.metrics import evaluate
from pcdistill.classification.task import build_distiller, check_teacher
from pcdistill.distill.objective import check_losses
from pcdistill.distill.teacher import Teacher, logits_of
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Trainer, make_accelerator, uses_channels_last
from pcdistill.errors import InputError
from pcdistill.recipe import make_recipe


class Distilled(NamedTuple):
    """What :func:`distill` gives back.

    Attributes:
        student: the module that was passed in, on the device it was trained on, in eval mode, with the kept weights;
            with SimKD a module around it that has the teacher's classifier.
        history: one dict per epoch: "epoch", "lr", "train/loss", "train/NAME" per term, "val/top1", "seconds", ...
    """

    student: nn.Module
    history: list[dict[str, float]]


@dataclass(frozen=True)
class _Loaders:
    """What the engine asks of data, for a user's loaders."""

    classes: list[str]
    train: LoaderBatches
    val: LoaderBatches
    in_channels: int
    image_size: int


def distill(
    *,
    teacher: nn.Module | None,
    student: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any],
    method: str = "pcd",
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
    seed: int = 0,
    out: str | Path | None = None,
    allow: Sequence[str] = (),
    verbose: bool = True,
) -> Distilled:
    """Train `student` with `teacher` on your own loaders.

    Args:
        teacher: images [N, C, H, W] -> logits [N, K]; frozen and kept in eval mode. None trains the student alone.
        student: images -> logits [N, K]; trained in place.
        train: batches (images, target [N]); any iterable that can be iterated once per epoch. With views = 2,
            ((weak, strong), target).
        val: batches of held-out data; picks the best epoch, and the teacher must pass its gate on them.
        method: a name of `pcdistill list methods`, or path/to/file.py:Class.
        losses: terms in the recipe's form, in place of the method's own, e.g.
            [{"method": "ce"}, {"method": "pcd", "stages": 5}].
        epochs: length of the training.
        lr: base learning rate.
        optim: further keys of the recipe's `optim`, e.g. {"name": "adamw", "weight_decay": 0.05}.
        train_options: further keys of the recipe's `train`, e.g. {"precision": "bfloat16", "ema": 0.999}.
        views: images per sample.
        class_map: [K] positions of the student's classes in the teacher's output, where the orders differ.
        student_stats: (mean, std) that your loader normalises with; needed only with `teacher_stats`.
        teacher_stats: (mean, std) that the teacher expects, where they differ.
        teacher_image_size: the teacher's resolution in pixels, where it differs.
        seed: of everything that the training draws.
        out: folder for checkpoints and metrics.csv; the same call continues an interrupted run, exactly so if the
            loader's order depends on the epoch alone (`sampler.set_epoch` is called where it exists).
        allow: ("weak-teacher",) turns the teacher gate into a warning.
        verbose: print a line per epoch.

    Returns:
        The student with its best weights (`train_options={"keep": "last"}` keeps the last), and the history.

    Raises:
        InputError: what does not fit, in one sentence.
        TrainingStopped: the loss is not finite, or accuracy collapsed.
    """
    tree: dict[str, Any] = {
        "method": method if teacher is not None or losses else "none",
        "losses": [dict(term) for term in losses or ()],
        "teacher": None,
        "data": {"name": "loaders", "views": views},
        "optim": {"lr": lr, **(optim or {})},
        "train": {"epochs": epochs, "seed": seed, **(train_options or {})},
        "allow": list(allow),
    }
    recipe = make_recipe(tree, "distill()")
    accelerator = make_accelerator(recipe.train)
    set_seed(seed)
    train_batches, val_batches = LoaderBatches(train, views=views), LoaderBatches(val)
    student.to(accelerator.device)
    first = next(iter(val_batches.epoch(0)))
    was_training = student.training
    with torch.no_grad():
        num_classes = int(logits_of(student.eval()(first[0][:2].to(accelerator.device))).shape[1])
    student.train(was_training)
    shape = first[0].shape
    data = _Loaders([str(i) for i in range(num_classes)], train_batches, val_batches, shape[1], shape[-1])
    check_losses(recipe, num_classes)
    wrapped = None
    if teacher is not None:
        if (student_stats is None) != (teacher_stats is None):
            raise InputError("student_stats and teacher_stats must be given together")
        wrapped = Teacher(
            teacher,
            class_map=class_map,
            student_stats=student_stats,
            teacher_stats=teacher_stats,
            image_size=teacher_image_size,
        ).to(accelerator.device)
        check_teacher(
            wrapped,
            None,
            val_batches,
            accelerator,
            num_classes=num_classes,
            allow=recipe.allow,
            console=Console(quiet=not verbose),
        )
    distiller = build_distiller(recipe, student, wrapped, data=data)
    student = distiller.student  # the one that came, unless the method gave it a new head

    channels_last = first[0].ndim == 4 and uses_channels_last(recipe.train, accelerator.device)

    def validate(model: nn.Module) -> dict[str, float]:
        found = evaluate(model, val_batches.epoch(0), accelerator, channels_last=channels_last)
        return {key: found[key] for key in ("loss", "top1", "top5")}

    trainer = Trainer(
        distiller,
        train_batches,
        validate,
        optim=recipe.optim,
        train=recipe.train,
        accelerator=accelerator,
        out=None if out is None else Path(out),
        digest=recipe.digest(),
        chance=100 / num_classes,
        console=Console(recipe.method, quiet=not verbose),
    )
    set_seed(seed)
    trainer.resume()
    fit = trainer.fit()
    student.load_state_dict(fit.best_state if recipe.train.keep == "best" else fit.last_state)
    return Distilled(student.eval(), fit.history)
