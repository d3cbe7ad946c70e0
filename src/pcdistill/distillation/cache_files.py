"""Where a cache's files lie: in a local folder, or under a URL that fsspec opens. Both keep whole files or none."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from pcdistill.errors import InputError
from pcdistill.files import atomic_write, clear_parts, file_checksum, new_digest
from pcdistill.plain import read_text
from pcdistill.remote import file_system, place_of, said


class Growing(Protocol):
    """A file that is being written."""

    def write(self, data: bytes) -> None: ...

    def sync(self) -> bool:
        """Make what was written last through a crash; False where that is not possible before the end."""
        ...


class CacheFolder(Protocol):
    """The files of one cache, by their names."""

    place: Path | str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its name; empty where there is no such folder."""
        ...

    def text(self, name: str) -> str:
        """What a file of text holds."""
        ...

    def put(self, name: str, text: str) -> None:
        """Write a whole file."""
        ...

    def grow(self, name: str, start: int) -> Any:
        """A context that gives a :class:`Growing` behind the first `start` bytes of a file."""
        ...

    def checksum(self, name: str) -> str:
        """BLAKE2b of a file."""
        ...

    def rows(self, name: str, kind: np.dtype[Any], checksum: str) -> np.ndarray[Any, Any] | None:
        """The rows in a file; None if it is not there, or not as its checksum says."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        ...

    def clear(self) -> None:
        """Delete what killed writers left."""
        ...


def cache_folder(place: Path | str) -> CacheFolder:
    """The files of a cache in a folder, or under a URL."""
    found = place_of(place)
    return LocalFolder(found) if isinstance(found, Path) else RemoteFolder(found)


class LocalFolder:
    """A folder of this machine, or one that its network file system shows."""

    def __init__(self, place: Path) -> None:
        self.place: Path | str = place
        self.path = place

    def sizes(self) -> dict[str, int]:
        if not self.path.is_dir():
            return {}
        found = {}
        for entry in os.scandir(self.path):
            with suppress(FileNotFoundError):  # another process may rename or delete it meanwhile
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
        return found

    def text(self, name: str) -> str:
        return read_text(self.path / name)

    def put(self, name: str, text: str) -> None:
        atomic_write(self.path / name, text)

    @contextmanager
    def grow(self, name: str, start: int) -> Iterator[Growing]:
        file = self.path / name
        try:
            with open(file, "r+b" if start else "wb") as stream:
                stream.truncate(start)
                stream.seek(0, os.SEEK_END)
                growing = _LocalGrowing(stream, start)
                yield growing
                growing.sync()
        except OSError as error:  # of a file that cannot be written only what can be continued stays
            with suppress(OSError, UnboundLocalError):
                os.truncate(file, growing.safe)
                if growing.safe == 0:
                    file.unlink()
            raise OSError(error.errno, error.strerror, str(file)) from error

    def checksum(self, name: str) -> str:
        return file_checksum(self.path / name)

    def rows(self, name: str, kind: np.dtype[Any], checksum: str) -> np.ndarray[Any, Any] | None:
        file = self.path / name
        if not file.is_file() or file_checksum(file) != checksum:
            return None
        return np.memmap(file, kind, "r")

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        clear_parts(self.path)


class _LocalGrowing:
    def __init__(self, stream: BinaryIO, safe: int) -> None:
        self.stream, self.safe = stream, safe

    def write(self, data: bytes) -> None:
        self.stream.write(data)

    def sync(self) -> bool:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.safe = self.stream.tell()
        return True


class RemoteFolder:
    """A folder of any file system that fsspec knows. Files are put there whole, so a kill loses the one under way."""

    def __init__(self, url: str) -> None:
        self.place: Path | str = url
        self.system, self.path = file_system(url)

    def _named(self, name: str) -> str:
        return f"{self.path}/{name}"

    def sizes(self) -> dict[str, int]:
        self.system.invalidate_cache()  # other processes write here too
        try:
            found = self.system.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # every service has errors of its own
            raise InputError(f"{self.place} cannot be read: {said(error)}") from None
        return {one["name"].rstrip("/").rpartition("/")[2]: int(one["size"] or 0) for one in found}

    def text(self, name: str) -> str:
        return str(self.system.cat_file(self._named(name)).decode())

    def put(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    @contextmanager
    def grow(self, name: str, start: int) -> Iterator[Growing]:
        growing = _RemoteGrowing()
        if start:
            growing.write(self.system.cat_file(self._named(name), end=start))
        yield growing
        self._write(name, growing.held.getvalue())

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.system.makedirs(self.path, exist_ok=True)
            self.system.pipe_file(self._named(name), data)
        except Exception as error:  # every service has errors of its own
            raise InputError(f"{self.place}/{name} cannot be written: {said(error)}") from None

    def checksum(self, name: str) -> str:
        digest = new_digest()
        digest.update(self.system.cat_file(self._named(name)))
        return digest.hexdigest()

    def rows(self, name: str, kind: np.dtype[Any], checksum: str) -> np.ndarray[Any, Any] | None:
        try:
            data = self.system.cat_file(self._named(name))
        except FileNotFoundError:
            return None
        digest = new_digest()
        digest.update(data)
        return np.frombuffer(data, kind) if digest.hexdigest() == checksum else None

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.system.rm_file(self._named(name))

    def clear(self) -> None:
        """Nothing is left beside a file that was not finished."""


class _RemoteGrowing:
    def __init__(self) -> None:
        self.held = io.BytesIO()

    def write(self, data: bytes) -> None:
        self.held.write(data)

    def sync(self) -> bool:
        return False
