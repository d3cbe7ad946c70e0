"""Faults of the system, injected below a folder: a kill or an error of the system at the n-th call that changes it."""

import builtins
import io
import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALLS = ("fsync", "write", "mkdir", "replace", "rename", "unlink", "rmdir", "truncate", "ftruncate")
REMOVING = ("unlink", "rmdir", "truncate", "ftruncate")  # what a full disk still lets through


class Points:
    """The calls that change a folder, by number.

    Attributes:
        seen: names of the calls so far.
    """

    def __init__(self, root: Path, at: int | None = None, fault: int | None = None) -> None:
        """Count, or from call number `at` (from 1) do `fault`: None kills this process, a number is an errno."""
        self.root, self.at, self.fault = os.path.realpath(root), at, fault
        self.seen: list[str] = []

    def hit(self, call: str, path: str, half: Callable[[], Any] = lambda: None) -> None:
        """A call is about to happen; `half` does a part of it first."""
        self.seen.append(f"{call} {os.path.basename(path)}")
        if self.at is None or len(self.seen) < self.at:
            return
        if self.fault is None:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif call not in REMOVING:
            half()
            raise OSError(self.fault, os.strerror(self.fault), path)

    def below(self, place: Any) -> str | None:
        """The path of a name or an open file, if it is in the folder."""
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}") if os.path.exists(f"/proc/self/fd/{place}") else ""
        path = os.path.abspath(os.fspath(place))
        path = path.decode(errors="replace") if isinstance(path, bytes) else path
        return path if path == self.root or path.startswith(self.root + os.sep) else None


@contextmanager
def injected(points: Points) -> Iterator[Points]:
    """Let every call of this process that changes the folder be seen by `points` first."""
    real = {name: getattr(os, name) for name in (*CALLS, "open")}
    real_open, real_io = builtins.open, io.open

    class Raw(io.FileIO):
        """A file whose writes are calls too."""

        def write(self, data: Any) -> int | None:
            whole = bytes(data)
            points.hit("write", str(self.name), lambda: super(Raw, self).write(whole[: len(whole) // 2]))
            return super().write(data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        path = None if isinstance(file, int) or not set(mode) & set("wax+") else points.below(file)
        if path is None:
            return real_open(file, mode, buffering, *rest, **named)
        points.hit("open", path)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        raw.name = os.fspath(file)
        whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, *rest[:3], **named)

    def open_low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        found = points.below(path) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        if found is not None:
            points.hit("open", found)
        return real["open"](path, flags, *rest, **named)

    def wrapped(name: str) -> Callable[..., Any]:
        def call(place: Any, *rest: Any, **named: Any) -> Any:
            path = points.below(place)
            if path is not None and not (name == "mkdir" and os.path.isdir(path)):
                points.hit(name, path)
            return real[name](place, *rest, **named)

        return call

    try:
        for name in CALLS:
            setattr(os, name, wrapped(name))
        os.open = open_low
        builtins.open = io.open = open_file
        yield points
    finally:
        for name, one in real.items():
            setattr(os, name, one)
        builtins.open, io.open = real_open, real_io


def in_child(call: Callable[[], Any], *, seconds: float = 120, after: float | None = None) -> tuple[int, Any]:
    """Call in a forked process.

    Args:
        call: what gives a plain value.
        seconds: the longest that is waited.
        after: kill it after so many seconds.

    Returns:
        0 and what the call gave; the number of the signal that ended it, negative, and None; 1 and a traceback.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork: what other threads there are hold nothing that the child needs
        child = os.fork()
    if child == 0:
        os.close(reading)
        found: tuple[int, Any]
        try:
            found = 0, call()
        except BaseException:
            found = 1, traceback.format_exc()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(found))
        os._exit(0)
    os.close(writing)
    begun, raw = time.monotonic(), b""
    with os.fdopen(reading, "rb", 0) as pipe:
        while True:
            limit = seconds if after is None else min(after, seconds)
            ready, _, _ = select.select([pipe], [], [], max(0.0, begun + limit - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
            part = pipe.read(1 << 16)
            raw += part
            if not part:
                break
    _, status = os.waitpid(child, 0)
    assert time.monotonic() - begun < seconds, f"it took more than {seconds} seconds"
    code = os.waitstatus_to_exitcode(status)
    return (code, None) if code else pickle.loads(raw)
