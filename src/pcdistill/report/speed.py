"""What `pcdistill bench` measured, as a table for the terminal, a run's page and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcdistill.report._format import MISSING, number

FILE = "bench.json"


def read_speed(run_dir: Path) -> dict[str, Any] | None:
    """bench.json of a run's folder; None where there is none, or it is damaged."""
    try:
        found = json.loads((Path(run_dir) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) and found["rows"] else None


def speed_cells(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of text."""
    batch = found.get("batch_size")
    head = ["", "program", "p50 (ms)", "p95 (ms)", f"images/s at batch {batch}"]
    rows = [row for row in found["rows"] if isinstance(row, dict)]
    return [head, *([f"{r.get('who')} {r.get('model')}", str(r.get("program")), *_numbers(r)] for r in rows)]


def _numbers(row: Mapping[str, Any]) -> list[str]:
    values = [number(row.get(key)) for key in ("p50_ms", "p95_ms", "images_per_second")]
    return [MISSING if v is None else f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values]


def speed_notes(found: Mapping[str, Any]) -> list[str]:
    """On what it was measured, and what was not."""
    on = ", ".join(f"{key} {value}" for key, value in dict(found.get("machine") or {}).items())
    size = found.get("image_size")
    notes = [f"Latency is that of one image of {size} x {size} pixels: half of the calls took p50 at most, 95 % p95."]
    return [*notes, f"Measured on: {on}.", *(str(note) for note in found.get("left_out") or [])]
