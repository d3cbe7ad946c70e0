"""One page for one run: what it was, what came out, its curves, its recipe, how to do it again."""

from pathlib import Path
from typing import Any

from pcdistill.engine.console import duration
from pcdistill.recipe import ALONE
from pcdistill.report._folder import Run, read_run, replace_file
from pcdistill.report._format import MISSING, SPLITS, count, metric_name, number, short_metric, shown, sizes_in
from pcdistill.report._page import render
from pcdistill.report._pictures import pictures_of
from pcdistill.report.plots import learning_curves, term_curves
from pcdistill.report.rows import value_at
from pcdistill.report.speed import read_speed, speed_cells, speed_notes

COLUMNS = ("top1", "top5", "map", "map_50", "map_75", "map_small", "map_medium", "map_large", "loss")
CURVE_NOTES = [
    "The training loss is the whole objective, distillation terms included; the validation loss is the task's own "
    "alone. Training is measured on augmented images while the weights move. Compare shapes, not heights."
]


def write_run_report(run_dir: Path, result: dict[str, Any] | None = None) -> Path:
    """Write report.html into a run's folder, from whatever the folder holds, finished or not.

    Args:
        run_dir: folder with recipe.yaml, environment.json, metrics.csv, result.json and pictures/*.png; a file that is
            missing or broken is named on the page. AP is expected in percent, as top-1 is.
        result: what result.json will hold, where it is written last; by default what it holds.

    Returns:
        The page's path. It is one file, loads nothing, and everything in it is escaped.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, result)
    page = render("run.html.j2", **_values(run), **_result_table(run), **pictures_of(run_dir))
    return replace_file(run_dir / "report.html", page)


def _values(run: Run) -> dict[str, Any]:
    result, metric = run.result, metric_of(run)
    status = str(result.get("status") or "not finished")
    best = _dict(result.get("best"))
    environment = dict(run.environment)
    command = environment.pop("command", None)
    reached = _best_epoch(run, metric)
    return {
        "title": title_of(run),
        "subtitle": subtitle_of(run),
        "status": status,
        "done": status == "done",
        "header": _header(run, metric),
        "warned": _warnings(run, status),
        "curves": learning_curves(run.rows, metric, number(best.get("epoch")) or (reached[0] if reached else None)),
        "so_far": f"Best on validation so far: {reached[1]:.2f} % {short_metric(metric)}, in epoch {reached[0]:g}."
        if reached
        else "",
        "curve_notes": CURVE_NOTES if any("val/loss" in row for row in run.rows) else [],
        "terms": term_curves(run.rows),
        **_speed(run),
        "command": command,
        "environment": _flat(environment),
        "recipe": run.recipe_text,
        "recipe_open": False,
    }


def _speed(run: Run) -> dict[str, Any]:
    """What `pcdistill bench` measured, where it did."""
    found = read_speed(run.path)
    if found is None:
        return {"speed": []}
    return {"speed": speed_cells(found), "speed_notes": speed_notes(found)}


def title_of(run: Run) -> str:
    """What the run did: its method, from teacher to student."""
    student = name_of(run, "student")
    if trained_alone(run):
        return f"{student or run.path.name}, trained alone"
    method = str(run.result.get("method") or run.recipe.get("method") or "run")
    return f"{method}: {name_of(run, 'teacher')} → {student or 'student'}"


def trained_alone(run: Run) -> bool:
    """Whether no teacher took part."""
    return name_of(run, "teacher") is None or (run.result.get("method") or run.recipe.get("method")) == ALONE


def subtitle_of(run: Run) -> str:
    """Data, task and seed."""
    train = _dict(run.recipe.get("train"))
    task = str(run.result.get("task") or run.recipe.get("task") or "classification")
    parts = [
        f"{task} on {data}" if (data := data_name(run)) else task,
        f"seed {seed}" if (seed := run.result.get("seed", train.get("seed"))) is not None else "",
        f"started {run.environment['started']}" if run.environment.get("started") else "",
    ]
    return " · ".join(part for part in parts if part)


def data_name(run: Run) -> str | None:
    """The data set's name, as the result or the recipe says."""
    of_recipe = run.recipe.get("data")
    found = run.result.get("data") or (of_recipe.get("name") if isinstance(of_recipe, dict) else of_recipe)
    return str(found) if found else None


def name_of(run: Run, who: str) -> str | None:
    """The student's or teacher's name; None where there is none."""
    for source in (run.result, run.recipe):
        if who in source:
            found = source[who]
            return str(found.get("name")) if isinstance(found, dict) and found.get("name") else None
    return None


def metric_of(run: Run) -> str:
    """The metric that picks the best epoch."""
    if run.result.get("metric"):
        return str(run.result["metric"])
    return "map" if run.recipe.get("task") == "detection" else "top1"


