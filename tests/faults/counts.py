"""Counts of what was tried, one file for each part, out of which scripts/faults_table.py makes the table."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "faults"
COLUMNS = ("tried", "refused", "worked", "lost")
SHARE = float(os.environ.get("PCDISTILL_FAULTS", "1"))  # of the cases: a smaller share for a quick look


def share(count: int) -> int:
    """So many of `count` cases as PCDISTILL_FAULTS asks for, at least one."""
    return max(1, round(count * SHARE))


def some(cases: list, seed: int = 0) -> list:
    """The share of the cases, spread evenly, the last among them."""
    count = share(len(cases))
    return [cases[(i + 1) * len(cases) // count - 1] for i in range(count)]


def record(part: str, counts: Counter[str]) -> None:
    """Print a part's counts and keep them.

    Raises:
        AssertionError: an input is in no column, or something was lost.
    """
    counts["tried"] = counts["tried"] or sum(counts[name] for name in COLUMNS[1:])
    print(f"{part}: " + ", ".join(f"{counts[name]} {name}" for name in COLUMNS), file=sys.stderr)
    FOLDER.mkdir(parents=True, exist_ok=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in part.lower())
    found = {"part": part, "share": SHARE, **{column: counts[column] for column in COLUMNS}}
    (FOLDER / f"{name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    assert counts["lost"] == 0
    assert counts["tried"] == counts["refused"] + counts["worked"]
