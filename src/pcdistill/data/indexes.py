"""Indexes of data files, each made once and kept until its file changes."""

import io
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.arrays import read_npz
from pcdistill.errors import InputError
from pcdistill.files import atomic_write, new_digest, only_one
from pcdistill.remote import file_system

TOLD = ("size", "mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")  # by file systems


def state_of(place: Path | str, *facts: Any) -> str:
    """Changes with a file's place, length and time of change, as far as its file system tells, and with the facts.

    Raises:
        OSError: the file is not there, or cannot be looked at.
    """
    if isinstance(place, Path):
        stat = place.stat()
        known = [str(place.absolute()), stat.st_size, stat.st_mtime_ns]
    else:
        system, path = file_system(place)
        info = system.info(path)
        known = [place, *(str(info.get(key)) for key in TOLD)]
    digest = new_digest()
    digest.update(repr([*facts, *known]).encode(errors="surrogateescape"))
    return str(digest.hexdigest())


def kept_index(folder: Path, state: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """An index as it was kept, or made anew and kept; one process of a machine makes it while others wait.

    Args:
        folder: of the indexes; one that cannot be written to costs the next run the time, no more.
        state: of the file, by `state_of`.
        make: gives the arrays.
    """
    path = folder / f"{state}.npz"
    found = _read(path)
    if found is not None:
        return found
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(only_one(folder / "locks" / state))
        found = _read(path)
        if found is None:
            found = make()
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **found)  # type: ignore[arg-type]  # its other arguments are no arrays
            with suppress(OSError):
                atomic_write(path, buffer.getvalue())
        return found


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """None where it is not there, or damaged."""
    with suppress(InputError, OSError):
        return read_npz(path) if path.is_file() else None
    return None
