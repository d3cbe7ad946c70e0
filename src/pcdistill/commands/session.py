"""One run: data, teacher, gate, training, the test set once, and the files that prove it."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from pcdistill import models
from pcdistill.commands.claim import check_folder, claimed
from pcdistill.commands.ending import METRICS, WEIGHTS, load_student, repair, stored_history, write_pages
from pcdistill.commands.environment import continued, environment
from pcdistill.commands.folder import (
    read_json,
    recorded_summary,
    refuse_another_run,
    refuse_stopped_run,
    settle_contents,
)
from pcdistill.commands.tasks import Task, task_of
from pcdistill.distillation.cache_replay import replayed
from pcdistill.distillation.objective import build_objective, fitted_terms, method_kind
from pcdistill.distillation.teacher import TeacherEnsemble
from pcdistill.distillation.unused import unused_parameters
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console, duration
from pcdistill.engine.fingerprint import KEPT, Contents, student_contents, teacher_contents, weights_fingerprint
from pcdistill.engine.loop import Fit, Interrupted, Record, Trainer, write_history
from pcdistill.engine.placement import Placement, make_accelerator, make_placement, tell_unused
from pcdistill.engine.tracking import Tracker, check_trackers, make_trackers
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.files import clear_parts, sealed_json
from pcdistill.models.heads import head_metadata
from pcdistill.models.names import is_user_code
from pcdistill.models.weights import check_file
from pcdistill.recipe import (
    ALONE,
    LOADERS,
    ModelConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    make_recipe,
    scaled_milestones,
)

NO_TEST = "no test set: best was chosen on the same validation images that it is reported on"


@dataclass
class RunResult:
    """A finished run.

    Attributes:
        out: its folder, if it has one.
        summary: what result.json holds.
        student: with the kept weights.
        history: one dict per epoch, the rows of metrics.csv.
    """

    out: Path | None
    summary: dict[str, Any]
    student: nn.Module
    history: list[dict[str, float]]


class Session:
    """One run in three steps: :meth:`prepare`, :meth:`train`, :meth:`conclude`.

    In a folder, the same session after an interruption continues, and after the end trains nothing more.

    Args:
        recipe: what to do; without a teacher the student is trained alone.
        out: the run's folder; None keeps nothing on disk.
        task: what the run works on; by default the recipe's task.
        data: already built data, for runs that share it.
        console: progress.
        command: what the user typed, for the record.
        trackers: called with (row, step) after every epoch, beside the recipe's own.
    """

    accelerator: Accelerator
    placement: Placement
    student: nn.Module
    distiller: nn.Module
    trainer: Trainer
    fit: Fit

    def __init__(
        self,
        recipe: Recipe,
        out: Path | None = None,
        *,
        task: Task | None = None,
        data: Any = None,
        console: Console | None = None,
        command: str | None = None,
        trackers: tuple[Tracker, ...] = (),
    ) -> None:
        self.recipe, self.out = recipe, out
        self.task = task or task_of(recipe)
        self.data = data
        self.console = console or Console(quiet=True)
        self.command, self.trackers = command, trackers
        self.teacher: Any = None
        self.stored: dict[str, Any] | None = None  # the result of a run that is done
        self.models: dict[str, dict[str, Any] | None] = {"teacher": None, "student": None}
        self.contents: Contents = {}  # fingerprints of what the result is made of
        self.seconds = 0.0

    def run(self) -> RunResult:
        """All three steps, with the folder held against other processes.

        Raises:
            InputError: wrong input; the folder is not ours, or holds another run.
            PcdistillError: another process is at work in the folder.
            TrainingStopped: diverged or collapsed, now or in an earlier call; the folder says so.
            Interrupted: stopped by a signal; the same call continues.
        """
        with claimed(self.out, "run", self.recipe):
            self.prepare()
            self.train()
            return self.conclude()

    def prepare(self) -> None:
        """Build everything; a teacher without weights is trained on the way. What can be checked early is.

        For a run that is done, only what gives its student back is built, and nothing is evaluated.

        Raises:
            InputError: wrong input.
            TrainingStopped: the folder holds this run, and it was stopped.
        """
        recipe = self.recipe
        self._check_folder()
        if self.stored is None:
            self._check_files()
        self.accelerator = make_accelerator(recipe.train)
        if not self.accelerator.is_main_process:
            self.console = Console(quiet=True)
        set_seed(recipe.train.seed)
        if self.data is None:
            self.data = open_data(self.task, recipe, self.accelerator)
            if self.stored is None:
                say_origins(self.data, self.console)
        self.task.check(recipe, self.data)
        set_seed(recipe.train.seed)
        self._build_student()
        if self.stored is not None and not self._has_teachers():
            self._settle_contents()
            return
        self._build_teacher()
        self._settle_contents()
        self._build_distiller()
        if self.stored is not None:
            return
        self.trainer = self._make_trainer()
        # Training draws from the generators as the seed left them, whatever building the models drew.
        set_seed(recipe.train.seed)
        resumed = self.trainer.resume()  # which refuses before anything in the folder is written
        self._record(resumed)
        if resumed:
            self.console.say(f"resumed from {self.out}/last.pt in epoch {self.trainer.epoch + 1}")

    def train(self) -> None:
        """Train to the end, from the start or from where the folder's checkpoint is.

        Raises:
            TrainingStopped: diverged or collapsed; the folder says so.
            Interrupted: stopped by a signal; the same call continues.
        """
        if self.stored is not None:
            return
        started = time.monotonic()
        try:
            self.fit = self.trainer.fit()
        except Interrupted as stop:
            kept = "" if self.out is None else f"; a checkpoint is in {self.out}: the same command continues"
            raise Interrupted(f"{stop}{kept}", stop.signal) from None
        except TrainingStopped as stop:
            self._leave({**self._summary("stopped"), "notes": [str(stop)]})
            raise
        finally:
            self.console.close()
        self.seconds = time.monotonic() - started

    def conclude(self) -> RunResult:
        """Evaluate best and last epoch, here only on the test set; keep one of them, and write the student's file.

        Of a run that is done the stored result is given back, and files that are missing are made again.
        """
        if self.stored is not None:
            return self._as_stored(self.stored)
        summary = self._summary("done")
        summary["seconds_this_session"] = self.seconds
        summary.update(self._measure_epochs())
        if self.teacher is not None:
            summary["teacher"].update(self._measure(self.teacher))
        if self.data.test is None:
            summary["notes"].append(NO_TEST)
        keep = self.recipe.train.keep
        self.student.load_state_dict(self.fit.best_state if keep == "best" else self.fit.last_state)
        summary["contents"] = {**self.contents, KEPT: weights_fingerprint(self.student.state_dict())}
        self._save_student()
        self._leave(summary)
        self.accelerator.wait_for_everyone()
        self._say_result(summary)
        return RunResult(self.out, summary, self.student, self.fit.history)

    # Parts of prepare

    def _check_folder(self) -> None:
        """The folder holds nothing, or this run: its result stands in `stored` once it is done."""
        if self.out is None:
            return
        check_folder(self.out, "run", self.recipe)
        try:
            refuse_another_run(self.out, self.recipe)
            for number, name in enumerate(map(teacher_folder, range(len(self.recipe.all_teachers)))):
                trained = teacher_recipe(self.recipe, number) if (self.out / name).is_dir() else None
                if trained is not None and self.recipe.distils:
                    refuse_another_run(self.out / name, trained, root=self.out)
                    refuse_stopped_run(self.out / name, trained, root=self.out)
        except InputError:
            check_names(self.recipe, self.task, self.data)  # a mistyped name is not another recipe
            raise
        refuse_stopped_run(self.out, self.recipe)
        self.stored = recorded_summary(self.out, self.recipe)

    def _check_files(self) -> None:
        if self.out is not None:
            clear_parts(self.out)
        check_trackers(self.recipe)
        for config in (self.recipe.student, *self.recipe.all_teachers):
            if config.weights is not None:
                check_file(config.weights)

    def _build_student(self) -> None:
        self.student = self.task.student(self.recipe, self.data)
        self.models["student"] = {"name": self.recipe.student.name, **self.task.info(self.student, self.data)}
        self.contents |= student_contents(self.student)
        if self.recipe.data.name != LOADERS and self.stored is None:  # else the caller knows
            phrase = weights_phrase(self.recipe.student, self.recipe.task)
            self.console.say(f"student {self.recipe.student.name}: starts from {phrase}")
        self.student.to(self.accelerator.device)
        # A wrong choice of memory format is refused before the teacher is trained.
        self.placement = make_placement(self.task.train_config(self.recipe), self.accelerator, self.student)

    def _build_teacher(self) -> None:
        """The teacher, each of several through its gate; from its cache where it has one."""
        recipe = self.recipe
        if not recipe.distils:
            return
        configs = recipe.all_teachers
        members, facts = zip(*(self._one_teacher(number) for number in range(len(configs))), strict=True)
        self.teacher, self.models["teacher"] = members[0], facts[0]
        if recipe.teachers:
            weights = [config.weight for config in configs]
            self.teacher = TeacherEnsemble(members, weights, recipe.teachers_combine)
            self.models["teacher"] = {
                "name": " + ".join(config.name for config in configs),
                **self.task.info(self.teacher, self.data),
                "combine": recipe.teachers_combine,
                "members": [{**fact, "weight": w} for fact, w in zip(facts, weights, strict=True)],
            }
        if any(config.cache is not None for config in configs) and self.stored is None:
            self.data = replayed(recipe, self.teacher, self.data, self.accelerator)

    def _one_teacher(self, number: int) -> tuple[Any, dict[str, Any]]:
        """A teacher that passed its gate, and what is known of it."""
        config = self._with_weights(number)
        teacher = self.task.teacher(config, self.student, self.data, self.recipe.allow)
        teacher.to(self.accelerator.device)
        self.contents |= teacher_contents(teacher, teacher_folder(number))
        facts = {"name": config.name, **self.task.info(teacher, self.data)}
        if self.stored is not None:
            return teacher, facts
        weighted = self.student if self.recipe.student.weights is not None else None
        if self.recipe.data.name != LOADERS:
            self.console.say(f"teacher {config.name}: has {weights_phrase(config, self.recipe.task)}")
        found = self.task.gate(teacher, weighted, self.data, self.placement, self.recipe.allow, self.console)
        self.console.say(f"teacher {config.name}: {found[self.task.metric]:.2f} % {self.task.label} on held-out images")
        return teacher, facts

    def _with_weights(self, number: int) -> TeacherConfig:
        """A teacher's config, after training it in the run's folder if it has no weights for these classes."""
        config = self.recipe.all_teachers[number]
        recipe = None if self.task.knows_classes(config, self.data) else teacher_recipe(self.recipe, number)
        if recipe is None or self.out is None:
            return config
        name = teacher_folder(number)
        if self.stored is not None:
            return replace(config, weights=str(self.out / name / WEIGHTS), pretrained=False)
        self.console.say(f"no weights for the teacher {config.name}: training it first, {recipe.train.epochs} epochs")
        # Its own seed has its own order, and it learns from labelled images alone.
        data = self.data if number == 0 and recipe.data == self.recipe.data else None
        console, out = self.console.labelled(name), self.out / name
        Session(recipe, out, task=self.task, data=data, console=console, command=self.command).run()
        return replace(config, weights=str(out / WEIGHTS), pretrained=False)

    def _has_teachers(self) -> bool:
        """Whether the teachers of a run that is done can be built: their weights may have been taken away."""
        assert self.out is not None
        for number, config in enumerate(self.recipe.all_teachers if self.recipe.distils else ()):
            own = self.out / teacher_folder(number) / WEIGHTS
            trained = config.weights is None and not self.task.knows_classes(config, self.data)
            if (trained and not own.is_file()) or (config.weights is not None and not Path(config.weights).is_file()):
                return False
        return True

    def _settle_contents(self) -> None:
        """The main process's contents are the run's: another may have a share of its own of a user's data."""
        self.contents |= getattr(self.data, "contents", {})
        (self.contents,) = broadcast_object_list([self.contents])
        if self.out is not None:
            settle_contents(self.out, self.contents)

    def _build_distiller(self) -> None:
        self.distiller = self.task.distiller(self.recipe, self.student, self.teacher, self.data, self.placement)
        objective: Any = self.distiller.objective
        for note in objective.notes if self.stored is None else ():
            self.console.say(note)
        if self.teacher is not None and self.recipe.student.head == "teacher" and self.stored is None:
            self.console.say("the student's classifier starts from the teacher's")
        if self.distiller.student is not self.student:  # a method gave it a new head
            self.student = self.distiller.get_submodule("student")
            facts = self.task.info(self.student, self.data)
            self.models["student"] = {"name": self.recipe.student.name, **facts}

    def _record(self, resumed: bool) -> None:
        """recipe.yaml and environment.json; a run that goes on keeps its record, and adds to it."""
        if self.out is not None and self.accelerator.is_main_process:
            atomic_write(self.out / "recipe.yaml", self.recipe.to_yaml())
            path = self.out / "environment.json"
            found = continued(read_json(path) if resumed else {}, environment(self.accelerator, self.command))
            atomic_write(path, json.dumps(found, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def _make_trainer(self) -> Trainer:
        main = self.accelerator.is_main_process
        trackers = () if self.out is None else make_trackers(self.recipe, self.out, enabled=main)
        self._find_unused()
        return Trainer(
            self.distiller,
            self.data.train,
            self._validate,
            optim=self.recipe.optim,
            train=self.task.train_config(self.recipe),
            placement=self.placement,
            metric=self.task.watch(self.recipe, self.data),
            record=Record(
                self.out, self.recipe.digest(), self.console, (*trackers, *self.trackers), contents=self.contents
            ),
        )

    def _find_unused(self) -> None:
        """Distributed training must know whether any parameter gets no gradient, in any process."""
        if self.accelerator.num_processes == 1:
            return
        batch = next(iter(self.data.train.epoch(0))).to(self.placement)
        with self.accelerator.autocast():
            unused = float(bool(unused_parameters(self.distiller.to(self.accelerator.device), batch)))
        found = self.accelerator.reduce(torch.tensor(unused, device=self.accelerator.device))
        tell_unused(self.accelerator, bool(found.item() > 0))

    def _validate(self, model: nn.Module) -> dict[str, float]:
        """What a row of metrics.csv takes of an evaluation: plain numbers."""
        found = self.task.evaluate(model, self.data.val, self.data, self.placement)
        return {key: value for key, value in found.items() if isinstance(value, float) and key != "samples"}

    # Parts of conclude

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        """The task's metrics by split; None where the data has no such split."""
        found: dict[str, Any] = {}
        for split, batches in (("val", self.data.val), ("test", self.data.test)):
            if batches is None:
                found[split] = None
                continue
            values = self.task.evaluate(model, batches, self.data, self.placement)
            found[split] = {key: value for key, value in values.items() if key != "samples"}
        return found

    def _measure_epochs(self) -> dict[str, Any]:
        """ "best" and "last", each with its epoch."""
        fit, epochs = self.fit, len(self.fit.history)
        self.student.load_state_dict(fit.best_state)
        best = {"epoch": fit.best_epoch, **self._measure(self.student)}
        if epochs == fit.best_epoch:  # the same weights
            return {"best": best, "last": dict(best)}
        self.student.load_state_dict(fit.last_state)
        return {"best": best, "last": {"epoch": epochs, **self._measure(self.student)}}

    def _save_student(self) -> None:
        if self.out is not None and self.accelerator.is_main_process:
            self._save_weights()
            self.task.finish(self.out, self.distiller, self.student, self.data)

    def _save_weights(self) -> None:
        assert self.out is not None
        metadata = {
            "model": self.recipe.student.name,
            **self.task.metadata(self.data),
            **head_metadata(self.student),
            "digest": self.recipe.digest(),
        }
        models.save_weights(self.student, self.out / WEIGHTS, metadata)

    def _summary(self, status: str) -> dict[str, Any]:
        """result.json without its evaluations."""
        recipe, history = self.recipe, self.trainer.history
        seconds = sum(row["seconds"] for row in history)
        images = sum(row["seconds"] * row["images_per_second"] for row in history)
        return {
            "status": status,
            "task": recipe.task,
            "method": recipe.method,
            "seed": recipe.train.seed,
            **({} if recipe.strength is None else {"strength": recipe.strength}),
            "threads": torch.get_num_threads(),
            "data": recipe.data.name,
            "metric": self.task.metric,
            "digest": recipe.digest(),
            **self.models,
            "best": None,
            "last": None,
            "kept": recipe.train.keep,
            "epochs": recipe.train.epochs,
            "seconds": seconds,
            "images_per_second": images / seconds if seconds > 0 else None,
            "notes": [],
            "contents": dict(self.contents),
        }

    def _leave(self, summary: dict[str, Any]) -> None:
        """The record of epochs, pages, and last the result: with it, the folder is complete."""
        if self.out is None or not self.accelerator.is_main_process:
            return
        if self.trainer.history:
            write_history(self.out / METRICS, self.trainer.history)
        self.task.draw_run(self.out)
        write_pages(self.out, summary)
        atomic_write(self.out / "result.json", sealed_json(summary))

    def _as_stored(self, summary: dict[str, Any]) -> RunResult:
        """A run that is done, out of its folder; files that can be made of others are made again."""
        assert self.out is not None
        history = stored_history(self.out)
        self.student = load_student(self.out, self.student, summary)
        if self.accelerator.is_main_process:
            if not (self.out / WEIGHTS).exists():
                self._save_weights()
            repair(self.out, self.recipe, history)
            self.task.draw_run(self.out, missing_only=True)
            write_pages(self.out, summary, missing_only=True)
        self.accelerator.wait_for_everyone()
        self.console.say(f"{self.out} holds this run, which is done: nothing was trained")
        return RunResult(self.out, summary, self.student, history)

    def _say_result(self, summary: dict[str, Any]) -> None:
        metric, label, keep = self.task.metric, self.task.label, self.recipe.train.keep
        best, kept = summary["best"], summary[keep]
        test = f", {kept['test'][metric]:.2f} % on test" if kept["test"] else ""
        self.console.say(
            f"{self.console.label}  done: best epoch {best['epoch']} has {best['val'][metric]:.2f} % {label} on "
            f"validation; kept the {keep}{test}; {duration(summary['seconds'])}"
        )


def run(recipe: Recipe, out: Path, *, console: Console | None = None, command: str | None = None) -> RunResult:
    """Carry out a recipe in a folder, as :class:`Session` does."""
    return Session(recipe, out, console=console, command=command).run()


def open_data(task: Task, recipe: Recipe, accelerator: Accelerator) -> Any:
    """The recipe's data, this process's share. A batch of the loader is one micro-batch of gradient accumulation.

    Raises:
        InputError: the batch cannot be shared equally.
    """
    micro = recipe.train.accumulate * accelerator.num_processes
    if recipe.data.batch_size % micro != 0:
        raise InputError(
            f"data.batch_size {recipe.data.batch_size} must be divisible by train.accumulate x processes = {micro}"
        )
    return task.data(recipe, accelerator)


def check_names(recipe: Recipe, task: Task, data: Any = None) -> None:
    """Build the data and the models of a recipe, without weights, for what they say of names and options.

    Raises:
        InputError: one is mistyped, or does not fit.
    """
    if recipe.data.name == LOADERS:
        return
    data = open_data(task, recipe, make_accelerator(recipe.train)) if data is None else data
    task.check(recipe, data)
    for config in (recipe.student, *recipe.all_teachers):
        bare = StudentConfig(name=config.name, kwargs=config.kwargs, features=config.features)
        task.student(replace(recipe, student=bare), data)


def say_origins(data: Any, console: Console) -> None:
    """Where validation and test come from: a split that the data lack is made of another."""
    for split, origin in getattr(data, "origins", {}).items():
        if split != "train" and origin not in ("drawn", getattr(data, "name", None)):
            console.say(f"{split} is {origin}: {getattr(data, split).num_samples} images")


def rehearse(recipe: Recipe, task: Task, data: Any) -> list[str]:
    """Check a recipe, and build its student, teacher and objective with random weights, before anything is trained.

    Models are built only where a term compares more than logits: of these the check knows all.

    Returns:
        What the terms say of how they were built.

    Raises:
        InputError: a term that does not fit the data, the models, or the two models each other.
    """
    task.check(recipe, data)
    terms = [term for term in recipe.losses if term.method != "detector"]
    if all(method_kind(term.method) == "logits" for term in terms) and recipe.detection.pairing != "anchors":
        return build_objective(fitted_terms(recipe), num_classes=task.outputs(data)).notes
    if not recipe.distils or recipe.teachers or recipe.data.name == LOADERS:
        return []
    accelerator = make_accelerator(recipe.train)
    student, config = recipe.student, recipe.all_teachers[0]
    bare = StudentConfig(name=student.name, kwargs=student.kwargs, features=student.features)
    model = task.student(replace(recipe, student=bare), data)
    teacher = task.teacher(replace(config, weights=None, pretrained=False), model, data, recipe.allow)
    placement = make_placement(task.train_config(recipe), accelerator, model)
    model.to(accelerator.device)
    objective: Any = task.distiller(recipe, model, teacher, data, placement).objective
    notes: list[str] = objective.notes
    return notes


def weights_phrase(config: ModelConfig, task: str) -> str:
    """Which weights a model has at the start, in words."""
    if config.weights is not None:
        return f"the weights in {config.weights}"
    if not config.pretrained:
        return "random weights"
    if is_user_code(config.name):
        return "the weights that its own function gives it"
    zoo, _, backbone = config.name.partition("/")
    if task == "detection" and zoo not in ("torchvision", "hf"):
        zoo = "timm" if backbone.startswith("timm/") else "torchvision"
        return f"{zoo}'s pretrained weights in its backbone, and random ones in the rest"
    return f"{zoo}'s pretrained weights"


def teacher_folder(number: int) -> str:
    """Where a run or a comparison trains its teacher; of several, the first is 0."""
    return "teacher" if number == 0 else f"teacher-{number + 1}"


def teacher_recipe(recipe: Recipe, number: int = 0) -> Recipe | None:
    """The recipe that trains a teacher first, or None when it has weights.

    The seed is the student's plus the teacher's number, so that several of one architecture differ.
    """
    if number >= len(recipe.all_teachers):
        return None
    config = recipe.all_teachers[number]
    if config.weights is not None:
        return None
    if config.epochs == 0:
        if config.pretrained:
            return None
        own = ", or teacher.pretrained true if the function gives a trained model" if is_user_code(config.name) else ""
        raise InputError(
            f"the teacher {config.name} has no weights: give teacher.weights (--teacher-weights FILE), or "
            f"teacher.epochs (--teacher-epochs N) to train it first{own}"
        )
    tree = recipe.to_dict()
    student = {"name": config.name, "pretrained": config.pretrained, "kwargs": config.kwargs}
    tree.update(method=ALONE, losses=[], methods={}, teacher=None, teachers=[], student=student)
    tree["optim"]["milestones"] = scaled_milestones(recipe.optim.milestones, recipe.train.epochs, config.epochs)
    tree["train"].update(epochs=config.epochs, seed=recipe.train.seed + number)
    tree["data"].update(unlabelled=None, unlabelled_batch=None)
    return make_recipe(tree)
