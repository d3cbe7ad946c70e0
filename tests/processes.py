"""pcdistill's command line in processes of its own: one, or several that torchrun starts."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcdistill import cli

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
SOURCE = str(Path(cli.__file__).parents[1])
PATIENCE = 900.0  # seconds; a busy machine takes minutes for what takes seconds otherwise


def environment(**more: str) -> dict[str, str]:
    """This process's, with one thread a process and this checkout's package."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE, **more}


def program(*arguments: object, processes: int = 1, run: tuple[str, ...] = ("-m", "pcdistill.cli")) -> list[str]:
    """The command for pcdistill, or for another program, in so many processes."""
    launch = [*TORCHRUN, f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, *run, *map(str, arguments)]


def finished(argv: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        AssertionError: it fails; with the end of what it said.
    """
    done = subprocess.run(argv, env=environment(**more), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def wait_until(happened: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    """Wait until something has happened that a process does.

    Raises:
        AssertionError: the process ended before, or it takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, "the process ended before"
        assert time.monotonic() < deadline, "the process takes too long"
        time.sleep(0.02)
