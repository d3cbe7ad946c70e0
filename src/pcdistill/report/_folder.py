"""Reading a run's folder: whatever is there is taken, whatever is missing or broken is named."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from pcdistill.errors import InputError
from pcdistill.files import atomic_write, unsealed_json
from pcdistill.plain import checked_json, parse_json, parse_yaml, read_text
from pcdistill.recipe import ALONE

LENIENT = ConfigDict(strict=True, extra="ignore")


@dataclass(frozen=True)
class _Epoch:
    """What result.json says of one epoch."""

    __pydantic_config__ = LENIENT
    epoch: int
    val: dict[str, Any] | None
    test: dict[str, Any] | None


@dataclass(frozen=True)
class _Model:
    """What result.json says of teacher or student."""

    __pydantic_config__ = LENIENT
    name: str
    parameters: float
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Summary:
    """What the commands read of a result.json; there is more in it."""

    __pydantic_config__ = LENIENT
    status: str
    digest: str
    metric: str
    kept: Literal["best", "last"]
    student: _Model | None
    teacher: _Model | None
    best: _Epoch | None = None
    last: _Epoch | None = None
    method: str = ""
    seed: int = 0
    epochs: int = 0
    seconds: float = 0.0
    strength: float | None = None
    notes: list[str] = field(default_factory=list)
    contents: dict[str, str] | None = None


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
            run.recipe = _mapping(parse_yaml(text, "recipe.yaml"))
        except InputError:
            run.problems.append("recipe.yaml is not valid YAML.")
    run.environment = _read_json(path / "environment.json", run)
    run.result = _read_json(path / "result.json", run) if result is None else json.loads(json.dumps(result))
    run.rows = _rows(path / "metrics.csv", run)
    return run


def read_summary(path: Path) -> dict[str, Any]:
    """What a result.json holds.

    Raises:
        InputError: it is not there, or not what a run writes.
    """
    text = read_text(path)
    found = unsealed_json(text, str(path))
    summary = checked_json(text, TypeAdapter(_Summary), str(path))
    if summary.status == "done":
        if summary.student is None:
            raise InputError(f"{path}: student must be told of a run that is done")
        split = "test" if summary.last is not None and summary.last.test else "val"
        taught = {} if summary.teacher is None else {"teacher": summary.teacher}
        for name, part in {"best": summary.best, "last": summary.last, **taught}.items():
            values = None if part is None else part.test if split == "test" else part.val
            if values is None or not isinstance(values.get(summary.metric), int | float):
                raise InputError(f"{path}: {name}.{split}.{summary.metric} must be a number in a run that is done")
    return found


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, as far as they can be read; empty cells are left out."""
    return _rows(path, Run(path.parent))


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
        return read_text(path)
    except InputError:
        run.problems.append(
            f"{path.name} could not be read." if path.exists() else f"{path.name} is not in the folder."
        )
    return None


def _read_json(path: Path, run: Run) -> dict[str, Any]:
    text = _read(path, run)
    if text is None:
        return {}
    try:
        found = _mapping(parse_json(text, path.name))
    except InputError:
        run.problems.append(
            f"{path.name} is not valid JSON; the run was cut off while it was written, or it was edited."
        )
        return {}
    try:
        return unsealed_json(text, path.name) if found else {}
    except InputError as error:
        run.problems.append(f"{error}.")
        return found


def _rows(path: Path, run: Run) -> list[dict[str, float]]:
    """Rows of numbers; an empty cell is absent, one that is no number is NaN and named."""
    text = _read(path, run)
    if text is None:
        return []
    rows, bad = [], set()
    for position, cells in enumerate(_cells(text), start=1):
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


def _cells(text: str) -> Iterator[dict[Any, Any]]:
    """Rows of a CSV file up to one that cannot be read, such as a cell of megabytes."""
    try:
        yield from csv.DictReader(text.splitlines())
    except csv.Error:
        return


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
