"""Shared by every benchmark: time a call, say on what machine, print rows as they come, save the table."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
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


Round = Callable[[], float]


class Rounds:
    """Contenders in turns. A figure is printed as it comes and kept in a file: a benchmark that was stopped continues.

    Args:
        out: where the table will be; until then the figures lie beside it. None keeps none.
        key: what figures that are set side by side must share, such as machine, commit and options.
        count: rounds of each contender.
    """

    def __init__(self, out: Path | None, key: Mapping[str, Any], count: int) -> None:
        self.file = None if out is None else out.with_suffix(".partial.json")
        self.key, self.count = (
            {name: value for name, value in key.items() if name not in ("date", "load before")},
            count,
        )
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.started = time.monotonic()
        if self.file is not None and self.file.exists():
            kept = json.loads(self.file.read_text())
            if kept["key"] == self.key:
                self.figures = kept["figures"]
                print(f"continued from {self.file}", flush=True)

    def run(self, group: str, contenders: Mapping[str, Callable[[], Round]]) -> dict[str, list[float]]:
        """Images per second of every contender by round; each is built when its first round comes."""
        found, built = self.figures.setdefault(group, {}), dict[str, Round]()
        for number in range(self.count):
            for name, make in contenders.items():
                if len(found.setdefault(name, [])) > number:
                    continue
                if name not in built:
                    built[name] = make()
                found[name].append(built[name]())
                after = f"{time.monotonic() - self.started:.0f} s"
                show(
                    {
                        "of": group,
                        "loop": name,
                        "round": number + 1,
                        "images_per_second": found[name][-1],
                        "after": after,
                    }
                )
                self._keep()
        return found

    def _keep(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.file.with_suffix(".new")
            fresh.write_text(json.dumps({"key": self.key, "figures": self.figures}))
            fresh.replace(self.file)

    def close(self) -> None:
        """The table is written: nothing is left to continue."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def in_turns(mine: list[float], base: list[float]) -> dict[str, float]:
    """Median and interquartile range of images per second, and the median of the ratios within a round."""
    low, middle, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else (mine[0],) * 3
    ratio = statistics.median(own / other for own, other in zip(mine, base, strict=True))
    return {"images_per_second": middle, "iqr": high - low, "ratio": ratio}


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
