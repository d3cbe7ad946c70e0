"""One run: data, teacher, gate, training, the test set once, and the files that prove it."""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from pcdistill import models
from pcdistill.commands.big_teachers import check_big_teachers, in_turns, split_teacher, warn_of_precision
from pcdistill.commands.claim import check_folder, claimed
from pcdistill.commands.ending import METRICS, load_student, repair, stored_history, write_pages
from pcdistill.commands.environment import continued, environment
from pcdistill.commands.folder import (
    read_json,
    recorded_summary,
    refuse_another_run,
    refuse_stopped_run,
    settle_contents,
)
from pcdistill.commands.header import Told, header, recipe_text, starts_from
from pcdistill.commands.tasks import Task, task_of
from pcdistill.commands.teachers import (
    cached_facts,
    comes_from_cache,
    teacher_file,
    teacher_folder,
    teacher_recipe,
    training_of,
    without_model,
)
from pcdistill.distillation.cache_replay import replayed
from pcdistill.distillation.objective import (
    build_objective,
    fitted_terms,
    method_kind,
    resolved_terms,
    short_name,
    term_needs,
)
from pcdistill.distillation.teacher import Teacher, TeacherEnsemble
from pcdistill.distillation.unused import unused_parameters
from pcdistill.engine.checkpoint import atomic_write, load_state
from pcdistill.engine.console import Console, duration
from pcdistill.engine.fingerprint import KEPT, Contents, student_contents, teacher_contents, weights_fingerprint
from pcdistill.engine.loop import Fit, Interrupted, Record, Trainer, write_history
from pcdistill.engine.placement import (
    Placement,
    launched_alone,
    make_accelerator,
    make_placement,
    tell_unused,
)
from pcdistill.engine.together import FailTogether
from pcdistill.engine.tracking import Tracker, Trackers, check_trackers
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.files import clear_parts, home_followed, sealed_json
from pcdistill.models.heads import head_metadata
from pcdistill.models.names import is_user_code
from pcdistill.models.weights import TEACHER_FILE, check_file
from pcdistill.recipe import LOADERS, ModelConfig, Recipe, StudentConfig, TeacherConfig

