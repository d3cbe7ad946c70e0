"""What differs between the tasks: data, models, distiller and metric. Everything else of a run is shared."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from pcdistill import models
from pcdistill.classification import task as prepare
from pcdistill.classification.data import Data, build_data
from pcdistill.classification.metrics import evaluate
from pcdistill.distill.objective import check_losses, views_of
from pcdistill.distill.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.engine.loop import uses_channels_last
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe, TeacherConfig, TrainConfig

Unpack = Callable[[Any, torch.device], tuple[tuple[Any, ...], int]]


class Task(Protocol):
    """A task, as a run needs it.

    Attributes:
        metric: what decides which epoch is best, in percent.
        label: the metric in running text.
        unpack: batch -> the distiller's inputs on a device, and the number of samples; None for the trainer's own.
    """

    metric: str
    label: str
    unpack: Unpack | None

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any: ...

    def check(self, recipe: Recipe, data: Any) -> None: ...

    def train(self, recipe: Recipe, accelerator: Accelerator) -> TrainConfig: ...

    def chance(self, data: Any) -> float: ...

    def student(self, recipe: Recipe, data: Any) -> nn.Module: ...

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]: ...

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool: ...

    def teacher(self, config: TeacherConfig, student: nn.Module, data: Any, allow: Sequence[str]) -> Any: ...

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        accelerator: Accelerator,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]: ...

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any) -> nn.Module: ...

    def evaluate(
        self, model: nn.Module, batches: Any, data: Any, recipe: Recipe, accelerator: Accelerator
    ) -> dict[str, Any]: ...

    def splits(self, data: Any) -> dict[str, Any]: ...

    def metadata(self, data: Any) -> dict[str, Any]: ...

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any) -> None: ...


class Classification:
    """Top-1 of images with one class each."""

    metric, label = "top1", "top-1"
    unpack: Unpack | None = None

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Data:
        config = recipe.data
        if config.name == "digits-detection" or config.name.startswith(("coco:", "voc:")):
            raise InputError(f"data: {config.name} holds boxes; set task: detection, or name the recipe detection")
        return build_data(
            config.name,
            batch_size=config.batch_size // recipe.train.accumulate,
            eval_batch_size=config.eval_batch_size,
            val_fraction=config.val_fraction,
            seed=prepare.stream_seed(recipe),
            image_size=config.image_size,
            augment=config.augment,
            mixup=config.mixup,
            cutmix=config.cutmix,
            views=views_of(recipe),
            workers=config.workers,
            limit=config.limit,
            download=config.download,
            root=config.root,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )

    def check(self, recipe: Recipe, data: Any) -> None:
        check_losses(recipe, len(data.classes))

    def train(self, recipe: Recipe, accelerator: Accelerator) -> TrainConfig:
        return recipe.train

    def chance(self, data: Any) -> float:
        return 100 / len(data.classes)

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        return prepare.build_student(recipe.student, classes=data.classes, data=data, allow=recipe.allow)

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        size = data.image_size
        if isinstance(model, Teacher):
            model, size = model.model, model.image_size or size
        return models.model_info(model, size, in_channels=data.in_channels)

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        return prepare.knows_classes(config, data)

    def teacher(self, config: TeacherConfig, student: nn.Module, data: Any, allow: Sequence[str]) -> Any:
        return prepare.build_teacher(config, data=data, allow=allow)

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        accelerator: Accelerator,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]:
        return prepare.check_teacher(
            teacher, student, data.val, accelerator, num_classes=len(data.classes), allow=allow, console=console
        )

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any) -> nn.Module:
        return prepare.build_distiller(recipe, student, teacher, data=data)

    def evaluate(
        self, model: nn.Module, batches: Any, data: Any, recipe: Recipe, accelerator: Accelerator
    ) -> dict[str, Any]:
        channels_last = uses_channels_last(recipe.train, accelerator.device)
        found = evaluate(model, batches.epoch(0), accelerator, channels_last=channels_last)
        return {key: found[key] for key in ("top1", "top5", "loss", "samples")}

    def splits(self, data: Any) -> dict[str, Any]:
        return {"test": data.test, "val": data.val, "train": data.train_eval}

    def metadata(self, data: Any) -> dict[str, Any]:
        return {"mean": data.mean, "std": data.std}

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any) -> None:
        """Nothing is left behind but what every run leaves."""


class Detection:
    """COCO mAP of images with boxes."""

    metric, label = "map", "AP"
    unpack: Unpack | None = staticmethod(lambda batch, device: _images_and_boxes(batch.to(device)))

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        return _detection().detection_data(recipe, accelerator)

    def check(self, recipe: Recipe, data: Any) -> None:
        _detection().check_detection_losses(recipe, len(data.classes))

    def train(self, recipe: Recipe, accelerator: Accelerator) -> TrainConfig:
        """channels_last only where it is asked for: RoI pooling would copy every level back."""
        return replace(recipe.train, channels_last=bool(recipe.train.channels_last))

    def chance(self, data: Any) -> float:
        return 0.0  # there is no guessing of boxes

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        student: nn.Module = _detection().build_student_detector(recipe, data)
        return student

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        return bool(_detection().knows_detection_classes(config, data))

    def teacher(self, config: TeacherConfig, student: nn.Module, data: Any, allow: Sequence[str]) -> Any:
        return _detection().build_teacher_detector(config, student, data, allow)

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        accelerator: Accelerator,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]:
        found: dict[str, Any] = _detection().check_teacher_detector(
            teacher, student, data, accelerator, allow=allow, console=console
        )
        return found

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any) -> nn.Module:
        distiller: nn.Module = _detection().build_detection_distiller(recipe, student, teacher, data)
        return distiller

    def evaluate(
        self, model: nn.Module, batches: Any, data: Any, recipe: Recipe, accelerator: Accelerator
    ) -> dict[str, Any]:
        from pcdistill.detection.metrics import evaluate_detection

        return evaluate_detection(model, batches.epoch(0), accelerator, classes=data.classes)

    def splits(self, data: Any) -> dict[str, Any]:
        return {"test": data.test, "val": data.val}

    def metadata(self, data: Any) -> dict[str, Any]:
        return {"task": "detection", "image_size": data.image_size}

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any) -> None:
        """samples.npz, from which the report draws its pictures."""
        from pcdistill.detection.samples import write_samples

        write_samples(out / "samples.npz", distiller, student, data)


def task_of(recipe: Recipe) -> Task:
    """The recipe's task."""
    return Detection() if recipe.task == "detection" else Classification()


def data_of(recipe: Recipe, accelerator: Accelerator) -> Any:
    """The recipe's data, this process's share. A batch of the loader is one micro-batch of gradient accumulation."""
    micro = recipe.train.accumulate * accelerator.num_processes
    if recipe.data.batch_size % micro != 0:
        raise InputError(
            f"data.batch_size {recipe.data.batch_size} must be divisible by train.accumulate x processes = {micro}"
        )
    return task_of(recipe).data(recipe, accelerator)


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """What a row of metrics.csv takes of an evaluation: plain numbers."""
    return {k: v for k, v in found.items() if isinstance(v, float) and k not in ("samples", "finite")}


def _images_and_boxes(batch: Any) -> tuple[tuple[Any, ...], int]:
    return (batch.images, batch.targets), len(batch.images)


def _detection() -> Any:
    """The detection engine, imported only by runs that detect."""
    from pcdistill.detection import task as prepare_detection

    return prepare_detection
