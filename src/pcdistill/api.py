"""Distillation from Python, on plain modules and loaders."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcdistill.classification.passed import TRIED, channels_hint, count_classes, few_of, last_size, takes_one
from pcdistill.classification.task import Classification, build_distiller
from pcdistill.commands.run import run_with_report
from pcdistill.commands.tasks import passed_detection
from pcdistill.data.contents import loader_contents
from pcdistill.data.passed import RAW, LoaderBatches
from pcdistill.data.sharing import Share
from pcdistill.data.streaming import with_lengths
from pcdistill.distillation.passed import check_modules, first_pass, try_step
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.engine.modes import left_as_it_was
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError
from pcdistill.files import home_followed
from pcdistill.recipe import (
    ALONE,
    LOADERS,
    OptimConfig,
    Recipe,
    TeacherConfig,
    TrainConfig,
    load_recipe,
    make_recipe,
)


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
        loaders: tuple[Iterable[Any], Iterable[Any], Iterable[Any] | None],
        views: int,
        stats: tuple[Sequence[float], Sequence[float]] | None,
        console: Console,
    ) -> None:
        self._console = console
        self._student, self._teacher = student, teacher
        self._loaders, self._views, self._stats = loaders, views, stats

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Any:
        """The loaders, their first batches checked; how many classes there are is read off the student."""
        rank, world_size = accelerator.process_index, accelerator.num_processes
        train, val, test = self._loaders
        share, part = Share(rank, world_size), Share(rank, world_size, equal=False)
        batches = LoaderBatches(train, views=self._views, name="the training loader", share=share)
        held_out = LoaderBatches(val, name="the validation loader", share=part)
        last = None if test is None else LoaderBatches(test, name="the test loader", share=part)
        # What a loader of the user's own class does when it is gone through is not known: the test set waits.
        looked = [(one, one.look()) for one in (batches, held_out)]
        if last is not None and isinstance(test, DataLoader):
            looked.append((last, last.look()))
        images = looked[1][1][0].images
        num_classes = count_classes(self._student.to(accelerator.device), images[:2].float().to(accelerator.device))
        checked = [one.expect(num_classes, found, raw=RAW in recipe.allow) for one, found in looked]
        self._first = checked[0][0]  # of training
        if last is not None:
            last.expect(num_classes)
        self._check_outputs(num_classes, looked[1][1][0].target, images[:2].float().to(accelerator.device))
        classes = [str(i) for i in range(num_classes)]
        contents = {
            f"data.{name}.{what}": value
            for name, loader in (("train", train), ("val", val), ("test", test))
            for what, value in ({} if loader is None else loader_contents(loader)).items()
        }
        return _Loaders(classes, batches, held_out, last, images.shape[1], images.shape[-1], contents)

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any, placement: Placement) -> nn.Module:
        """The distiller, after a try on a few samples."""
        built = build_distiller(recipe, student, teacher, data=data, placement=placement).to(placement.device)
        few = few_of(self._first, self._views, TRIED).to(placement)
        try_step(built, few, placement, channels_hint(self._first.images))
        size = last_size(self._loaders[0])
        if size in (None, 1) and not takes_one(built, self._first, self._views, placement):
            data.train.fewest = 2
            if size == 1 and len(data.train) > 1:
                # Each process sees the same data set, and so the same size of the last batch.
                data.train.without_last()
                self._console.warn("the last batch of each epoch holds one image, too few for the student: left out")
        return built

    def _check_outputs(self, outputs: int, target: Tensor, images: Tensor) -> None:
        """Raise InputError for a student whose outputs are fewer or more than the classes that a teacher knows."""
        if self._teacher is None or target.ndim != 1 or target.is_floating_point():
            return
        with first_pass("teacher", images):
            top, teacher = int(target.max()), int(self._teacher.to(images.device)(images).shape[-1])
        if teacher != outputs and teacher == top + 1:
            raise InputError(
                f"the student gives {outputs} outputs for each image; labels of the first validation batch go up to "
                f"{top}, and the teacher gives {teacher} outputs: build the student with one output for each class"
            )

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        return self._student

    def try_student(self, recipe: Recipe, student: nn.Module, data: Any) -> None:
        """Done by `distiller`, on the loader's own images."""

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
    steps_per_epoch: int | None = None,
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
        teacher: images [N, C, H, W] -> logits [N, K]; frozen and in eval mode during the call, afterwards as it was.
            None trains the student alone. For detection a detector of torchvision or transformers, or one with a
            registered adapter.
        student: images -> logits [N, K], or a detector; trained in place. Parts of it that stand in eval mode, and
            parameters that require no gradient, stay so. It may be compiled.
        train: batches (images, target [N]); any iterable that can be iterated once per epoch. With views = 2,
            ((weak, strong), target). Labels are integers from 0, -100 for an image without one, or probabilities
            [N, K]. A last batch of one image is left out where the student's batch normalisation cannot take it, of
            a list or a DataLoader that tells its batch size. With several processes a DataLoader is split among them.
            For detection (images, targets): images [3, H, W] in 0..1, a list or stacked, and for each a mapping of
            "boxes" [M, 4] xyxy in pixels and "labels" [M] from 1.
        val: batches of held-out data; picks the best epoch, and the teacher must pass its gate on them.
        test: batches that best and last epoch and the teacher are evaluated on once, at the end.
        task: "detection" for boxes.
        method: a name of `pcdistill list methods`, or path/to/file.py:Class; None takes the default of the task's
            recipe, "default" or "detection". Names that this recipe gives a strength have it here too.
        losses: terms in the recipe's form, in place of the method's own, e.g.
            [{"method": "ce"}, {"method": "pcd", "strength": 4, "stages": 5}].
        epochs: length of the training.
        steps_per_epoch: batches of an epoch, for training data that are streamed and have no length: see
            :class:`pcdistill.data.streaming.Stepped`. Held-out loaders without a length are counted in one pass.
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
        allow: "weak-teacher" turns the teacher gate into a warning; "raw-images" lets pixels from 0 to 255 pass.
        verbose: print a line per epoch.

    Returns:
        The student with the last epoch's weights, a detector with the best epoch's (`train_options={"keep": "best"}`
        or "last" says which), the history, the summary.

    Raises:
        InputError: what does not fit, in one sentence: modules and the loaders' first batches before the first step.
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
    train, val, test = with_lengths(train, val, test, steps_per_epoch)
    with _words_of_python():
        recipe = _recipe(
            {
                "task": task,
                "detection": _keys("detection", detection),
                "method": method,
                "losses": [dict(term) for term in losses or ()],
                "teacher": None if teacher is None else {"name": type(teacher).__name__},
                "student": {"name": type(student).__name__},
                "data": {"name": LOADERS, "views": None if task == "detection" else views},
                "optim": {"lr": lr, **_keys("optim", optim)},
                "train": {"epochs": epochs, "seed": seed, **_keys("train_options", train_options)},
                "allow": list(allow),
            }
        )
    if out is None and recipe.train.trackers:
        raise InputError("train.trackers need a folder; give out")
    with _words_of_python():
        check_modules(student, teacher)
    console = Console(recipe.method, quiet=not verbose)
    with ExitStack() as stack:
        for module in (student, teacher):
            if module is not None:
                stack.enter_context(left_as_it_was(module))
        passed: Any
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
        else:
            frozen = None
            if teacher is not None:
                frozen = Teacher(
                    teacher,
                    class_map=class_map,
                    student_stats=student_stats,
                    teacher_stats=teacher_stats,
                    image_size=teacher_image_size,
                )
            passed = _Passed(student, frozen, (train, val, test), views, student_stats, console)
        stack.enter_context(_words_of_python())
        result = run_with_report(recipe, None if out is None else home_followed(out), console=console, task=passed)
    return Distilled(result.student.eval(), result.history, result.summary)


