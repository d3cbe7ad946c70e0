"""The files of a run's folder: whose they are, and reading them back."""

import csv
from pathlib import Path
from typing import Any

import yaml

from pcdistill.engine.fingerprint import KEPT, Contents, settle
from pcdistill.errors import InputError
from pcdistill.files import unsealed_json
from pcdistill.recipe import Recipe, make_recipe


def default_folder(recipe: Recipe, command: str) -> Path:
    """Where a command writes when no folder is named."""
    data = Path(recipe.data.name).stem
    if command == "cache":
        return Path("runs") / f"cache-{data}-seed{recipe.train.seed}"
    name = f"{command}-{data}-{recipe.student.name.rsplit('/', 1)[-1].rsplit(':', 1)[-1]}"
    return Path("runs") / (f"{name}-{recipe.method}-seed{recipe.train.seed}" if command == "distill" else name)


def refuse_another_run(out: Path, digest: str) -> None:
    """Pass over a folder that is empty or holds this run.

    Raises:
        InputError: it is a file, or holds the result of another recipe.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out must name a folder")
    if _read_summary(out).get("digest") not in (None, digest):
        raise InputError(f"{out} holds the result of another recipe; name another --out, or delete the folder")


def recorded_summary(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this recipe's run in the folder, once it ended by itself; None before."""
    found = _read_summary(out)
    return found if found.get("digest") == recipe.digest() and found.get("status") != "running" else None


def settle_contents(out: Path, found: Contents) -> None:
    """Refuse a folder whose result was made of other contents; as :func:`pcdistill.engine.fingerprint.settle`."""
    recorded = _read_summary(out).get("contents")
    if isinstance(recorded, dict):
        settle(out, found, recorded, [recorded[KEPT]] if KEPT in recorded else [])


def _read_summary(out: Path) -> dict[str, Any]:
    """What result.json holds; {} if it is not there or damaged: then it is made again."""
    path = out / "result.json"
    try:
        return unsealed_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, InputError):
        return {}


def read_recipe(out: Path) -> Recipe:
    """The recipe of an existing run's folder.

    Raises:
        InputError: there is none.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{out} is not a run's folder: it has no recipe.yaml")
    return make_recipe(yaml.safe_load(path.read_text()), str(path))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; empty cells are left out."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