ALONE_ON_CPU = (
    "accelerate launch was given several processes and started one, as it does without GPUs; on CPUs use "
    "torchrun --nproc_per_node N -m pcdistill ..."
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
        role: what the trained model is to be; the weights of a "teacher" are called teacher.safetensors.
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
        role: Literal["student", "teacher"] = "student",
    ) -> None:
        self.recipe, self.out = recipe, out
        self.task = task or task_of(recipe)
        self.data = data
        self.console = console or Console(quiet=True)
        self.command, self.trackers, self.role = command, trackers, role
        self.teacher: Any = None
        self.stored: dict[str, Any] | None = None  # the result of a run that is done
        self.models: dict[str, dict[str, Any] | None] = {"teacher": None, "student": None}
        self.contents: Contents = {}  # fingerprints of what the result is made of
        self.logging: Trackers | None = None
        self.seconds = 0.0
        self._training: dict[int, Recipe | None] = {}  # of teachers by number
        self._teachers: dict[int, tuple[Any, dict[str, Any]]] = {}  # that are built, and what is known of them

    @property
    def weights(self) -> Path:
        """The file that the kept weights go to."""
        assert self.out is not None
        return teacher_file(self.out) if self.role == "teacher" else models.run_weights(self.out)

    def run(self) -> RunResult:
        """All three steps, with the folder held against other processes. Of the run's own, one that fails ends all.

        Raises:
            InputError: wrong input; the folder is not ours, or holds another run.
            PcdistillError: another process is at work in the folder.
            TrainingStopped: diverged or collapsed, now or in an earlier call; the folder says so.
            Interrupted: stopped by a signal; the same call continues.
        """
        with FailTogether(), claimed(self.out, "run", self.recipe):
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
        if launched_alone(self.accelerator):
            self.console.warn(ALONE_ON_CPU)
        if self.stored is None:
            warn_of_precision(self.accelerator, self.console)
            check_big_teachers(recipe, self.accelerator, self.console)
        if not self.accelerator.is_main_process:
            self.console = Console(quiet=True)
        set_seed(recipe.train.seed)
        if self.data is None:
            self.data = open_data(self.task, recipe, self.accelerator)
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
            if self.logging is not None:
                self.logging.close()
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
        load_state(self.student, self.fit.best_state if keep == "best" else self.fit.last_state)
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
        # A student alone may be trained beside its comparison's teacher, whose file is not there yet.
        for config in (self.recipe.student, *(self.recipe.all_teachers if self.recipe.distils else ())):
            if config.weights is not None:
                check_file(config.weights)

    def _build_student(self) -> None:
        self.student = self.task.student(self.recipe, self.data)
        self.task.try_student(self.recipe, self.student, self.data)
        self.models["student"] = {"name": self.recipe.student.name, **self.task.info(self.student, self.data)}
        self.contents |= student_contents(self.student)
        self.student.to(self.accelerator.device)
        # A wrong choice of memory format is refused before the teacher is trained.
        self.placement = make_placement(self.task.train_config(self.recipe), self.accelerator, self.student)

    def _build_teacher(self) -> None:
        """The teacher, each of several through its gate; from its cache where it has one."""
        recipe = self.recipe
        if self.stored is None and self.role == "student":
            self._say_header()
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
        if self._is_cached(number):
            config = self.recipe.all_teachers[number]
            cached = cached_facts(config)
            self.contents[f"{teacher_folder(number)}.cache"] = cached.pop("fingerprint")
            return None, cached
        config = self._with_weights(number)
        teacher, known = self._made_teacher(number, config)
        facts = {"name": config.name, **known}
        if not config.shard:
            teacher.to(self.accelerator.device)
        if self.stored is not None:
            return teacher, facts
        weighted = self.student if self.recipe.student.weights is not None else None
        found = self.task.gate(teacher, weighted, self.data, self.placement, self.recipe.allow, self.console)
        self.console.say(f"teacher {config.name}: {found[self.task.metric]:.2f} % {self.task.label} on held-out images")
        return teacher, facts

    def _with_weights(self, number: int) -> TeacherConfig:
        """A teacher's config, after training it in the run's folder if it has no weights for these classes."""
        config = self.recipe.all_teachers[number]
        recipe = self._trained_by(number)
        if recipe is None or self.out is None:
            return config
        name = teacher_folder(number)
        if self.stored is not None:
            return replace(config, weights=str(teacher_file(self.out / name)), pretrained=False)
        if self.accelerator.is_main_process and not (self.out / "last.pt").exists():  # what the folder is to hold
            atomic_write(self.out / "recipe.yaml", recipe_text(self.recipe, self.task.outputs(self.data)))
        self.console.say(f"training the teacher {config.name} first, {recipe.train.epochs} epochs")
        # Its own seed has its own order, and it learns from labelled images alone.
        data = self.data if number == 0 and recipe.data == self.recipe.data else None
        console, out = self.console.labelled(name), self.out / name
        Session(recipe, out, task=self.task, data=data, console=console, command=self.command, role="teacher").run()
        return replace(config, weights=str(teacher_file(out)), pretrained=False)

    def _trained_by(self, number: int) -> Recipe | None:
        """The recipe that trains a teacher first; None for one that has weights for these classes."""
        if number not in self._training:
            self._training[number] = training_of(self.recipe, number, self.task, self.data)
        return self._training[number]

    def _is_cached(self, number: int) -> bool:
        """Whether a teacher is there by its stored logits alone."""
        one = len(self.recipe.all_teachers) == 1
        return one and self.recipe.distils and comes_from_cache(self.recipe.all_teachers[number])

    def _made_teacher(self, number: int, config: TeacherConfig) -> tuple[Any, dict[str, Any]]:
        """A teacher with its weights, and its size; built once, and split at once where it is to be."""
        if number not in self._teachers:
            with in_turns(self.accelerator) if config.shard else nullcontext():
                teacher = self.task.teacher(config, self.student, self.data, self.recipe.allow)
                self.contents |= teacher_contents(teacher, teacher_folder(number))
                self._teachers[number] = teacher, self.task.info(teacher, self.data)
                if config.shard:
                    shape = self.data.in_channels, self.data.image_size
                    split_teacher(teacher, self.accelerator, shape, self.console)
        return self._teachers[number]

    def _say_header(self) -> None:
        """What is about to happen, before anything is trained."""
        passed = self.recipe.data.name == LOADERS
        teachers = [self._told(number) for number in range(len(self.recipe.all_teachers) if self.recipe.distils else 0)]
        starts = "your module" if passed else starts_from(self.recipe.student, self.recipe.task)
        student = Told("student", self.recipe.student.name, starts, self.models["student"] or {})
        for line in header(self.recipe, self.data, [*teachers, student], self.accelerator, self.out):
            self.console.say(line)

    def _told(self, number: int) -> Told:
        """A teacher for the header. One that has weights is built for it; of others a bare one tells the size.

        The random generators are left as training without a header would find them.
        """
        config = self.recipe.all_teachers[number]
        if self._is_cached(number):
            facts = cached_facts(config)
            return Told("teacher", str(facts["name"]), f"its logits come from {config.cache}", facts)
        if self.recipe.data.name == LOADERS:
            return Told("teacher", config.name, "your module", self._made_teacher(number, config)[1])
        one = len(self.recipe.all_teachers) == 1
        if config.outside or (one and self._trained_by(number) is None):
            facts = self._made_teacher(number, config)[1]
            return Told("teacher", config.name, starts_from(config, self.recipe.task), facts)
        with torch.random.fork_rng(devices=[]):
            trained = training_of(self.recipe, number, self.task, self.data)
            facts = self.task.info(bare_model(self.recipe, config, self.task, self.data), self.data)
        starts = starts_from(config, self.recipe.task)
        if trained is not None:
            starts += f", and is trained first ({trained.train.epochs} epochs)"
        return Told("teacher", config.name, starts, facts)

    def _has_teachers(self) -> bool:
        """Whether the teachers of a run that is done can be built: their weights may have been taken away."""
        assert self.out is not None
        for number, config in enumerate(self.recipe.all_teachers if self.recipe.distils else ()):
            if self._is_cached(number):
                continue
            if config.shard:  # there may be fewer processes now, and no need of it
                return False
            own = teacher_file(self.out / teacher_folder(number))
            trained = self._trained_by(number) is not None
            if (trained and not own.is_file()) or (
                config.weights is not None and not home_followed(config.weights).is_file()
            ):
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
            atomic_write(self.out / "recipe.yaml", recipe_text(self.recipe, self.task.outputs(self.data)))
            path = self.out / "environment.json"
            found = continued(read_json(path) if resumed else {}, environment(self.accelerator, self.command))
            atomic_write(path, json.dumps(found, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def _make_trainer(self) -> Trainer:
        main = self.accelerator.is_main_process
        if self.out is not None:
            self.logging = Trackers(self.recipe, self.out, enabled=main)
        own: tuple[Tracker, ...] = () if self.logging is None else (self.logging,)
        self._find_unused()
        return Trainer(
            self.distiller,
            self.data.train,
            self._validate,
            optim=self.recipe.optim,
            train=self.task.train_config(self.recipe),
            placement=self.placement,
            metric=self.task.watch(self.recipe, self.data),
            record=Record(self.out, self.recipe.digest(), self.console, (*own, *self.trackers), contents=self.contents),
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
        load_state(self.student, fit.best_state)
        best = {"epoch": fit.best_epoch, **self._measure(self.student)}
        if epochs == fit.best_epoch:  # the same weights
            return {"best": best, "last": dict(best)}
        load_state(self.student, fit.last_state)
        return {"best": best, "last": {"epoch": epochs, **self._measure(self.student)}}

    def _save_student(self) -> None:
        if self.out is not None and self.accelerator.is_main_process:
            self._save_weights()
            self.task.finish(self.out, self.distiller, self.student, self.data, self.placement)
        if isinstance(self.teacher, Teacher):
            self.teacher.finish()  # of a sharded one the main process asked alone

    def _save_weights(self) -> None:
        assert self.out is not None
        metadata = {
            "model": self.recipe.student.name,
            **self.task.metadata(self.data),
            **head_metadata(self.student),
            "digest": self.recipe.digest(),
        }
        models.save_weights(self.student, self.weights, metadata)

    def _summary(self, status: str) -> dict[str, Any]:
        """result.json without its evaluations."""
        recipe, history = self.recipe, self.trainer.history
        seconds = sum(row["seconds"] for row in history)
        images = sum(row["seconds"] * row["images_per_second"] for row in history)
        return {
            "status": status,
            "task": recipe.task,
            "method": recipe.method,
            "losses": resolved_terms(recipe, self.task.outputs(self.data)),
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
            "images": {split: self._samples(split) for split in ("train", "val", "test")},
            "contents": dict(self.contents),
            **({"file": TEACHER_FILE} if self.role == "teacher" and self.weights.name == TEACHER_FILE else {}),
        }

    def _samples(self, split: str) -> int | None:
        """Images of a split; None where there is none, or nobody tells."""
        found: int | None = getattr(getattr(self.data, split), "num_samples", None)
        return found

    def _leave(self, summary: dict[str, Any]) -> None:
        """The record of epochs, pages, and last the result: with it, the folder is complete."""
        if self.out is None or not self.accelerator.is_main_process:
            return
        if self.trainer.history:
            write_history(self.out / METRICS, self.trainer.history)
        write_pages(self.out, summary)
        atomic_write(self.out / "result.json", sealed_json(summary))

    def _as_stored(self, summary: dict[str, Any]) -> RunResult:
        """A run that is done, out of its folder; files that can be made of others are made again."""
        assert self.out is not None
        history = stored_history(self.out)
        self.student = load_student(self.out, self.student, summary)
        if self.accelerator.is_main_process:
            if not self.weights.exists():
                self._save_weights()
            repair(self.out, recipe_text(self.recipe, self.task.outputs(self.data)), history)
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
        if not without_model(config):
            bare_model(recipe, config, task, data)


def bare_model(recipe: Recipe, config: ModelConfig, task: Task, data: Any) -> nn.Module:
    """A model of the recipe for the data, without weights."""
    bare = StudentConfig(name=config.name, kwargs=config.kwargs, features=config.features)
    return task.student(replace(recipe, student=bare), data)


def try_own_student(recipe: Recipe, task: Task, data: Any) -> None:
    """Raise InputError if the student is of the user's own code and cannot be trained."""
    if is_user_code(recipe.student.name):
        task.try_student(recipe, bare_model(recipe, recipe.student, task, data), data)


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
    if not recipe.distils and (taught := [term for term in terms if term_needs(term, "losses").teacher]):
        names = ", ".join(short_name(term.method) for term in taught)
        raise InputError(f"the terms {names} need a teacher; name one, or use method none")
    if all(method_kind(term.method) == "logits" for term in terms) and recipe.detection.pairing != "anchors":
        return build_objective(fitted_terms(recipe), num_classes=task.outputs(data)).notes
    if not recipe.distils or recipe.teachers or recipe.data.name == LOADERS:
        return []
    model = bare_model(recipe, recipe.student, task, data)
    teacher = task.teacher(replace(recipe.all_teachers[0], weights=None, pretrained=False), model, data, recipe.allow)
    accelerator = make_accelerator(recipe.train)
    placement = make_placement(task.train_config(recipe), accelerator, model)
    model.to(accelerator.device)
    objective: Any = task.distiller(recipe, model, teacher, data, placement).objective
    notes: list[str] = objective.notes
    return notes
