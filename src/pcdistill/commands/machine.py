"""The result of a command as plain values, for `--json`: read from the files that it left."""

import csv
from pathlib import Path
from typing import Any

from pcdistill.commands.folder import read_json
from pcdistill.commands.students import RECORD as STUDENTS
from pcdistill.commands.students import student_folders
from pcdistill.distillation.cache_files import cache_folder
from pcdistill.files import unsealed_json
from pcdistill.models.weights import run_weights
from pcdistill.remote import place_of


def machine_result(command: str, out: Path) -> dict[str, Any]:
    """What came out, and in which files it is.

    Args:
        command: train, distill, compare, tune or cache.
        out: the folder that it wrote.
    """
    if command in ("train", "distill"):
        files = {"weights": run_weights(out), "report": out / "report.html", "card": out / "README.md"}
        return {"out": str(out), **{key: str(path) for key, path in files.items()}, **read_json(out / "result.json")}
    if command == "cache":
        found = unsealed_json(cache_folder(out).text("cache.json"), str(out))
        return {"out": str(place_of(out)), **{key: found.get(key) for key in ("info", "teacher")}}
    if command == "compare" and (out / STUDENTS).is_file():
        tables = {name: str(out / name / "table.md") for name in student_folders(out)}
        rows = [{"student": name, **row} for name in tables for row in _rows(out / name / "results.csv")]
        return {"out": str(out), "report": str(out / "report.html"), "tables": tables, "runs": rows}
    files = {"report": out / "report.html", "table": out / "table.md"}
    if command == "tune":
        files |= {"recipe": out / "best.yaml", "trials": out / "trials.csv"}
    return {"out": str(out), **{key: str(path) for key, path in files.items()}, "runs": _rows(out / "results.csv")}


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a table, with numbers for what is one."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        return [{key: _number(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]


def _number(cell: str) -> float | int | str | None:
    if not cell:
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
