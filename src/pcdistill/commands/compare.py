"""What the commands do: a run with its report, a comparison of methods over seeds, an evaluation."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcdistill import models, report
from pcdistill.commands.cache import fit_cache
from pcdistill.commands.session import RunResult, finished, run, teacher_recipe
from pcdistill.commands.tasks import data_of, task_of
from pcdistill.detection import pictures
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console, duration
from pcdistill.engine.loop import make_accelerator
from pcdistill.errors import InputError, TrainingStopped, nearest
from pcdistill.methods import METHODS
from pcdistill.models.heads import with_head
from pcdistill.recipe import Recipe, make_recipe, with_method

GROUPS = {"all-logit": "logits", "all-feature": "features", "all-detection": "pyramids"}


def run_with_report(
    recipe: Recipe, out: Path, *, console: Console, command: str | None = None, fresh: bool = False
) -> RunResult:
    """:func:`run`, then report.html and the student's card; a stopped run gets its report too."""
    try:
        result = run(recipe, out, console=console, command=command, fresh=fresh)
    except TrainingStopped:
        report.write_run_report(out)
        raise
    pictures.write_run_pictures(out)
    report.write_run_report(out)
    atomic_write(out / "README.md", report.write_model_card(out))
    return result


def expand_methods(text: str, recipe: Recipe) -> list[str]:
    """ "none,kd,all-logit" -> names of methods, in order, once each.

    Raises:
        InputError: naming the unknown method and the nearest known one.
    """
    found: list[str] = []
    known = ["none", *METHODS, *recipe.methods, *GROUPS]
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        if name in GROUPS:
            group = GROUPS[name]
            found += [
                key
                for key, method in METHODS.items()
                if (method.group or method.kind) == group and key not in ("ce", "detector")
            ]
        elif name in known or ".py:" in name:
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
) -> str:
    """One student under several methods and seeds, against one teacher; finished runs are kept, so it can be resumed.

    Args:
        recipe: data, models, schedule; its method is replaced.
        methods: names; "none" trains the student alone.
        seeds: 0 .. seeds - 1.
        out: folder of the comparison; one folder per method and seed in it.
        console: progress.
        command: what the user typed.

    Returns:
        The table as text; out/ then holds report.html, table.md and results.csv.
    """
    # wrong methods are known now
    recipes = {(m, s): fit_cache(with_method(recipe, m, s)) for m in methods for s in range(seeds)}
    teacher_out = out / "teacher"
    needed = any(method != "none" for method in methods)
    trained = teacher_recipe(recipe) if needed and not _covers(recipe) else None
    if trained is not None and recipe.teacher is not None:
        if finished(teacher_out, trained) is None:
            run_with_report(trained, teacher_out, console=_labelled(console, "teacher"), command=command)
        teacher = replace(recipe.teacher, weights=str(teacher_out / "student.safetensors"), pretrained=False)
        recipes = {key: replace(value, teacher=teacher) for key, value in recipes.items()}
    results: list[dict[str, Any]] = []
    curves: dict[tuple[str, int], list[dict[str, float]]] = {}
    total = len(recipes)
    console.start()
    # Seeds outermost: an interrupted comparison has every method at equal numbers of seeds.
    for done, (method, seed) in enumerate(sorted(recipes, key=lambda key: key[1])):
        one = recipes[method, seed]
        run_out = out / _folder(method) / f"seed-{seed}"
        summary = finished(run_out, one)
        if summary is None:
            if run_out.exists() and (run_out / "recipe.yaml").exists() and not (run_out / "last.pt").exists():
                shutil.rmtree(run_out)
            try:
                quiet = Console(quiet=True, stream=console.stream)
                summary = run_with_report(one, run_out, console=quiet, command=command).summary
            except TrainingStopped as stop:
                console.warn(f"{method}, seed {seed}: {stop}")
                summary = json.loads((run_out / "result.json").read_text())
        results.append(summary)
        curves[method, seed] = read_metrics(run_out / "metrics.csv")
        left = console.time_left((done + 1) / total)
        last = summary.get("last")
        task = task_of(recipe)
        value = (last["test"] or last["val"])[task.metric] if last else None
        shown = summary["status"] if value is None else f"{value:.2f} % {task.label}"
        tail = f"  ({duration(left)} left)" if left and done + 1 < total else ""
        console.say(f"[{done + 1}/{total}] {method}, seed {seed}: {shown}{tail}")
    pictures.write_compare_pictures(out, {method: out / _folder(method) / "seed-0" for method in methods})
    report.write_compare_report(out, results, curves, command or "")
    return report.format_table(report.compare_rows(results))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; empty cells are left out."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def evaluate_model(recipe: Recipe, weights: str | None, *, split: str = "test") -> dict[str, Any]:
    """The task's metrics of `recipe.student` with weights on a split of the recipe's data.

    Raises:
        InputError: there is no such split, or the weights do not fit.
    """
    accelerator = make_accelerator(recipe.train)
    task = task_of(recipe)
    data = data_of(recipe, accelerator)
    batches = task.splits(data).get(split)
    if batches is None:
        raise InputError(f"the data {recipe.data.name} has no {split} split; use --split val")
    bare = replace(recipe.student, weights=None, pretrained=recipe.student.pretrained and weights is None)
    model = task.student(replace(recipe, student=bare), data)
    if weights is not None:
        model = with_head(model, weights)
        models.load_weights(model, weights)
    model.to(accelerator.device)
    values = task.evaluate(model, batches, data, recipe, accelerator)
    return {
        "model": recipe.student.name,
        "weights": weights,
        "data": recipe.data.name,
        "split": split,
        **values,
        "samples": int(values["samples"]),
        **task.info(model, data),
    }


def run_recipe(out: Path) -> Recipe:
    """The recipe of an existing run's folder."""
    import yaml

    path = out / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{out} is not a run's folder: it has no recipe.yaml")
    return make_recipe(yaml.safe_load(path.read_text()), str(path))


def _covers(recipe: Recipe) -> bool:
    """Whether the teacher is pretrained on the data's classes; opens the data only if that can be."""
    teacher = recipe.teacher
    if teacher is None or teacher.weights is not None or not teacher.pretrained:
        return False
    return task_of(recipe).knows_classes(teacher, data_of(recipe, make_accelerator(recipe.train)))


def _labelled(console: Console, label: str) -> Console:
    return Console(label, quiet=console.quiet, stream=console.stream)


def _folder(method: str) -> str:
    """A method's name as a folder: a user's `path/file.py:Class` becomes `Class`."""
    return method.rsplit(":", 1)[-1].replace("/", "_")
