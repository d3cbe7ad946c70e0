"""What a run ran on: command, versions, machine and commit, for the record."""

import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pcdistill.engine.placement import PRECISIONS

PACKAGES = ("pcdistill", "torch", "torchvision", "timm", "accelerate", "numpy")


def environment(accelerator: Accelerator, command: str | None = None) -> dict[str, Any]:
    """What environment.json holds.

    Args:
        accelerator: of the run.
        command: what the user typed; by default this process's arguments.
    """
    return {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        **_gpu(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": PRECISIONS[accelerator.mixed_precision],
    }


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on: as it was, with when it went on, and what of the environment was another.

    Args:
        before: what environment.json holds; {} if there is none.
        now: this session's.
    """
    if not before:
        return now
    other = {key: value for key, value in now.items() if before.get(key) != value}
    return {**before, "continued": [*before.get("continued", []), other]}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _commit() -> str | None:
    """The commit of the code that runs, when it runs from a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
