"""One page for one run: whether it helped, what it costs, where it errs, its curves, how to do it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcdistill.engine.console import duration
from pcdistill.report._folder import Run, data_name, metric_of, name_of, read_run, replace_file, trained_alone
from pcdistill.report._format import MISSING, SPLITS, metric_name, number, short_metric, shown, sizes_in
from pcdistill.report._page import render
from pcdistill.report.answers import LINES, class_table, confusions_of, read_answers, thumbs_of
from pcdistill.report.boxes import boxes_of_classes, run_boxes
from pcdistill.report.plots import learning_curves, term_curves
from pcdistill.report.speed import read_speed, speed_cells, speed_notes
from pcdistill.report.worth import baseline_of, cost_cells, cost_notes, header_of, verdict_of_run

COLUMNS = ("top1", "top5", "map", "map_50", "map_75", "map_small", "map_medium", "map_large", "loss")
MOST_COLUMNS = 8  # of one line; more are put below each other, split by split
CURVE_NOTES = [
    "The training loss is the whole objective, distillation terms included; the validation loss is the task's own "
    "alone. Training is measured on augmented images while the weights move. Compare shapes, not heights."
]


def write_run_report(run_dir: Path, result: dict[str, Any] | None = None) -> Path:
    """Write report.html into a run's folder, from whatever the folder holds, finished or not.

    Args:
        run_dir: folder with recipe.yaml, environment.json, metrics.csv, result.json, answers.npz, samples.npz and,
            in alone/, the student without a teacher; a file that is
            missing or broken is named on the page. AP is expected in percent, as top-1 is.
        result: what result.json will hold, where it is written last; by default what it holds.

    Returns:
        The page's path. It is one file, loads nothing, and everything in it is escaped.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, result)
    page = render("run.html.j2", **_values(run), **_answers(run), **_result_table(run))
    return replace_file(run_dir / "report.html", page)


def _values(run: Run) -> dict[str, Any]:
    result, metric = run.result, metric_of(run)
    status = str(result.get("status") or "not finished")
    best = _dict(result.get("best"))
    environment = dict(run.environment)
    command = environment.pop("command", None)
    reached = _best_epoch(run, metric)
    alone = baseline_of(run)
    return {
        "title": title_of(run),
        "subtitle": subtitle_of(run),
        "status": status,
        "done": status == "done",
        "verdict": verdict_of_run(run, alone, metric),
        "header": header_of(run, alone, metric),
        "warned": _warnings(run, status),
        "costs": cost_cells(run),
        "cost_notes": cost_notes(run),
        "curves": learning_curves(run.rows, metric, number(best.get("epoch")) or (reached[0] if reached else None)),
        "so_far": f"Best on validation so far: {reached[1]:.2f} % {short_metric(metric)}, in epoch {reached[0]:g}."
        if reached
        else "",
        "curve_notes": CURVE_NOTES if any("val/loss" in row for row in run.rows) else [],
        "terms": term_curves(run.rows),
        **_speed(run),
        "command": command,
        "environment": _facts(run, environment),
        "recipe": run.recipe_text,
        "boxes": run_boxes(run.path),
    }


def _answers(run: Run) -> dict[str, Any]:
    """Classes, confusions and images, where the run left its answers; else the classes of its result."""
    found = read_answers(run.path)
    if found is None:
        return {"confusions": None, "thumbs": None, **_per_class_table(run)}
    return {"confusions": confusions_of(found), "thumbs": thumbs_of(found), **class_table(found)}


