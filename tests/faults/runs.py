"""Tiny runs of the command line: what they say, and what their folders hold."""

import csv
import io
import json
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcdistill import cli
from pcdistill.engine.checkpoint import load_checkpoint
from pcdistill.engine.loop import TIMES

COMMON = ("--quiet", "--device", "cpu", "--workers", "0", "--batch-size", "32", "--allow", "weak-teacher")
CHANGING = ("seconds", "seconds_this_session", "images_per_second", "checksum", "command", "peak_memory_mib")
DIARY = ("environment.json", "times.json", "README.md", "report.html", "study.log", "table.md", "comparison.json")


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code, and what it wrote to both outputs."""

    code: int
    said: str
    told: str

    def __post_init__(self) -> None:
        """Raise AssertionError unless it worked, or refused in a sentence."""
        assert "Traceback" not in self.told, self.told[-3000:]
        if self.code == 0:
            return
        assert self.code in (1, 2), (self.code, self.told)
        if self.told.lstrip().startswith("╭"):  # of a flag that is none
            return
        lines = self.told.strip().splitlines()
        told = [line for line in lines if line.startswith("pcdistill: ")]
        assert len(told) == 1, self.told
        assert len(told[0]) < 20_000, len(told[0])
        listed = lines[lines.index(told[0]) + 1 :]
        assert not listed or ": Found " in told[0], self.told


def command(*argv: str) -> Answer:
    """A command of pcdistill in this process.

    Raises:
        Exception: whatever it does not tell in a sentence.
    """
    said, told = io.StringIO(), io.StringIO()
    code: Any = 0
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(told):
            warnings.simplefilter("ignore")
            cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        torch.set_num_threads(threads)
    return Answer(int(code), said.getvalue(), told.getvalue())


def write_data(path: Path) -> Path:
    """64 images [8, 8] of four classes, as an .npz file with its three splits."""
    rng = np.random.default_rng(0)
    target = np.arange(64) % 4
    images = (rng.integers(0, 60, (64, 8, 8)) + 45 * target[:, None, None]).astype(np.uint8)
    parts = {"train": slice(0, 64), "val": slice(0, 16), "test": slice(16, 32)}
    arrays = {f"{kind}_{name}": of[part] for name, part in parts.items() for kind, of in (("x", images), ("y", target))}
    np.savez(path, **arrays)
    return path


def essence(folder: Path) -> dict[str, Any]:
    """What must be equal of two equal runs: every file's bytes, without times; of pages that they are there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        assert not name.endswith(".part"), name
        if path.name in DIARY or "pictures" in path.parts:
            found[name] = path.stat().st_size > 0
        elif path.name == "metrics.csv":
            with open(path, newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        elif path.suffix == ".csv":
            found[name] = re.sub(r"\d+\.\d+", "", path.read_text(encoding="utf-8")).count("\n")
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".yaml":
            found[name] = path.read_text(encoding="utf-8").replace(str(folder), "")
        elif path.suffix == ".pt":
            found[name] = flat(load_checkpoint(path))
        else:
            found[name] = path.read_bytes()
    return found


def timeless(tree: Any) -> Any:
    """A tree without the values that differ between equal runs."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key not in CHANGING}
    return [timeless(one) for one in tree] if isinstance(tree, list) else tree


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """A checkpoint's values by dotted name, tensors as their bytes."""
    if isinstance(tree, dict):
        pairs: Any = tree.items()
    elif isinstance(tree, list | tuple):
        pairs = enumerate(tree)
    else:
        value = tree.contiguous().numpy().tobytes() if isinstance(tree, torch.Tensor) else tree
        return {name: value}
    return {key: value for k, v in pairs for key, value in flat(v, f"{name}.{k}").items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the files that are not equal, or that only one has."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name, "-") != other.get(name, "-")]
