"""For all tests."""

import os
import signal
import subprocess
import zlib
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


ASKED = ("git", "rev-parse", "HEAD")


def share_of_slow(name: str) -> float:
    """A number from 0 to 1 for a test, another one at every commit, so that all have their turn.

    PCDISTILL_SLOW is the share of the slow tests that runs; those below it do.
    """
    return zlib.crc32(f"{name} {COMMIT}".encode()) / 2**32


def commit() -> str:
    """Of this checkout; empty where there is none."""
    try:
        said = subprocess.run(ASKED, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return said.stdout.strip()


SLOW_SHARE = float(os.environ.get("PCDISTILL_SLOW", "1"))
COMMIT = commit() if SLOW_SHARE < 1 else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests beyond their share; skip what needs a card where there is none."""
    if SLOW_SHARE < 1:
        out = [one for one in items if one.get_closest_marker("slow") and share_of_slow(one.nodeid) >= SLOW_SHARE]
        config.hook.pytest_deselected(items=out)
        items[:] = [one for one in items if one not in set(out)]
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA card"))