def _facts(run: Run, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked, how long it took, and where: of the run's record."""
    planned = run.result.get("epochs") or _dict(run.recipe.get("train")).get("epochs")
    done = f"{len(run.rows)} of {planned}" if planned and len(run.rows) != planned else f"{planned or len(run.rows)}"
    seconds = number(run.result.get("seconds")) or sum(row.get("seconds", 0.0) for row in run.rows)
    speed = number(run.result.get("images_per_second"))
    facts = [("epochs", done)]
    if seconds:
        facts.append(("training time", duration(seconds) + (f", {speed:.0f} images/s" if speed else "")))
    sessions = environment.pop("continued", None)
    return [*facts, *_flat(environment), *(("continued", _text(one)) for one in _list(sessions))]


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
    metric, kept, models = metric_of(run), str(run.result.get("kept") or "best"), _models(run)
    order = (metric, *(name for name in COLUMNS if name != metric))
    pairs = [
        (split, name)
        for split in SPLITS
        for name in order
        if any(name in _dict(values.get(split)) for _, _, values in models) and not _no_news(name, models)
    ]
    names = list(dict.fromkeys(name for _, name in pairs))
    splits = [split for split in SPLITS if split in dict(pairs)]
    wide = len(pairs) <= MOST_COLUMNS
    groups = [("", pairs)] if wide else [(f"{SPLITS[one]}: ", [(one, name) for name in names]) for one in splits]
    rows = [
        {
            "name": before + name,
            "look": "teacher" if who == "teacher" else "kept" if who == kept else "",
            "cells": [shown(_dict(values.get(split)).get(column), column) for split, column in cells],
        }
        for before, cells in groups
        for who, name, values in models
    ]
    notes = [
        f"Best epoch: the one with the highest {short_metric(metric)} on validation (column val/{metric} of "
        "metrics.csv), chosen without the test set. Last epoch: the final one.",
        "student.safetensors holds the row marked as kept.",
    ]
    if sizes := sizes_of(run):
        notes.append(f"AP small (below 32 x 32), medium and large (above 96 x 96) count in {sizes}.")
    return {
        "groups": [(SPLITS[split], sum(1 for s, _ in pairs if s == split)) for split in splits] if wide else [],
        "columns": [metric_name(column) for column in ([name for _, name in pairs] if wide else names)],
        "result_rows": rows,
        "result_notes": notes if rows else [],
    }


def sizes_of(run: Run) -> str | None:
    """Which pixels AP by size is counted in, in words; None for a run without such."""
    kept = _dict(run.result.get(str(run.result.get("kept") or "best")))
    if not any(f"map_{size}" in _dict(kept.get(split)) for split in SPLITS for size in ("small", "medium", "large")):
        return None
    return sizes_in(_dict(run.recipe.get("data")).get("image_size"))


def _models(run: Run) -> list[tuple[str, str, dict[str, Any]]]:
    """Teacher, best and last epoch, as far as they were evaluated: key, name, values."""
    kept, models = str(run.result.get("kept") or "best"), []
    for who, label in (("teacher", "teacher"), ("best", "best epoch"), ("last", "last epoch")):
        values = _dict(run.result.get(who))
        if not any(_dict(values.get(split)) for split in SPLITS):
            continue
        if who == "teacher":
            name = f"teacher {values.get('name', '')}".strip()
        else:
            epoch = f" ({values['epoch']})" if values.get("epoch") is not None else ""
            name = f"student, {label}{epoch}{', kept' if kept == who else ''}"
        models.append((who, name, values))
    return models


def _per_class_table(run: Run) -> dict[str, Any]:
    """AP by class of the kept epoch and of the teacher, the student's worst first; nothing where there is none."""
    metric, kept = metric_of(run), str(run.result.get("kept") or "best")
    split, student = _per_class(run.result.get(kept))
    empty = {"per_class": [], "per_class_head": [], "per_class_said": "", "per_class_notes": [], "class_lines": LINES}
    if not student:
        return empty
    teacher = _dict(_dict(_dict(run.result.get("teacher")).get(split)).get("per_class"))
    boxes = boxes_of_classes(run.path)
    name = metric_name(metric)
    values = {k: number(value) for k, value in student.items()}
    order = sorted(student, key=lambda k: (values[k] is None, values[k] or 0.0))
    rows = [
        [
            str(k),
            *([f"{boxes[k]:,}" if k in boxes else MISSING] if boxes else []),
            shown(student[k], metric),
            *([shown(teacher.get(k), metric)] if teacher else []),
        ]
        for k in order
    ]
    head = ["class", *(["boxes"] if boxes else []), f"student {name}", *([f"teacher {name}"] if teacher else [])]
    return empty | {
        "per_class": rows,
        "per_class_head": head,
        "per_class_said": f"{SPLITS[split].capitalize()}, {kept} epoch; the student's worst class first.",
        "per_class_notes": [] if boxes or metric != "map" else ["A dash: the class has no box in this split."],
    }


def _per_class(at: Any) -> tuple[str, dict[Any, Any]]:
    """{class: value} of an epoch, of the test set where it has one."""
    for split in ("test", "val"):
        found = _dict(_dict(_dict(at).get(split)).get("per_class"))
        if found:
            return split, found
    return "val", {}


def _no_news(name: str, models: Sequence[tuple[str, str, dict[str, Any]]]) -> bool:
    """Whether it is top-5 of five classes or fewer, which everybody has."""
    found = [value for _, _, values in models for s in SPLITS if (value := number(_dict(values.get(s)).get(name)))]
    return name == "top5" and all(value >= 100 for value in found)


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every value; a mapping becomes one line."""
    return [(str(name), _text(value)) for name, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return MISSING if value is None else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
