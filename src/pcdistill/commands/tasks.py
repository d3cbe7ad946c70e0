"""The table of tasks, and what a run asks of one. Everything else of a run is shared."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from pcdistill.data.findings import Findings
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Metric
from pcdistill.engine.placement import Placement
from pcdistill.recipe import DataConfig, Recipe, TeacherConfig, TrainConfig


class Task(Protocol):
    """A task, as a run needs it.

    Attributes:
        metric: what decides which epoch is best, in percent.
        label: the metric in running text.
    """

    metric: str
    label: str

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        """This process's share of the data, with `classes`, `train`, `val` and `test` (None where there is none)."""
        ...

    def check(self, recipe: Recipe, data: Any) -> None:
        """Raise InputError for losses that do not fit, before anything is trained."""
        ...

    def train_config(self, recipe: Recipe) -> TrainConfig:
        """The recipe's, with the task's own defaults."""
        ...

    def watch(self, recipe: Recipe, data: Any) -> Metric:
        """What the loop watches: the metric, and when to stop for it."""
        ...

    def student(self, recipe: Recipe, data: Any) -> nn.Module: ...

    def try_student(self, recipe: Recipe, student: nn.Module, data: Any) -> None:
        """Raise InputError for a student of the user's own code that cannot be trained; it is left as it is."""
        ...

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """Size of a model, for the record."""
        ...

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        """Whether a pretrained teacher can be used as it is."""
        ...

    def other_classes(self, config: TeacherConfig, data: Any) -> bool:
        """Whether a teacher's weights file is of other classes than the data's."""
        ...

    def teacher(self, config: TeacherConfig, student: nn.Module | None, data: Any, allow: Sequence[str]) -> Any:
        """The teacher over the data's classes; `student` is the one that it is to teach, if any."""
        ...

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        placement: Placement,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]:
        """Metrics of a teacher that can teach; `student` is one that has weights already. InputError for any other."""
        ...

    def distiller(
        self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any, placement: Placement
    ) -> nn.Module: ...

    def evaluate(self, model: nn.Module, batches: Any, data: Any, placement: Placement) -> dict[str, Any]:
        """Metrics of a model, and "samples"."""
        ...

    def splits(self, data: Any) -> dict[str, Any]:
        """Batches to evaluate on, by the split's name; None where the data has none."""
        ...

    def outputs(self, data: Any) -> int:
        """How many logits the losses compare: the classes, and the background if there is one."""
        ...

    def conditions(self, data: Any) -> dict[str, Any]:
        """What a reader of the metrics should know of how they were measured."""
        ...

    def metadata(self, data: Any) -> dict[str, Any]:
        """What stands beside the student's weights."""
        ...

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any, placement: Placement) -> None:
        """Leave in the run's folder what its page and other libraries need."""
        ...

    def findings(self, config: DataConfig, samples: int) -> Findings:
        """What there is to say about data before a training, with so many images to look at."""
        ...

    def model_names(self) -> list[str]:
        """Names of the models that a recipe of this task can ask for."""
        ...


def _classification() -> Task:
    from pcdistill.classification.task import Classification

    return Classification()


def _detection() -> Task:
    from pcdistill.detection.task import Detection

    return Detection()


def passed_detection(**passed: Any) -> Task:
    """Detection on models and loaders: the fields of :class:`pcdistill.detection.passed.Passed`."""
    from pcdistill.detection.passed import Passed, PassedDetection

    return PassedDetection(Passed(**passed))


TASKS: dict[str, Callable[[], Task]] = {"classification": _classification, "detection": _detection}


def task_of(recipe: Recipe) -> Task:
    """The recipe's task."""
    return TASKS[recipe.task]()
