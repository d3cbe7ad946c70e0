"""`pcdistill train` and `pcdistill distill`: a run, its report and its student's card."""

from pathlib import Path
from typing import Any

from pcdistill.commands.ending import write_pages
from pcdistill.commands.folder import refuse_another_run
from pcdistill.commands.session import RunResult, Session
from pcdistill.commands.tasks import Task
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
) -> RunResult:
    """A run in a folder, with its report and the student's card; a stopped run gets its report too.

    Args and errors are those of :class:`pcdistill.commands.session.Session`.
    """
    return Session(recipe, out, task=task, console=console, command=command).run()


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
    """A finished run in a few lines: teacher, best and last epoch, where the student is."""
    split = "test" if summary["last"]["test"] else "val"
    metric, label = summary["metric"], "AP" if summary["metric"] == "map" else "top-1"
    lines = []
    if summary["teacher"]:
        size, value = summary["teacher"]["parameters"] / 1e6, summary["teacher"][split][metric]
        lines.append(f"teacher   {size:8.2f} M parameters  {split} {label} {value:.2f} %")
    size = summary["student"]["parameters"] / 1e6
    for which in ("best", "last"):
        epoch, value = summary[which]["epoch"], summary[which][split][metric]
        lines.append(f"student   {size:8.2f} M parameters  {split} {label} {value:.2f} %  ({which} epoch, {epoch})")
    lines.append(f"kept the {summary['kept']} epoch: {out / 'student.safetensors'}; report: {out / 'report.html'}")
    return "\n".join(lines)
