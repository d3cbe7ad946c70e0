"""Which run a folder holds, and reading it back."""

import json
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pcdistill.engine.checkpoint import FORMAT, load_checkpoint
from pcdistill.engine.fingerprint import KEPT, Contents, settle
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.files import unsealed_json
from pcdistill.plain import parse_yaml, read_text
from pcdistill.recipe import Recipe, make_recipe
from pcdistill.report import read_summary

MOST_KEYS = 6  # that a sentence names


def suggestion(out: Path) -> Path:
    """A folder that is not there yet, named after this one."""
    name = out.name or "run"
    found = (out.parent / f"{name}-{number}" if out.name else out / f"{name}-{number}" for number in range(2, 1000))
    return next((path for path in found if not path.exists()), out / "new")


def refuse_another_run(out: Path, recipe: Recipe, *, root: Path | None = None) -> None:
    """Pass over a folder that holds nothing of another recipe.

    Args:
        out: a run's folder.
        recipe: of the run to be made in it.
        root: what the user named with --out, where the run is a part of something else.

    Raises:
        InputError: it holds a run of another recipe; the keys that differ are named.
    """
    found = read_json(out / "result.json")
    digest, before = found.get("digest"), None
    with suppress(InputError):
        before = read_recipe(out)
    if digest is None and before is not None and is_checkpoint(out / "last.pt"):
        digest = before.digest()
        if digest != recipe.digest():  # recipe.yaml may have been written anew; the checkpoint decides
            digest = _digest_of(out / "last.pt")
    if digest in (None, recipe.digest()):
        return
    differ = "" if before is None else differing(changes(before.to_dict(), recipe.to_dict()))
    which = "an unfinished run"
    if found.get("status") == "stopped":
        which = f"a run that was stopped ({_reason(found)})"
    elif found:
        which = "the result"
    raise InputError(
        f"{out} holds {which} of another recipe{differ}; name another folder (--out {suggestion(root or out)}), or "
        f"delete {out}"
    )


def refuse_stopped_run(out: Path, recipe: Recipe, *, root: Path | None = None) -> None:
    """Pass over a folder unless it holds this very run, and it was stopped: it would be stopped again.

    Raises:
        TrainingStopped: saying why it was, and what can be done.
    """
    found = recorded_summary(out, recipe)
    if found is not None and found.get("status") == "stopped":
        raise TrainingStopped(
            f"{out} holds a run of this recipe, which was stopped: {_reason(found)}. Change the recipe and name "
            f"another folder (--out {suggestion(root or out)}), or delete {out} to try it again"
        )


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of two recipes that differ, with both values: "train.epochs 30 -> 2"."""
    old, new = _flat(before), _flat(after)
    found = []
    for key in dict.fromkeys([*old, *new]):
        if key.startswith("losses.") and old.get("method") != new.get("method"):
            continue  # they came with the method
        if key.startswith("methods.") or key in ("train.checkpoint_seconds", "train.trackers", "train.device"):
            continue  # they decide nothing
        if old.get(key) != new.get(key):
            found.append(f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}")
    return found


def differing(found: Iterable[str]) -> str:
    """Differences in parentheses, the first of many."""
    keys = list(found)
    if not keys:
        return ""
    more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    return f" ({', '.join(keys[:MOST_KEYS])}{more})"


def recorded_summary(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this recipe's run in the folder, once it ended by itself; None before."""
    try:
        found = read_summary(out / "result.json")
    except InputError:  # not there, or damaged: then it is made again
        return None
    return found if found.get("digest") == recipe.digest() and found.get("status") != "running" else None


def settle_contents(out: Path, found: Contents) -> None:
    """Refuse a folder whose result was made of other contents; as :func:`pcdistill.engine.fingerprint.settle`."""
    try:
        recorded = read_summary(out / "result.json").get("contents")
    except InputError:  # not there, or damaged: then it is made again
        return
    if recorded is not None:
        settle(out, found, recorded, [recorded[KEPT]] if KEPT in recorded else [])


def _reason(summary: dict[str, Any]) -> str:
    notes = summary.get("notes")
    return str(notes[0]) if isinstance(notes, list) and notes else "no reason was recorded"


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Dotted keys to plain values."""
    if isinstance(tree, dict):
        pairs: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        pairs = enumerate(tree)
    else:
        return {name: tree}
    return {key: value for k, v in pairs for key, value in _flat(v, f"{name}.{k}" if name else str(k)).items()}


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _digest_of(file: Path) -> Any:
    return load_checkpoint(file).get("digest")


def is_checkpoint(file: Path) -> bool:
    """Whether a file is a checkpoint of ours; its tensors are not read."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return any(FORMAT.encode() in archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    return False


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; {} if it is not there, damaged, or something else: then it is made again."""
    try:
        return unsealed_json(read_text(path), str(path))
    except InputError:
        return {}


def read_recipe(out: Path) -> Recipe:
    """The recipe of an existing run's folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = out / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{out} is not a run's folder: it has no recipe.yaml")
    return make_recipe(parse_yaml(read_text(path), str(path)), str(path))
