"""One run in a folder: data, teacher, gate, training, the test set once, and the files that prove it."""

import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from pcdistill import models
from pcdistill.classification.task import weights_exist
from pcdistill.commands.cache import replayed
from pcdistill.commands.tasks import Task, data_of, numbers, task_of
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console, duration
from pcdistill.engine.loop import Fit, Interrupted, Record, Trainer
from pcdistill.engine.placement import Placement, make_accelerator, make_placement
from pcdistill.engine.tracking import check_trackers, make_trackers
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.models.heads import head_metadata
from pcdistill.recipe import Recipe, TeacherConfig, make_recipe

PACKAGES = ("pcdistill", "torch", "torchvision", "timm", "accelerate", "numpy")


@dataclass
class RunResult:
    """A finished run: its folder, what result.json holds, and the student with the kept weights."""

    out: Path
    summary: dict[str, Any]
    student: nn.Module


def run(
    recipe: Recipe,
    out: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    fresh: bool = False,
    data: Any = None,
) -> RunResult:
    """Carry out a recipe in a folder; the same call after an interruption continues, and after the end does nothing.

    Args:
        recipe: what to do; without a teacher the student is trained alone.
        out: the run's folder.
        console: progress.
        command: what the user typed, for the record.
        fresh: refuse to continue what is in the folder.
        data: already built data, for comparisons that share it.

    Raises:
        InputError: wrong input, found before training wherever that is possible.
        TrainingStopped: diverged or collapsed; the folder says so.
        Interrupted: stopped by a signal; the same call continues.
    """
    console = console or Console(quiet=True)
    task = task_of(recipe)
    digest = recipe.digest()
    _claim_folder(out, digest, fresh)
    check_trackers(recipe)
    weights_exist(recipe.student.weights)
    if recipe.teacher is not None:
        weights_exist(recipe.teacher.weights)

    kinds = {term.method for term in recipe.losses}
    accelerator = make_accelerator(recipe.train, unused_parameters=bool(kinds - {"ce", "kd", "pcd", "lskd"}))
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    set_seed(recipe.train.seed)
    data = data or data_of(recipe, accelerator)

    task.check(recipe, data)
    teacher: Any = None
    teacher_summary: dict[str, Any] | None = None
    set_seed(recipe.train.seed)
    student = task.student(recipe, data)
    student_summary = {"name": recipe.student.name, **task.info(student, data)}
    student.to(accelerator.device)
    placement = make_placement(task.train(recipe, accelerator), accelerator, student)  # a wrong choice is refused here
    if recipe.teacher is not None and recipe.method != "none":
        config = recipe.teacher
        trained = None if task.knows_classes(config, data) else teacher_recipe(recipe)
        if trained is not None:
            console.say(f"no weights for the teacher {config.name}: training it first, {trained.train.epochs} epochs")
            teacher_console = Console("teacher", quiet=console.quiet, stream=console.stream)
            run(trained, out / "teacher", console=teacher_console, command=command, data=data)
            config = replace(config, weights=str(out / "teacher" / "student.safetensors"), pretrained=False)
        teacher = task.teacher(config, student, data, recipe.allow)
        teacher.to(accelerator.device)
        teacher_summary = {"name": config.name, **task.info(teacher, data)}
        weighted = student if recipe.student.weights is not None else None
        gate = task.gate(teacher, weighted, data, placement, recipe.allow, console)
        console.say(f"teacher {config.name}: {gate[task.metric]:.2f} % {task.label} on held-out images")
        if config.cache is not None:
            data = replayed(recipe, teacher, data, accelerator)
    distiller = task.distiller(recipe, student, teacher, data, placement)
    if distiller.student is not student:  # a method gave it a new head
        student = distiller.student  # type: ignore[assignment]
        student_summary.update(task.info(student, data))

    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "recipe.yaml", recipe.to_yaml())
        atomic_write(out / "environment.json", json.dumps(environment(accelerator, command), indent=2) + "\n")
    accelerator.wait_for_everyone()

    def validate(model: nn.Module) -> dict[str, float]:
        return numbers(task.evaluate(model, data.val, data, placement))

    trainer = Trainer(
        distiller,
        data.train,
        validate,
        optim=recipe.optim,
        train=task.train(recipe, accelerator),
        placement=placement,
        metric=task.watch(recipe, data),
        record=Record(out, digest, console, make_trackers(recipe, out, enabled=accelerator.is_main_process)),
    )
    # Training draws from the generators as the seed left them, whatever building the models drew.
    set_seed(recipe.train.seed)
    if trainer.resume():
        console.say(f"resumed from {out / 'last.pt'} in epoch {trainer.epoch + 1}")
    started = time.monotonic()
    try:
        fit = trainer.fit()
    except Interrupted as stop:
        raise Interrupted(f"{stop}; a checkpoint is in {out}: the same command continues") from None
    except TrainingStopped as stop:
        summary = _summary(recipe, "stopped", teacher_summary, student_summary, trainer.history)
        summary["notes"] = [str(stop)]
        if accelerator.is_main_process:
            _write_summary(out, summary)
        raise

    summary = _summary(recipe, "done", teacher_summary, student_summary, trainer.history)
    summary["seconds_this_session"] = time.monotonic() - started
    _final_evaluation(summary, task, fit, student, teacher, data, placement)
    kept = fit.best_state if recipe.train.keep == "best" else fit.last_state
    student.load_state_dict(kept)
    if accelerator.is_main_process:
        models.save_weights(
            student,
            out / "student.safetensors",
            {
                "model": recipe.student.name,
                "classes": list(data.classes),
                **task.metadata(data),
                **head_metadata(student),
                "digest": digest,
            },
        )
        task.finish(out, distiller, student, data)
        _write_summary(out, summary)
    accelerator.wait_for_everyone()
    chosen = summary[recipe.train.keep]
    console.say(
        f"{console.label}  done: best epoch {summary['best']['epoch']} has "
        f"{summary['best']['val'][task.metric]:.2f} % {task.label} on validation; kept the {recipe.train.keep}"
        + (f", {chosen['test'][task.metric]:.2f} % on test" if chosen["test"] else "")
        + f"; {duration(summary['seconds'])}"
    )
    return RunResult(out, summary, student)


