"""`pcdistill train` and `pcdistill distill`: a run, its report and its student's card."""

import shlex
from pathlib import Path
from typing import Any, Literal

from pcdistill import models
from pcdistill.commands.ending import write_pages
from pcdistill.commands.folder import refuse_another_run
from pcdistill.commands.session import RunResult, Session
from pcdistill.commands.tasks import Task
from pcdistill.commands.teachers import teacher_file, teacher_folder
from pcdistill.distillation.cache_replay import resolve_cache
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.recipe import ALONE, Recipe, with_method
from pcdistill.report.worth import BASELINE_FOLDER


def run_with_report(
    recipe: Recipe,
    out: Path | None,
    *,
    console: Console | None = None,
    command: str | None = None,
    task: Task | None = None,
    role: Literal["student", "teacher"] = "student",
) -> RunResult:
    """A run in a folder, with its report and the student's card; a stopped run gets its report too.

    Args and errors are those of :class:`pcdistill.commands.session.Session`.
    """
    return Session(recipe, out, task=task, console=console, command=command, role=role).run()


def run_with_baseline(recipe: Recipe, out: Path, *, console: Console, command: str | None = None) -> str:
    """A run, and beside it the same student trained alone, on the same batches; the page then compares the two.

    Returns:
        Both results as text.

    Raises:
        InputError: the recipe has no teacher, or the baseline's folder holds another one.
    """
    if not recipe.distils:
        raise InputError("--baseline trains the same student without a teacher beside; this recipe has no teacher")
    alone = resolve_cache(with_method(recipe, ALONE, recipe.train.seed))
    refuse_another_run(out / BASELINE_FOLDER, alone, root=out)
    found = run_with_report(recipe, out, console=console, command=command)
    beside = run_with_report(alone, out / BASELINE_FOLDER, console=console.labelled(BASELINE_FOLDER), command=command)
    write_pages(out, found.summary)
    lines = result_text(found.summary, out).splitlines()
    lone = [line for line in result_text(beside.summary, out).splitlines() if line.startswith("student")]
    return "\n".join([*lines[:-1], *(f"{line}, trained alone" for line in lone), lines[-1]])


def result_text(summary: dict[str, Any], out: Path) -> str:
    """A finished run in a few lines: teacher, best and last epoch with the number of images, where the student is."""
    split = "test" if summary["last"]["test"] else "val"
    metric, label = summary["metric"], "AP" if summary["metric"] == "map" else "top-1"
    images = summary.get("images", {}).get(split)
    of = f" of {images:,} images" if images else ""
    lines = []
    if summary["teacher"]:
        size, found = summary["teacher"].get("parameters"), summary["teacher"].get(split)
        known = f"{split} {label} {found[metric]:.2f} %" if found else "known by its cache alone"
        lines.append(f"teacher   {_millions(size)}  {known}")
    size = summary["student"]["parameters"]
    for which in ("best", "last"):
        epoch, value = summary[which]["epoch"], summary[which][split][metric]
        lines.append(f"student   {_millions(size)}  {split} {label} {value:.2f} %{of}  ({which} epoch, {epoch})")
    lines.append(f"kept the {summary['kept']} epoch: {models.run_weights(out)}; report: {out / 'report.html'}")
    return "\n".join(lines + reuse_lines(summary, out))


def reuse_lines(summary: dict[str, Any], out: Path) -> list[str]:
    """How the teacher that was trained in a folder is used again."""
    teacher = summary["teacher"] or {}
    name = shlex.quote(str(teacher.get("name")))
    found = [] if "members" in teacher else [teacher_file(out / teacher_folder(0))]
    return [
        f"the teacher can be used again: --teacher {name} --teacher-weights {shlex.quote(str(file))}"
        for file in found
        if file.exists()
    ]


def _millions(parameters: int | None) -> str:
    return " " * 21 if parameters is None else f"{parameters / 1e6:8.2f} M parameters"