def _keys(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Further keys of the recipe, none by default."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} must be a mapping of keys of the recipe to values, got {type(given).__name__}")
    return dict(given or {})


def _recipe(tree: dict[str, Any]) -> Recipe:
    """The recipe of a call: where it names no method, the one that the task's own recipe names."""
    default = load_recipe("detection" if tree["task"] == "detection" else "default").to_dict()
    taught = tree["teacher"] is not None or tree["losses"]
    method = tree["method"] or (default["method"] if taught else ALONE)
    train = {"keep": default["train"]["keep"], **tree["train"]}
    return make_recipe({**tree, "method": method, "methods": default["methods"], "train": train}, "distill()")


@contextmanager
def _words_of_python() -> Iterator[None]:
    """Errors from inside speak of flags and keys; from here they speak of arguments."""
    try:
        yield
    except PcdistillError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise


def in_python(text: str) -> str:
    """A sentence that speaks of flags and of a recipe's keys, in the words of :func:`distill`."""
    optim = "|".join(one.name for one in fields(OptimConfig))
    train = "|".join(one.name for one in fields(TrainConfig))
    for pattern, words in (
        (r"--allow ([\w-]+)", r'allow=("\1",)'),
        (r"--out \(from Python: out\)", "out"),
        (r"--out (?!must\b)(\S+?)(?=[\s),;]|$)", r'out="\1"'),
        (r"--out\b", "out"),
        (r" \(--teacher-epochs N\b[^)]*\) or rename the class folders", ", or give its names in the student's words"),
        (r"\boptim\.lr\b", "lr"),
        (r"\btrain\.(epochs|seed)\b", r"\1"),
        (rf"\boptim\.({optim})\b", r'optim["\1"]'),
        (rf"\btrain\.({train})\b", r'train_options["\1"]'),
        (r"\bdata\.views\b", "views"),
        (r"\bdata\.batch_size\b", "the loader's batch size"),
        (r"\bteacher\.mean, teacher\.std\b", "teacher_stats"),
        (r"\bteacher\.image_size\b", "teacher_image_size"),
        (r"\bteacher\.classes\b", "class_map, or teacher_classes of a detector"),
        (r"\bthe same command\b", "the same call"),
    ):
        text = re.sub(pattern, words, text)
    return text
