"""`pcdistill report`: the pages of a folder anew, from the files in it; nothing is computed."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcdistill import report
from pcdistill.commands.claim import MARK
from pcdistill.commands.compare import RECORD, renamed
from pcdistill.commands.ending import write_pages
from pcdistill.commands.folder import read_json
from pcdistill.commands.students import RECORD as STUDENTS
from pcdistill.commands.students import runs_of, student_folders, write_students
from pcdistill.errors import InputError
from pcdistill.report.strengths import shown_strengths, strength_of
from pcdistill.stats import MARGIN

OF_RUN = ("result.json", "metrics.csv", "recipe.yaml", "environment.json")


def remake_pages(folder: Path) -> list[Path]:
    """Write the pages of a run, a comparison, a comparison of several students, or a search anew.

    Returns:
        What was written.

    Raises:
        InputError: the folder holds none of these.
    """
    if (folder / STUDENTS).is_file():
        found = [path for name in student_folders(folder) for path in remake_pages(folder / name)]
        return [*found, write_students(folder)]
    record = read_json(folder / RECORD)
    runs = dict(_runs(folder, record))
    if runs:
        return _comparison(folder, record, runs)
    if any((folder / name).is_file() for name in OF_RUN):
        summary = read_json(folder / "result.json")
        write_pages(folder, summary)
        card = [folder / "README.md"] if summary.get("status") == "done" else []
        return [folder / "report.html", *card]
    raise InputError(f"{folder} holds neither a run nor a comparison, so there are no pages to make")


def _runs(folder: Path, record: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders and results of a comparison's runs; of a search under the names that its record gives them."""
    if _kind(folder) == "search":
        if not isinstance(record.get("names"), dict):
            raise InputError(
                f"{folder} holds a search without the record of its comparison; the command that made it goes on, and "
                "writes it"
            )
        for name, called in record["names"].items():
            if found := read_json(folder / name / "result.json"):
                yield folder / name, renamed(found, str(called))
        return
    yield from runs_of(folder, record)


def _kind(folder: Path) -> str:
    try:
        return (folder / MARK).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _comparison(folder: Path, record: dict[str, Any], runs: dict[Path, dict[str, Any]]) -> list[Path]:
    results = list(runs.values())
    chosen = shown_strengths(results)
    shown = {
        (str(found.get("method")), int(found.get("seed", 0))): path
        for path, found in runs.items()
        if strength_of(found) in (None, chosen.get(str(found.get("method"))))
    }
    curves = {key: report.read_metrics(path / "metrics.csv") for key, path in shown.items()}
    first = min((seed for _, seed in shown), default=0)
    drawn = {method: path for (method, seed), path in shown.items() if seed == first}
    command = str(record.get("command") or "")
    options = {"margin": MARGIN, **{key: record[key] for key in ("margin", "baseline") if key in record}}
    return list(report.write_compare_report(folder, results, curves, command, drawn=drawn, **options))


def written(paths: list[Path]) -> str:
    """What was made, for the terminal."""
    return "written: " + ", ".join(shlex.quote(str(path)) for path in paths)
