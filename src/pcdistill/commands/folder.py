"""The files of a run's folder: whose they are, and reading them back."""

from pathlib import Path
from typing import Any

from pcdistill.errors import InputError
from pcdistill.plain import parse_json, parse_yaml, read_text
from pcdistill.recipe import Recipe, make_recipe
from pcdistill.report import read_summary


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
    if _digest(out) not in (None, digest):
        raise InputError(f"{out} holds the result of another recipe; name another --out, or delete the folder")


def recorded_summary(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this recipe's run in the folder, once it ended by itself; None before."""
    found = _read_summary(out)
    return found if found.get("digest") == recipe.digest() and found.get("status") != "running" else None


def _read_summary(out: Path) -> dict[str, Any]:
    """What result.json holds; {} if it is not there or damaged."""
    try:
        return read_summary(out / "result.json")
    except InputError:
        return {}


def _digest(out: Path) -> Any:
    """The digest in result.json, whatever else is in it; None if there is none."""
    try:
        found = parse_json(read_text(out / "result.json"), "result.json")
    except InputError:
        return None
    return found.get("digest") if isinstance(found, dict) else None


def read_recipe(out: Path) -> Recipe:
    """The recipe of an existing run's folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{out} is not a run's folder: it has no recipe.yaml")
    return make_recipe(parse_yaml(read_text(path), str(path)), str(path))
