"""`pcdistill compare`: one student under several methods and seeds, against one teacher."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcdistill import report
from pcdistill.commands.cache import fit_cache
from pcdistill.commands.folder import read_metrics, recorded_summary
from pcdistill.commands.run import run_with_report
from pcdistill.commands.session import open_data, teacher_folder, teacher_recipe
from pcdistill.commands.tasks import task_of
from pcdistill.engine.console import Console, duration
from pcdistill.engine.placement import make_accelerator
from pcdistill.errors import InputError, TrainingStopped, nearest
from pcdistill.methods import METHODS
from pcdistill.models.names import is_user_code
from pcdistill.recipe import ALONE, Recipe, TeacherConfig, with_method
from pcdistill.stats import MARGIN

GROUPS = {"all-logit": "logits", "all-feature": "features", "all-detection": "pyramids"}


def expand_methods(text: str, recipe: Recipe) -> list[str]:
    """ "none,kd,all-logit" -> names of methods, in order, once each.

    Raises:
        InputError: naming the unknown method and the nearest known one.
    """
    found: list[str] = []
    known = [ALONE, *METHODS, *recipe.methods, *GROUPS]
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        if name in GROUPS:
            own = ("ce", "detector")  # the tasks' own losses
            found += [k for k, m in METHODS.items() if (m.group or m.kind) == GROUPS[name] and k not in own]
        elif name in known or is_user_code(name):
            found.append(name)
        else:
            raise InputError(f'unknown method "{name}"{nearest(name, known)}; known: {", ".join(known)}')
    if not found:
        raise InputError("--methods must name at least one method")
    return list(dict.fromkeys(found))


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    *,
    console: Console,
    command: str | None = None,
    margin: float = MARGIN,
) -> str:
    """One student under several methods and seeds, against one teacher; finished runs are kept, so it can be resumed.

    Args:
        recipe: data, models, schedule; its method is replaced.
        methods: names; "none" trains the student alone.
        seeds: 0 .. seeds - 1.
        out: folder of the comparison; one folder per method and seed in it.
        console: progress.
        command: what the user typed.
        margin: points of the metric; a difference below it may pass for none.

    Returns:
        Verdict and table as text; out/ then holds report.html, table.md and results.csv.

    Raises:
        InputError: wrong input; a method that cannot be built is known before anything is trained.
    """
    # Seeds outermost: an interrupted comparison has every method at equal numbers of seeds.
    recipes = {(m, s): fit_cache(with_method(recipe, m, s)) for s in range(seeds) for m in methods}
    if any(one.distils for one in recipes.values()):
        recipes = _with_teachers(recipe, recipes, out, console=console, command=command)
    task = task_of(recipe)
    results: list[dict[str, Any]] = []
    curves: dict[tuple[str, int], list[dict[str, float]]] = {}
    waiting = {key for key, one in recipes.items() if recorded_summary(_run_folder(out, *key), one) is None}
    console.start(1 - len(waiting) / len(recipes))
    for done, ((method, seed), one) in enumerate(recipes.items(), start=1):
        run_out = _run_folder(out, method, seed)
        summary = recorded_summary(run_out, one) or _carry_out(one, run_out, console=console, command=command)
        results.append(summary)
        curves[method, seed] = read_metrics(run_out / "metrics.csv")
        waiting.discard((method, seed))
        left = console.time_left(1 - len(waiting) / len(recipes))  # of runs that are trained: reused ones take no time
        tail = f"  ({duration(left)} left)" if left and waiting else ""
        console.say(f"[{done}/{len(recipes)}] {method}, seed {seed}: {_value(summary, task.label)}{tail}")
    task.draw_comparison(out, {method: _run_folder(out, method, 0) for method in methods})
    report.write_compare_report(out, results, curves, command or "", margin=margin)
    return report.format_table(report.compare_rows(results, margin=margin))


def _with_teachers(
    recipe: Recipe,
    recipes: dict[tuple[str, int], Recipe],
    out: Path,
    *,
    console: Console,
    command: str | None,
) -> dict[tuple[str, int], Recipe]:
    """The recipes, with teachers that are trained once, in `out`, where they have no weights for the classes."""
    for number, config in enumerate(recipe.all_teachers):
        trained = None if _knows_classes(recipe, config) else teacher_recipe(recipe, number)
        if trained is None:
            continue
        name = teacher_folder(number)
        if recorded_summary(out / name, trained) is None:
            run_with_report(trained, out / name, console=console.labelled(name), command=command)
        changes = {"weights": str(out / name / "student.safetensors"), "pretrained": False}
        recipes = {key: _with_teacher(one, number, changes) for key, one in recipes.items()}
    return recipes


def _with_teacher(recipe: Recipe, number: int, changes: dict[str, Any]) -> Recipe:
    """The same with one of its teachers changed."""
    teachers = list(recipe.all_teachers)
    teachers[number] = replace(teachers[number], **changes)
    return recipe.with_teachers(teachers)


def _knows_classes(recipe: Recipe, teacher: TeacherConfig) -> bool:
    """Whether the teacher is pretrained on the data's classes; opens the data only if that can be."""
    if teacher.weights is not None or not teacher.pretrained:
        return False
    task = task_of(recipe)
    return task.knows_classes(teacher, open_data(task, recipe, make_accelerator(recipe.train)))


def _carry_out(recipe: Recipe, out: Path, *, console: Console, command: str | None) -> dict[str, Any]:
    """The summary of a run that is not finished; a run that stops itself is a result too."""
    if (out / "recipe.yaml").exists() and not (out / "last.pt").exists():  # nothing in it can be continued
        shutil.rmtree(out)
    try:
        return run_with_report(recipe, out, console=Console(quiet=True, stream=console.stream), command=command).summary
    except TrainingStopped as stop:
        console.warn(f"{recipe.method}, seed {recipe.train.seed}: {stop}")
        summary: dict[str, Any] = json.loads((out / "result.json").read_text())
        return summary


def _value(summary: dict[str, Any], label: str) -> str:
    last = summary.get("last")
    if not last:
        return str(summary["status"])
    return f"{(last['test'] or last['val'])[summary['metric']]:.2f} % {label}"


def _run_folder(out: Path, method: str, seed: int) -> Path:
    return out / _folder(method) / f"seed-{seed}"


def _folder(method: str) -> str:
    """A method's name as a folder: a user's `path/file.py:Class` becomes `Class`."""
    return method.rsplit(":", 1)[-1].replace("/", "_")
