"""Local copies of what is read of data: shards that lie elsewhere, row groups of parquet files; the oldest give way."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pcdistill.errors import InputError
from pcdistill.files import atomic_file, new_digest, only_one
from pcdistill.remote import file_system

LIMIT = "PCDISTILL_SHARDS_GIB"  # of the environment: what copies may take on the disk
DEFAULT_GIB = 100.0
FRESH = 60  # seconds after which a use is noted
TRIES = 5
CHUNK = 2**22  # bytes
SUFFIXES = (".tar", ".arrow")  # of shards, of row groups


@dataclass(frozen=True)
class Copies:
    """Copies in a folder, which the processes of a machine share.

    Args:
        folder: of the copies.
        limit: bytes that they may take together; the shard at hand may go beyond.
    """

    folder: Path
    limit: int

    def read(self, url: str, start: int, size: int, state: str = "") -> bytes:
        """Bytes of a shard, out of its copy; raises as `open` does."""
        with self.open(url, state) as file:
            file.seek(start)
            return file.read(size)

    def open(self, url: str, state: str = "") -> BinaryIO:
        """The copy of a shard; what is opened stays readable when it gives way.

        Args:
            url: of the shard.
            state: changes when it does, and asks for another copy.

        Raises:
            OSError: the shard cannot be fetched, or the disk is full.
        """

        def fetch(file: BinaryIO) -> None:
            system, there = file_system(url)
            with system.open(there, "rb") as source:
                while chunk := source.read(CHUNK):
                    file.write(chunk)

        return self.made(_shard(url, state), SUFFIXES[0], fetch)

    def holds(self, url: str, state: str = "") -> bool:
        """Whether there is a copy of a shard, so that `open` fetches nothing."""
        return self._path(_shard(url, state), SUFFIXES[0]).is_file()

    def made(self, what: str, suffix: str, write: Callable[[BinaryIO], None]) -> BinaryIO:
        """A copy of anything, which one process of the machine makes while others wait.

        Args:
            what: tells it from others; not how it is called.
            suffix: one of `SUFFIXES`.
            write: puts it into a file.

        Raises:
            OSError: it cannot be written, or what `write` raises.
        """
        path = self._path(what, suffix)
        for _ in range(TRIES):
            self._make(path, write)
            try:
                return path.open("rb")
            except FileNotFoundError:  # it gave way to another process's in between
                continue
        raise OSError(f"copies of data give way as fast as they come; {LIMIT} is too small for a window of them")

    def _path(self, what: str, suffix: str) -> Path:
        digest = new_digest()
        digest.update(what.encode(errors="surrogateescape"))
        return self.folder / f"{digest.hexdigest()}{suffix}"

    def _make(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        if self._noted(path):
            return
        with only_one(self.folder / "locks" / path.stem):
            if not self._noted(path):
                with atomic_file(path) as file:
                    write(file)
                self._make_room(path)

    def _noted(self, path: Path) -> bool:
        """Whether there is a copy; its time says when it was used."""
        try:
            if time.time() - path.stat().st_mtime > FRESH:
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, kept: Path) -> None:
        """Delete those whose last use is longest ago."""
        found = []
        for path in [one for one in self.folder.iterdir() if one.suffix in SUFFIXES]:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((path == kept, stat.st_mtime, stat.st_size, path))
        over = sum(size for _, _, size, _ in found) - self.limit
        for own, _, size, path in sorted(found):
            if over <= 0 or own:
                return
            path.unlink(missing_ok=True)
            over -= size


def _shard(url: str, state: str) -> str:
    return f"{url} {state}".rstrip()


def copies_in(folder: Path) -> Copies:
    """Copies in a folder, within what the environment allows.

    Raises:
        InputError: it allows no number above 0.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**30:
        raise InputError(f"{LIMIT} must be a number of GiB above 0, got {text}")
    return Copies(folder, int(gib * 2**30))
