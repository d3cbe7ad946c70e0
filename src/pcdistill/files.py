"""Files that are whole or not there: written beside, synced, renamed; with checksums that are checked when read."""

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pcdistill.errors import InputError
from pcdistill.plain import parse_json

CHECKSUM = "checksum"  # the key of a JSON file's own checksum
SEAL = (
    "blake2b:"  # what stands before a checksum within a text: a damaged key does not make the file pass for an old one
)
UNSEALED = SEAL + "0" * 32  # stands in a header while its checksum is computed
CHUNK = 1 << 22  # bytes
AS_IT_IS = "surrogateescape"  # how names of files that are no UTF-8 are written: byte for byte
ARCHIVE, END = b"PK\x03\x04", b"PK\x05\x06"  # how a zip archive that holds anything begins, and how its last record
RECORD = 22  # bytes of that record without a comment; the comment's length stands at its end
MARK = b"pcdistill blake2b "  # a zip archive's comment: this, and the checksum of all that stands before the comment
FOLDER = 0x10  # an attribute in a zip archive; torch reads nothing of a part that has it, and gives memory as it was
LENGTH = 2  # bytes of the comment's length, which stand right before it
PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(part|tmp)")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, so that a reader, now or after a crash, sees the old one or the new one, never a part.

    It can be read too. After the block, file and folder are synced; after an error in it nothing is left. The mode
    follows the umask.

    Raises:
        OSError: with the path, as when the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what stopped it
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file by :func:`atomic_file`, and read it back before it takes the old one's place."""
    data = data.encode(errors=AS_IT_IS) if isinstance(data, str) else data
    with atomic_file(path) as file:
        file.write(data)
        file.flush()
        file.seek(0)
        if file.read() != data:
            raise unreadable(path)


def home_followed(name: str | os.PathLike[str]) -> Path:
    """A path with ~ and ~USER followed; of a user that is not there it stays as it stands, as in a shell."""
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # no user can be called so
        return Path(name)


def unreadable(path: Path) -> OSError:
    """The error of a file whose bytes do not come back as they were written."""
    return OSError(errno.EIO, "what was written cannot be read back; the disk may be failing", str(path))


def sync_folder(path: Path) -> None:
    """Make a rename in the folder last through a power cut, where the system can sync a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(folder)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time, where the system has file locks; the file stays."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where two processes would do the same work
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def clear_parts(folder: Path) -> list[Path]:
    """Delete what killed writers left in a folder: their `.NAME.PID.part` files. Those of living processes stay.

    A living process may have got a dead one's number; then the file stays for the next time.
    """
    found = []
    for path in sorted(folder.glob(".*")) if folder.is_dir() else []:
        part = PART.fullmatch(path.name)
        if part is None or path.is_symlink() or not path.is_file() or _lives(int(part["pid"])):
            continue
        path.unlink(missing_ok=True)
        found.append(path)
    return found


def _lives(pid: int) -> bool:
    if pid == os.getpid():  # nothing of this process is under way when it clears
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def new_digest() -> "hashlib.blake2b":
    """The digest that all checksums and fingerprints use: BLAKE2b of 16 bytes."""
    return hashlib.blake2b(digest_size=16)


def file_checksum(path: Path) -> str:
    """BLAKE2b of a file, 32 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, new_digest).hexdigest()


def seal_archive(file: BinaryIO, checksum: str) -> None:
    """Put the checksum of a zip archive, which has no comment yet, into its comment: programs that read zip skip it."""
    comment = MARK + checksum.encode()
    file.seek(-LENGTH, os.SEEK_END)
    file.write(len(comment).to_bytes(LENGTH, "little") + comment)


def check_archive(path: Path) -> str | None:
    """Check a zip archive whole: against the checksum in it, or, without one, its parts against their own.

    Returns:
        The checksum that :func:`seal_archive` put in; None for another file, which may be no archive at all.

    Raises:
        InputError: damaged.
    """
    length = len(MARK) + 2 * new_digest().digest_size
    size = path.stat().st_size - length - LENGTH
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        end = file.read()
        comment = end[LENGTH:]
        if not comment.startswith(MARK):
            if damaged_archive(path, comment=False):
                raise InputError(f"{path} is damaged: a part of it does not have the checksum that was written")
            return None
        file.seek(0)
        digest = new_digest()
        while size > 0 and (chunk := file.read(min(CHUNK, size))):
            digest.update(chunk)
            size -= len(chunk)
    digest.update(bytes(LENGTH))  # as it was, without a comment
    written = comment[len(MARK) :].decode(errors="replace")
    if written != digest.hexdigest() or end[:LENGTH] != length.to_bytes(LENGTH, "little"):
        raise InputError(f"{path} is damaged: its checksum is not the one that was written")
    return written


def damaged_archive(path: Path, *, comment: bool = True) -> bool:
    """Whether a part of a zip archive differs from its CRC-32.

    Without `comment` also whether there is one, or the rest of one, or anything before or behind the archive.

    What is no zip archive has nothing to compare with. Torch can be told to write no CRC-32; it then writes 0.
    """
    try:
        if not zipfile.is_zipfile(path):
            # Torch's reader finds an archive in front of the torn end of another.
            return not comment and _read_at(path, 0, len(ARCHIVE)) == ARCHIVE
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.external_attr & FOLDER or (info.CRC and _length(archive, info) != info.file_size):
                    return True
            if comment:
                return False
            # What stands before the archive is skipped by the library, and so is what follows its last record.
            first = min((info.header_offset for info in archive.infolist()), default=0)
            end = _read_at(path, path.stat().st_size - RECORD, RECORD)
            return first > 0 or not end.startswith(END) or not end.endswith(bytes(LENGTH))
    except Exception:  # a damaged archive fails in any way there is
        return True


def _read_at(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def _length(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Bytes of a part that can be read; an error of its own if their CRC-32 is another than the archive says."""
    found = 0
    with archive.open(info) as part:
        while chunk := part.read(CHUNK):
            found += len(chunk)
    return found


def sealed_json(content: Mapping[str, Any], *, indent: int = 2) -> str:
    """JSON text of a mapping with its own checksum, which :func:`unsealed_json` checks."""
    return json.dumps({**content, CHECKSUM: _checksum_of(content)}, indent=indent) + "\n"


def unsealed_json(text: str, where: str) -> dict[str, Any]:
    """The mapping in JSON text, without its checksum; one that an older version wrote without a checksum passes.

    Args:
        text: of the file.
        where: the file, for the error.

    Raises:
        InputError: not JSON, no mapping, or a checksum that is not the contents'.
    """
    try:
        found = parse_json(text, where)
    except InputError as error:
        raise InputError(f"{error}; it is damaged") from None
    if not isinstance(found, dict):
        raise InputError(f"{where} cannot be read: it holds no mapping")
    written = found.pop(CHECKSUM, None)
    lost = written is None and any(isinstance(one, str) and like_a_seal(one) for one in found.values())
    if lost or (written is not None and written != _checksum_of(found)):
        raise InputError(f"{where} is damaged or was edited: its checksum is not the one that was written")
    return found


def like_a_seal(text: str) -> bool:
    """Whether a text is a checksum of ours, or was one before a few bits of its first letters were flipped."""
    alike = sum(a == b for a, b in zip(text, SEAL, strict=False))
    return len(text) == len(UNSEALED) and 2 * alike >= len(SEAL)


def _checksum_of(content: Mapping[str, Any]) -> str:
    """Of the contents as JSON gives them back, whatever the order of the keys and the white space."""
    digest = new_digest()
    digest.update(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())
    return SEAL + digest.hexdigest()
