"""Whose a folder is: what a command may write into, and one process at a time."""

import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pcdistill.commands.folder import is_checkpoint, read_json, suggestion
from pcdistill.errors import InputError, PcdistillError
from pcdistill.recipe import Recipe

if sys.platform != "win32":
    import fcntl

Kind = Literal["run", "comparison", "students", "search", "cache"]
MARK = ".pcdistill"  # in every folder that a command made: its kind, and what two processes contend for
CALLED = {
    "run": "the run of one student",
    "comparison": "a comparison",
    "students": "a comparison of several students",
    "search": "a search",
    "cache": "a teacher cache",
}
OF_COMPARISON = ("comparison.json", "report.html", "table.md", "results.csv", "pictures")

_held: set[Path] = set()  # by this process


def leads() -> bool:
    """Whether this is the first process of a run, or its only one: the one that writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def several() -> int:
    """How many processes `torchrun` or Accelerate started for this run; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def claimed(out: Path | None, kind: Kind, recipe: Recipe | None = None) -> Iterator[None]:
    """Hold a folder within the block: it is ours or empty, and no other process works in it.

    The lock is the system's, on a file in the folder: however a process ends, its lock ends too. What the block leaves
    empty, and was not there before, is taken away again. Of several processes of one run, the first holds it for all.

    Args:
        out: the folder, made if it is not there; None holds nothing.
        kind: what the command makes.
        recipe: of the command; a folder with nothing but this recipe.yaml is ours.

    Raises:
        InputError: it cannot be a folder, or holds anything else.
        PcdistillError: another process works in it.
        OSError: it cannot be made.
    """
    if out is None or not leads():
        yield
        return
    if "\0" not in str(out) and _place(out) in _held:
        raise _busy(out)
    check_folder(out, kind, recipe)
    place = _place(out)
    made = _make(out)
    _held.add(place)
    try:
        with _locked(out, kind):
            yield
    finally:
        _held.discard(place)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def wait_until_free(out: Path, seconds: float) -> bool:
    """Wait while another process holds a folder, as a dead one may seem to on a disk of several machines.

    Args:
        out: the folder, which need not be there.
        seconds: to wait at most.

    Returns:
        Whether it is free.
    """
    until = time.monotonic() + seconds
    while (out / MARK).exists():
        try:
            file = _lock(out, out / MARK)
        except PcdistillError:
            if time.monotonic() > until:
                return False
            time.sleep(min(1.0, seconds))
            continue
        if file is not None:
            os.close(file)
        break
    return True


def check_folder(out: Path, kind: Kind, recipe: Recipe | None = None) -> None:
    """Pass over a folder that is not there, empty, or holds what a command of this kind made.

    Raises:
        InputError: anything else.
        OSError: it cannot be looked at.
    """
    if "\0" in str(out):
        raise InputError(f"{str(out)!r} cannot be a folder: it holds a NUL character; name another one (--out)")
    try:
        out.stat()
    except FileNotFoundError:
        if out.is_symlink():
            raise InputError(f"{out} is a link to nothing; name another folder (--out)") from None
        return
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise InputError(f"{out} cannot be a folder: {error.strerror}; name another one (--out)") from None
        raise
    if _place(out) in _held:  # looked at when it was; and closing its mark would end the lock
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; --out must name a folder")
    found = _kind_of(out, recipe)
    if found is None:
        names = sorted(path.name for path in out.iterdir())
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"{out} holds files that pcdistill did not write ({shown}); name another folder (--out {suggestion(out)})"
        )
    if found not in ("", kind):
        raise InputError(
            f"{out} holds {CALLED[found]}, not {CALLED[kind]}; name another folder (--out {suggestion(out)})"
        )


def _place(out: Path) -> Path:
    return Path(os.path.realpath(out))  # which, unlike resolve(), bears a loop of links


