"""Detection on modules and loaders that were passed in, where a recipe would name them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pcdistill.data.loader import LoaderBatches
from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.table import adapter_of, register_user_adapters
from pcdistill.detection.packed import Target
from pcdistill.detection.task import Detection
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe, TeacherConfig


class LoaderDetectionBatches(LoaderBatches):
    """A user's loader of (images, targets): images [3, H, W] in 0..1 as a list or stacked, targets as torchvision's.

    A target holds "boxes" [M, 4] xyxy in pixels and "labels" [M] from 1; "area" and "iscrowd", for evaluation, follow
    from them where they are missing.
    """

    def _batch(self, item: Any) -> Any:
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(f"a loader of detection must yield (images, targets), got {type(item).__name__}")
        images, targets = list(item[0]), list(item[1])
        if len(images) != len(targets):
            raise InputError(f"a batch has {len(images)} images and {len(targets)} targets")
        for image in images:
            if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
                shown = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise InputError(f"an image of a batch must be a tensor [3, H, W] in 0..1, got {shown}")
        return DetectionBatch(images, [_whole(target) for target in targets])


def _whole(target: Any) -> Target:
    """A target with all that evaluation looks at."""
    if not (isinstance(target, dict) and {"boxes", "labels"} <= target.keys()):
        raise InputError('a target of a batch must be a mapping with "boxes" and "labels"')
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
        raise InputError(
            f"boxes must be [M, 4] and labels [M] for one image, got {list(boxes.shape)} and {list(labels.shape)}"
        )
    boxes = boxes.float()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = {key: value for key, value in target.items() if isinstance(value, Tensor)}
    return {"area": area, "iscrowd": torch.zeros_like(labels), **kept, "boxes": boxes}


@dataclass(frozen=True)
class Passed:
    """What a caller passed in.

    Attributes:
        student: a detector that an adapter fits.
        teacher: another, or None.
        train: batches to learn from.
        val: batches that choose the best epoch.
        test: batches that are looked at once, at the end.
        classes: names of the labels 1..K; None: their numbers.
        teacher_classes: names of the teacher's; None: the student's.
        teacher_image_size: side of the teacher's images, where the student's have their own.
    """

    student: nn.Module
    teacher: nn.Module | None
    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any] | None = None
    classes: Sequence[str] | None = None
    teacher_classes: Sequence[str] | None = None
    teacher_image_size: int | None = None


@dataclass(frozen=True)
class _Loaders:
    """What a run asks of data, for the caller's loaders."""

    classes: tuple[str, ...]
    train: LoaderDetectionBatches
    val: LoaderDetectionBatches
    test: LoaderDetectionBatches | None
    image_size: int | None = None


class PassedDetection(Detection):
    """Detection on what was passed in.

    Args:
        passed: models and loaders.
    """

    def __init__(self, passed: Passed) -> None:
        self._passed = passed

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        """The loaders; how many classes there are is known from the student.

        Raises:
            InputError: another number of classes is named.
        """
        register_user_adapters(recipe.detection.adapters)
        passed = self._passed
        count = adapter_of(passed.student).outputs - 1
        classes = tuple(passed.classes or (str(k + 1) for k in range(count)))
        if len(classes) != count:
            raise InputError(f"the student gives {count} classes of boxes, but {len(classes)} are named")
        test = None if passed.test is None else LoaderDetectionBatches(passed.test)
        return _Loaders(classes, LoaderDetectionBatches(passed.train), LoaderDetectionBatches(passed.val), test)

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        return self._passed.student

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        return True

    def teacher(
        self, config: TeacherConfig, student: nn.Module | None, data: Any, allow: Sequence[str]
    ) -> TeacherDetector:
        passed = self._passed
        assert passed.teacher is not None
        return TeacherDetector(
            passed.teacher,
            student_classes=data.classes,
            classes=passed.teacher_classes,
            student=student,
            image_size=passed.teacher_image_size,
        )

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any) -> None:
        """No pictures: a loader's images cannot be asked for one by one."""

    def draw_run(self, out: Path, *, missing_only: bool = False) -> None:
        """Nothing was left to draw."""
