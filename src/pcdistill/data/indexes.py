"""Indexes of data files, each made once and kept until its file changes."""

import io
import os
import random
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.arrays import read_npz
from pcdistill.errors import InputError
from pcdistill.files import atomic_write, new_digest, only_one
from pcdistill.remote import file_system, place_of, said

SHARED = "PCDISTILL_INDEXES"  # of the environment: a folder or URL where several machines share indexes
TOGETHER = 8  # files that are indexed at a time
TOLD = ("size", "mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")  # by file systems
BLOB = "blob_id"  # of the hub


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
        known = [place, *(str(info.get(key)) for key in TOLD), *([info[BLOB]] if BLOB in info else [])]
    digest = new_digest()
    digest.update(repr([*facts, *known]).encode(errors="surrogateescape"))
    return str(digest.hexdigest())


def kept_indexes(
    places: Sequence[Path | str],
    folder: Path,
    state: Callable[[Path | str], str],
    make: Callable[[Path | str, str], dict[str, np.ndarray]],
    names: Iterable[str],
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The state and the index of each file: as it was kept, or made anew and kept.

    Of the processes of a machine one makes an index while others wait. All begin at another file, so that each makes a
    part; with `SHARED` in the environment, also those of several machines.

    Args:
        places: of the files.
        folder: of the indexes; one that cannot be written to costs the next run the time, no more.
        state: of a file, as by `state_of`.
        make: gives the arrays of a file and its state.
        names: of the arrays; what is kept without one of them is made anew.
    """
    wanted = frozenset(names)
    shared = os.environ.get(SHARED)
    order = list(dict.fromkeys(places))
    random.Random(f"{socket.gethostname()} {os.getpid()}").shuffle(order)

    def one(place: Path | str) -> tuple[str, dict[str, np.ndarray]]:
        known = state(place)
        return known, _kept(folder / f"{known}.npz", shared, lambda: make(place, known), wanted)

    with ThreadPoolExecutor(TOGETHER) as pool:
        found = dict(zip(order, pool.map(one, order), strict=True))
    return [found[place] for place in places]


def _kept(
    path: Path, shared: str | None, make: Callable[[], dict[str, np.ndarray]], names: frozenset[str]
) -> dict[str, np.ndarray]:
    found = _read(path, names)
    if found is not None:
        return found
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(only_one(path.parent / "locks" / path.stem))
        found = _read(path, names)
        if found is None and shared:
            _from_others(path, shared)
            found = _read(path, names)
        if found is None:
            found = make()
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **found)  # type: ignore[arg-type]  # its other arguments are no arrays
            with suppress(OSError):
                atomic_write(path, buffer.getvalue())
            if shared:
                _for_others(path.name, buffer.getvalue(), shared)
        return found


def _from_others(path: Path, shared: str) -> None:
    """Copy an index from where machines share them, if it is there."""
    place = place_of(shared)
    with suppress(OSError):
        if isinstance(place, Path):
            content = (place / path.name).read_bytes()
        else:
            system, there = file_system(f"{place}/{path.name}")
            content = system.cat_file(there)
        atomic_write(path, content)


def _for_others(name: str, content: bytes, shared: str) -> None:
    """Put an index where machines share them.

    Raises:
        InputError: this place cannot be written to.
    """
    place = place_of(shared)
    try:
        if isinstance(place, Path):
            atomic_write(place / name, content)
        else:
            system, there = file_system(f"{place}/{name}")
            system.makedirs(there.rpartition("/")[0], exist_ok=True)
            system.pipe_file(there, content)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{SHARED}: indexes cannot be kept in {shared}: {said(error)}") from None


def _read(path: Path, names: frozenset[str]) -> dict[str, np.ndarray] | None:
    """None where it is not there, damaged, or of something else."""
    with suppress(InputError, OSError):
        found = read_npz(path) if path.is_file() else {}
        return found if names <= found.keys() else None
    return None
