"""`pcdistill train` and `pcdistill distill`: a run, its report and its student's card."""

import shlex
from pathlib import Path
from typing import Any, Literal

from pcdistill import models
from pcdistill.commands.session import RunResult, Session
from pcdistill.commands.tasks import Task
from pcdistill.commands.teachers import teacher_file, teacher_folder
from pcdistill.engine.console import Console
from pcdistill.recipe import Recipe


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
