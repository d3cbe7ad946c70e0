"""Shared by every benchmark: time a call, say on what machine, print rows as they come, save the table."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer


def time_ms(call: Callable[[], object], min_run_time: float = 1.0) -> tuple[float, float]:
    """Median and interquartile range of one call in ms: warmed up, repeated, waiting for CUDA inside the timing."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=min_run_time)
    return found.median * 1e3, found.iqr * 1e3


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code: device, threads, versions, how busy it was."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit of this checkout, with "-dirty" behind it where files differ."""
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(row: dict[str, Any]) -> None:
    """Print a row as soon as it is measured."""
    print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)


def report(rows: list[dict[str, Any]], info: dict[str, Any], command: str, out: Path | None) -> None:
    """Print the rows as a table under the command and the machine; save them as JSON, and as Markdown beside it."""
    print(_page(rows, info, command, None))
    if out:
        save(rows, info, command, out)


def save(rows: list[dict[str, Any]], info: dict[str, Any], command: str, out: Path, by: str | None = None) -> None:
    """Rows as JSON, and as Markdown beside it: one table, or one for each value of the column `by`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "machine": info, "rows": rows}, indent=1, allow_nan=False)
    out.write_text(text + "\n")
    out.with_suffix(".md").write_text(_page(rows, info, command, by))


def _page(rows: list[dict[str, Any]], info: dict[str, Any], command: str, by: str | None) -> str:
    kinds = dict.fromkeys(row[by] for row in rows) if by else [None]
    tables = [table([row for row in rows if by is None or row[by] == kind]) for kind in kinds]
    machine_line = ", ".join(f"{key} {value}" for key, value in info.items())
    return "\n\n".join([f"`{command}`", machine_line, *tables]) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; a row that lacks a column, such as one that was skipped, leaves it empty."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_shown(row.get(key, "")) for key in header) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