def teacher_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe that trains the teacher first, or None when it has weights. The seed is the student's."""
    config = recipe.teacher
    if config is None or config.weights is not None:
        return None
    if config.epochs == 0:
        if config.pretrained:
            return None
        raise InputError(
            f"the teacher {config.name} has no weights: give teacher.weights (--teacher-weights FILE), or "
            "teacher.epochs (--teacher-epochs N) to train it first"
        )
    tree = recipe.to_dict()
    tree.update(method="none", losses=[], methods={}, teacher=None, student=_as_student(config))
    tree["train"].update(epochs=config.epochs)
    return make_recipe(tree)


def _as_student(config: TeacherConfig) -> dict[str, Any]:
    return {"name": config.name, "pretrained": config.pretrained, "kwargs": config.kwargs}


def environment(accelerator: Accelerator | None = None, command: str | None = None) -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    if accelerator is not None:
        found.update(
            device=str(accelerator.device),
            processes=accelerator.num_processes,
            precision={"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision],
        )
    return found


def _commit() -> str | None:
    """The commit of the code that runs, when it runs from a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _claim_folder(out: Path, digest: str, fresh: bool) -> None:
    """Refuse a folder that holds another run."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; --out must name a folder")
    recipe_file = out / "recipe.yaml"
    started = recipe_file.exists() or (out / "last.pt").exists()
    if fresh and started:
        raise InputError(f"{out} already holds a run; name another --out, or leave out --fresh to continue it")
    result = out / "result.json"
    if result.exists():
        try:
            found = json.loads(result.read_text())
        except ValueError:
            found = {}
        if found.get("digest") not in (None, digest):
            raise InputError(f"{out} holds the result of another recipe; name another --out, or delete the folder")


def finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a run that was already carried out to the end in this folder, with this recipe."""
    path = out / "result.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None
    return found if found.get("digest") == recipe.digest() and found.get("status") != "running" else None


def _summary(
    recipe: Recipe,
    status: str,
    teacher: dict[str, Any] | None,
    student: dict[str, Any],
    history: list[dict[str, float]],
) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["seconds"] * row["images_per_second"] for row in history)
    return {
        "status": status,
        "task": recipe.task,
        "method": recipe.method,
        "seed": recipe.train.seed,
        "data": recipe.data.name,
        "metric": task_of(recipe).metric,
        "digest": recipe.digest(),
        "teacher": teacher,
        "student": student,
        "best": None,
        "last": None,
        "kept": recipe.train.keep,
        "epochs": recipe.train.epochs,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds > 0 else None,
        "notes": [],
    }


def _final_evaluation(
    summary: dict[str, Any],
    task: Task,
    fit: Fit,
    student: nn.Module,
    teacher: Any,
    data: Any,
    placement: Placement,
) -> None:
    """Evaluate best and last on validation and, here only, on the test set."""

    def measure(model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, batches in (("val", data.val), ("test", data.test)):
            if batches is None:
                found[name] = None
                continue
            values = task.evaluate(model, batches, data, placement)
            found[name] = {key: value for key, value in values.items() if key != "samples"}
        return found

    for name, epoch, state in (
        ("best", fit.best_epoch, fit.best_state),
        ("last", len(fit.history), fit.last_state),
    ):
        if name == "last" and epoch == fit.best_epoch:  # the same weights
            summary[name] = dict(summary["best"])
            continue
        student.load_state_dict(state)
        summary[name] = {"epoch": epoch, **measure(student)}
    if teacher is not None:
        summary["teacher"].update(measure(teacher))
    if data.test is None:
        summary["notes"].append("no test set: best was chosen on the same validation images that it is reported on")


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    atomic_write(out / "result.json", json.dumps(summary, indent=2) + "\n")
