"""Detection on modules and loaders that were passed in, where a recipe would name them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pcdistill.data.contents import loader_contents
from pcdistill.data.passed import RAW
from pcdistill.data.sharing import Share
from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.table import adapter_of, register_user_adapters
from pcdistill.detection.loaders import LoaderDetectionBatches
from pcdistill.detection.task import TRIED, Detection, build_detection_distiller
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.passed import try_step
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe, TeacherConfig


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
    contents: dict[str, str]
    image_size: int | None = None


class PassedDetection(Detection):
    """Detection on what was passed in.

    Args:
        passed: models and loaders.
    """

    def __init__(self, passed: Passed) -> None:
        self._passed = passed

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        """The loaders, their first batches checked; how many classes there are is known from the student.

        Raises:
            InputError: another number of classes is named, or a batch does not fit.
        """
        register_user_adapters(recipe.detection.adapters)
        passed = self._passed
        count = adapter_of(passed.student).outputs - 1
        classes = tuple(passed.classes or (str(k + 1) for k in range(count)))
        if len(classes) != count:
            raise InputError(f"the student gives {count} classes of boxes, but {len(classes)} are named")
        rank, world_size = accelerator.process_index, accelerator.num_processes
        share, part = Share(rank, world_size), Share(rank, world_size, equal=False)
        train = LoaderDetectionBatches(passed.train, count, name="the training loader", share=share)
        val = LoaderDetectionBatches(passed.val, count, name="the validation loader", share=part)
        test = None
        if passed.test is not None:
            test = LoaderDetectionBatches(passed.test, count, name="the test loader", share=part)
        as_meant = RAW in recipe.allow or _takes_as_they_are(passed.student)
        # What a loader of the user's own class does when it is gone through is not known: the test set waits.
        for one in (train, val, test if isinstance(passed.test, DataLoader) else None):
            looked: Any = [] if one is None else one.look()
            if one is train:
                self._first = looked[0]
            if one is not None and not as_meant:
                one.check_pixels(looked)
        if isinstance(passed.val, DataLoader | list | tuple):
            _refuse_without_boxes(LoaderDetectionBatches(passed.val, count, name="the validation loader"))
        contents = {
            f"data.{name}.{what}": value
            for name, loader in (("train", passed.train), ("val", passed.val), ("test", passed.test))
            for what, value in ({} if loader is None else loader_contents(loader)).items()
        }
        return _Loaders(classes, train, val, test, contents)

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any, placement: Placement) -> nn.Module:
        """The distiller, after a try on a few images."""
        built = build_detection_distiller(recipe, student, teacher, data).to(placement.device)
        few = DetectionBatch(self._first.images[:TRIED], self._first.targets[:TRIED]).to(placement)
        try_step(built, few, placement)
        return built

    def try_student(self, recipe: Recipe, student: nn.Module, data: Any) -> None:
        """Done by `distiller`."""

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

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any, placement: Placement) -> None:
        """No samples: a loader's images cannot be asked for one by one."""


def _refuse_without_boxes(batches: LoaderDetectionBatches) -> None:
    """Raise InputError for held-out batches that no epoch can be chosen by; up to the first box they are read."""
    every: Iterable[Any] = batches.epoch(0)
    if not any(bool((target["iscrowd"] == 0).any()) for batch in every for target in batch.targets):
        raise InputError(
            f"{batches.name}: no image of its {len(batches)} batches has a box to choose the best epoch by; check "
            "where its targets come from"
        )


def _takes_as_they_are(student: nn.Module) -> bool:
    """Whether a detector does not normalise: then its images may be in any range."""
    mean, std = adapter_of(student).stats
    return all(value == 0 for value in mean) and all(value == 1 for value in std)
