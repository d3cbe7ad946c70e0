"""A trained student out of a run's folder, without the data that it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill import models
from pcdistill.commands.folder import read_recipe
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import Task, task_of
from pcdistill.data.decoding import Picture, bounded_size, read_whole, read_windows
from pcdistill.data.preprocess import Preprocess, whole
from pcdistill.engine.placement import Placement, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.models.heads import with_head
from pcdistill.models.weights import STUDENT_FILE
from pcdistill.recipe import LOADERS, Recipe

WEIGHTS = STUDENT_FILE


@dataclass(frozen=True)
class Student:
    """A trained student, ready to use.

    Attributes:
        folder: the run's.
        recipe: the run's, on a CPU in float32.
        task: what it does.
        model: in eval mode.
        classes: names of its outputs in order; for a detector of its labels from 1.
        metadata: what stands beside its weights.
        preprocess: how a classifier's images are made; None for a detector, which takes images in [0, 1].
    """

    folder: Path
    recipe: Recipe
    task: Task
    model: nn.Module
    classes: list[str]
    metadata: dict[str, Any]
    preprocess: Preprocess | None

    @property
    def name(self) -> str:
        """The model's full name."""
        return self.recipe.student.name

    @property
    def detects(self) -> bool:
        """Whether it finds boxes."""
        return self.recipe.task == "detection"

    @property
    def channels(self) -> int:
        """Of the images."""
        return 3 if self.preprocess is None else len(self.preprocess.mean)

    @property
    def bound(self) -> int | None:
        """What the longer side of a detector's images is scaled down to; None leaves them as they are."""
        return self.metadata.get("image_size") if self.detects else None

    @property
    def categories(self) -> list[int | str]:
        """The data's own number of each class; for data that have none, from 1."""
        found = self.metadata.get("category_ids")
        return list(found) if found else list(range(1, len(self.classes) + 1))

    def pixels(self, path: str) -> Tensor:
        """An image file as it is shown, [3, H, W] uint8."""
        return read_windows(path, whole)[0]

    @torch.no_grad()
    def boxes_in(self, image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """What a detector finds in an image as :meth:`read` gives it, with the file's height and width.

        Returns:
            "boxes" [M, 4] xyxy in pixels of the file, "labels" [M] from 1, "scores" [M].
        """
        found = dict(self.model([image])[0])
        scale = found["boxes"].new_tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
        return {**found, "boxes": found["boxes"] * scale}

    def find(self, path: str) -> dict[str, Tensor]:
        """What a detector finds in an image file, which is read as evaluation reads it; as :meth:`boxes_in`."""
        return self.boxes_in(*self.read(path))

    def read(self, path: str) -> tuple[Tensor, tuple[int, int]]:
        """An image file as the model reads it, and its own height and width.

        Raises:
            InputError: the file cannot be read.
        """
        width, height = Picture(path).size
        if self.preprocess is not None:
            return self.preprocess(read_windows(path, self.preprocess.plan)[0]), (height, width)
        pixels = read_whole(path, (width, height), bounded_size(width, height, self.bound))
        return pixels.float() / 255, (height, width)


def open_student(folder: Path) -> Student:
    """The student of a run's folder.

    Raises:
        InputError: the folder holds no finished run, or one whose student a command cannot build.
    """
    recipe = read_recipe(folder)
    if recipe.data.name == LOADERS:
        raise InputError(f"{folder} was made from Python, with a module that a command cannot build again")
    weights = models.run_weights(folder)
    if not weights.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: the run is not finished")
    recipe = replace(recipe, train=replace(recipe.train, device="cpu", precision="float32", accumulate=1))
    task, metadata = task_of(recipe), models.read_metadata(weights)
    classes = [str(name) for name in metadata.get("classes") or ()]
    if not classes:
        raise InputError(f"{weights} does not name its classes")
    if recipe.task != "detection" and Preprocess.from_metadata(metadata) is None:  # a run of before they were written
        labelled = replace(recipe, data=replace(recipe.data, unlabelled=None))
        data = open_data(task, labelled, make_accelerator(recipe.train))
        metadata = {**task.metadata(data), **metadata}
    preprocess = None if recipe.task == "detection" else Preprocess.from_metadata(metadata)
    model = _build(recipe, folder, task, classes, metadata)
    return Student(folder, recipe, task, model, classes, metadata, preprocess)


def _build(recipe: Recipe, folder: Path, task: Task, classes: Sequence[str], metadata: dict[str, Any]) -> nn.Module:
    """The model with its weights."""
    config = replace(recipe.student, weights=None, pretrained=False)
    if config.name.startswith("hf/") and (folder / "config.json").is_file():  # the folder says what the hub would say
        config = replace(config, name=f"hf/{folder}")
    data = SimpleNamespace(
        classes=classes, image_size=metadata.get("image_size"), in_channels=len(metadata.get("mean") or (0, 0, 0))
    )
    weights = models.run_weights(folder)
    model = with_head(task.student(replace(recipe, student=config), data), weights)
    models.load_weights(model, weights)
    models.adopt_config(model, metadata)
    return model.eval()


def student_data(student: Student, name: str | None = None, **changes: Any) -> tuple[Any, Placement]:
    """The run's data, or other data of the same classes, and where to compute.

    Args:
        student: whose data.
        name: other data.
        changes: further keys of the recipe's `data`.

    Raises:
        InputError: the data cannot be read, or have other classes than the student.
    """
    recipe = student.recipe
    config = replace(recipe.data, unlabelled=None, name=name or recipe.data.name, **changes)
    recipe = replace(recipe, data=config)
    accelerator = make_accelerator(recipe.train)
    data = open_data(student.task, recipe, accelerator)
    if list(data.classes) != student.classes:
        raise InputError(f"the classes of {config.name} are not those of the student in {student.folder}")
    return data, make_placement(student.task.train_config(recipe), accelerator)