def _kind_of(out: Path, recipe: Recipe | None) -> str | None:
    """The kind of a folder; "" if it may become any; None if what it holds is not ours.

    Folders of earlier versions have no mark, and are known by what is in them.
    """
    with suppress(OSError, UnicodeDecodeError):
        text = (out / MARK).read_text(encoding="utf-8").strip()
        if text in ("", *CALLED):  # a kill may leave it empty
            return text
    paths = [path for path in out.iterdir() if not re.fullmatch(r"\..*\.(part|tmp)", path.name)]
    names = {path.name for path in paths}
    if _is_run(out):
        return "run"
    if str(read_json(out / "cache.json").get("format")).startswith("pcdistill-cache"):
        return "cache"
    if _starts_with(out / "study.log", b'"study_name": "tune"'):
        return "search"
    teachers = {path.name for path in paths if re.fullmatch(r"teacher(-\d+)?", path.name) and _is_begun(path)}
    if recipe is not None and names - teachers == {"recipe.yaml"} and _holds_text(out / "recipe.yaml", recipe):
        return "run"
    rest = [path for path in paths if path.name not in teachers]
    if not rest:
        return ""
    runs = [path for path in rest if path.name not in OF_COMPARISON]
    return "comparison" if runs and all(_holds_seeds(path) for path in runs) else None


def _is_run(out: Path) -> bool:
    """Whether a file says that a run is here: its result, its environment or a checkpoint."""
    if {"digest", "status"} <= read_json(out / "result.json").keys():
        return True
    versions = read_json(out / "environment.json").get("versions")
    if isinstance(versions, dict) and "pcdistill" in versions:
        return True
    return any(is_checkpoint(out / name) for name in ("last.pt", "best.pt"))


def _is_begun(out: Path) -> bool:
    """Whether a folder holds a run, or nothing yet."""
    return out.is_dir() and (_is_run(out) or {path.name for path in out.iterdir()} <= {MARK, "recipe.yaml"})


def _holds_seeds(path: Path) -> bool:
    """Whether a folder is a method's of a comparison: seed-N, or strength-S/seed-N, and nothing else."""
    if not path.is_dir():
        return False
    below = list(path.iterdir())
    return bool(below) and all(
        _is_begun(one) if one.name.startswith("seed-") else one.name.startswith("strength-") and _holds_seeds(one)
        for one in below
    )


def _starts_with(file: Path, text: bytes) -> bool:
    with suppress(OSError), open(file, "rb") as stream:
        return text in stream.readline(10_000)
    return False


def _holds_text(file: Path, recipe: Recipe) -> bool:
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").startswith(recipe.to_yaml())
    return False


def _make(out: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there, the deepest first."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _locked(out: Path, kind: Kind) -> Iterator[None]:
    """Hold the lock of a folder, by its mark; a mark that was made here goes if nothing else came."""
    mark = out / MARK
    file, fresh = _lock(out, mark), False
    try:
        if file is not None and os.fstat(file).st_size == 0:
            fresh = True
            _write(file, f"{kind}\n", mark)
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                if fresh and {path.name for path in out.iterdir()} == {MARK}:
                    mark.unlink()
            os.close(file)


def _lock(out: Path, mark: Path) -> int | None:
    """The mark's file, open and locked; None where files cannot be locked, or nothing can be written anyway.

    The lock is of the kind that a forked process (a loader's worker) does not inherit.
    """
    if sys.platform == "win32":
        return None
    while True:
        try:
            file = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process, which left nothing, took the folder away
            out.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not os.access(out, os.W_OK):
                return None
            raise
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mark.exists() and os.path.samestat(os.fstat(file), mark.stat()):
                return file
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _busy(out) from None
            return None
        os.close(file)  # the mark of a process that has just ended


def _write(file: int, text: str, path: Path) -> None:
    try:
        os.write(file, text.encode())
    except OSError as error:  # which knows no path
        raise OSError(error.errno, error.strerror, str(path)) from error


def _busy(out: Path) -> PcdistillError:
    return PcdistillError(
        f"another process is at work in {out}; wait for its end, or name another folder (--out {suggestion(out)})"
    )
