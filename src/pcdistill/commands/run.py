"""`pcdistill train` and `pcdistill distill`: a run, its report and its student's card."""

from pathlib import Path
from typing import Any

from pcdistill.commands.session import RunResult, Session
from pcdistill.commands.tasks import Task
from pcdistill.engine.console import Console
from pcdistill.recipe import Recipe


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
