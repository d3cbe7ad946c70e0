"""Reading a run's folder: whatever is there is taken, whatever is missing or broken is named."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pcdistill.errors import InputError
from pcdistill.files import atomic_write, unsealed_json
from pcdistill.recipe import ALONE


@dataclass
class Run:
    """A run's folder as found. `problems` says in sentences what was missing or could not be read."""

    path: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(path: Path, result: dict[str, Any] | None = None) -> Run:
    """Read what a run's folder holds; a run that was stopped at any moment can be read.

    Args:
        path: the folder.
        result: what result.json will hold; by default what it holds.
    """
    run = Run(path)
    text = _read(path / "recipe.yaml", run)
    if text is not None:
        run.recipe_text = text
        try:
            run.recipe = _mapping(yaml.safe_load(text))
        except yaml.YAMLError:
            run.problems.append("recipe.yaml is not valid YAML.")
    run.environment = _read_json(path / "environment.json", run)
    run.result = _read_json(path / "result.json", run) if result is None else json.loads(json.dumps(result))
    run.rows = _read_metrics(path / "metrics.csv", run)
    return run


def replace_file(path: Path, text: str) -> Path:
    """Write a file so that a reader never sees half of it."""
    atomic_write(path, text)
    return path


def trained_alone(run: Run) -> bool:
    """Whether no teacher took part."""
    return name_of(run, "teacher") is None or (run.result.get("method") or run.recipe.get("method")) == ALONE


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


def _read(path: Path, run: Run) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        run.problems.append(f"{path.name} is not in the folder.")
    except (OSError, UnicodeDecodeError):
        run.problems.append(f"{path.name} could not be read.")
    return None


def _read_json(path: Path, run: Run) -> dict[str, Any]:
    text = _read(path, run)
    if text is None:
        return {}
    try:
        found = _mapping(json.loads(text))
    except ValueError:
        run.problems.append(
            f"{path.name} is not valid JSON; the run was cut off while it was written, or it was edited."
        )
        return {}
    try:
        return unsealed_json(text, path.name) if found else {}
    except InputError as error:
        run.problems.append(f"{error}.")
        return found


def _read_metrics(path: Path, run: Run) -> list[dict[str, float]]:
    """Rows of numbers; an empty cell is absent, one that is no number is NaN and named."""
    text = _read(path, run)
    if text is None:
        return []
    rows, bad = [], set()
    for position, cells in enumerate(csv.DictReader(text.splitlines()), start=1):
        row: dict[str, float] = {}
        for key, cell in cells.items():
            if not isinstance(key, str) or not isinstance(cell, str) or not cell.strip():
                continue
            try:
                row[key] = float(cell)
            except ValueError:
                row[key] = math.nan
            if not math.isfinite(row[key]):
                bad.add(key)
        row.setdefault("epoch", float(position))
        if math.isfinite(row["epoch"]):
            rows.append(row)
    if bad:
        run.problems.append(f"metrics.csv has values that are not finite numbers, in: {', '.join(sorted(bad))}.")
    return rows


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