def _header(run: Run, metric: str) -> list[tuple[str, str, str]]:
    result = run.result
    kept = str(result.get("kept") or "best")
    split = "test" if value_at(result, kept, "test", metric) is not None else "val"
    value = value_at(result, kept, split, metric)
    where = f"{SPLITS[split]} {short_metric(metric)}"
    items = []
    if value is not None:
        items.append(("student", f"{value:.2f} %", f"{where}, {kept} epoch"))
    teacher = _dict(result.get("teacher"))
    of_teacher = number(_dict(teacher.get(split)).get(metric))
    if of_teacher is not None:
        gap = "" if value is None else f"; student {value - of_teacher:+.2f}".replace("-", "\u2212")
        items.append(("teacher", f"{of_teacher:.2f} %", where + gap))
    for who in ("student", "teacher"):
        model = _dict(result.get(who))
        if number(model.get("parameters")) is not None:
            macs = f", {count(model.get('macs'))}\u00a0MACs" if number(model.get("macs")) is not None else ""
            items.append((f"{who}'s size", count(model["parameters"]), f"parameters{macs}"))
    planned = result.get("epochs") or _dict(run.recipe.get("train")).get("epochs")
    done = f"{len(run.rows)} of {planned}" if planned and len(run.rows) != planned else f"{planned or len(run.rows)}"
    items.append(("epochs", done, ""))
    seconds = number(result.get("seconds")) or sum(row.get("seconds", 0.0) for row in run.rows)
    speed = number(result.get("images_per_second"))
    if seconds:
        items.append(("training time", duration(seconds), f"{speed:.0f} images/s" if speed else ""))
    device = run.environment.get("gpu") or run.environment.get("device")
    if device:
        items.append(("device", str(device), str(run.environment.get("precision") or "")))
    return items


def _warnings(run: Run, status: str) -> list[str]:
    found = []
    if status != "done":
        ended = f"after epoch {run.rows[-1]['epoch']:g}" if run.rows else "before the end of the first epoch"
        found.append(f"This run was not carried to its end; its record ends {ended}.")
    notes = run.result.get("notes")
    found += [str(note) for note in (notes if isinstance(notes, list) else [])]
    return found + run.problems


def _best_epoch(run: Run, metric: str) -> tuple[float, float] | None:
    """Best epoch so far and its value, for a run that has no result."""
    found = [(row["epoch"], row[f"val/{metric}"]) for row in run.rows if number(row.get(f"val/{metric}")) is not None]
    return max(found, key=lambda pair: (pair[1], -pair[0])) if found else None


def _result_table(run: Run) -> dict[str, Any]:
    """Teacher, best and last epoch; validation and test; the metrics that occur."""
    result, metric = run.result, metric_of(run)
    kept = str(result.get("kept") or "best")
    models = []
    for who, label in (("teacher", "teacher"), ("best", "best epoch"), ("last", "last epoch")):
        values = _dict(result.get(who))
        if not any(_dict(values.get(split)) for split in SPLITS):
            continue
        if who == "teacher":
            name = f"teacher {values.get('name', '')}".strip()
        else:
            epoch = f" ({values['epoch']})" if values.get("epoch") is not None else ""
            name = f"student, {label}{epoch}{', kept' if kept == who else ''}"
        models.append((who, name, values))
    order = (metric, *(name for name in COLUMNS if name != metric))
    pairs = [
        (split, name)
        for split in SPLITS
        for name in order
        if any(name in _dict(values.get(split)) for _, _, values in models)
    ]
    rows = [
        {
            "name": name,
            "look": "teacher" if who == "teacher" else "kept" if who == kept else "",
            "cells": [shown(_dict(values.get(split)).get(column), column) for split, column in pairs],
        }
        for who, name, values in models
    ]
    notes = []
    if rows:
        notes = [
            f"Best epoch: the one with the highest {short_metric(metric)} on validation (column val/{metric} of "
            "metrics.csv), chosen without the test set. Last epoch: the final one.",
            "student.safetensors holds the row marked as kept.",
        ]
        if sizes := sizes_of(run):
            notes.append(f"AP small (below 32 x 32), medium and large (above 96 x 96) count in {sizes}.")
    split, per_class = _per_class(result, kept)
    return {
        "groups": [(SPLITS[split], sum(1 for s, _ in pairs if s == split)) for split in SPLITS if split in dict(pairs)],
        "columns": [metric_name(column) for _, column in pairs],
        "result_rows": rows,
        "result_notes": notes,
        "per_class": [(str(name), shown(value, metric)) for name, value in per_class.items()],
        "per_class_title": f"Per class: {metric_name(metric)}, {SPLITS[split]}, {kept} epoch",
    }


def sizes_of(run: Run) -> str | None:
    """Which pixels AP by size is counted in, in words; None for a run without such."""
    kept = _dict(run.result.get(str(run.result.get("kept") or "best")))
    if not any(f"map_{size}" in _dict(kept.get(split)) for split in SPLITS for size in ("small", "medium", "large")):
        return None
    return sizes_in(_dict(run.recipe.get("data")).get("image_size"))


def _per_class(result: dict[str, Any], kept: str) -> tuple[str, dict[Any, Any]]:
    """{class: value} of the kept epoch, of the test set where it has one."""
    at = _dict(result.get(kept))
    for split in ("test", "val"):
        found = _dict(_dict(at.get(split)).get("per_class"))
        if found:
            return split, found
    return "val", {}


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every value; a mapping becomes one line."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        rows.append((str(name), MISSING if value is None else str(value)))
    return rows


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
