"""Errors that the command line prints as one sentence, without a traceback."""

import difflib
import errno
from collections.abc import Iterable


class PcdistillError(Exception):
    """Something went wrong that the user can act on; the command line exits with 1."""


class InputError(PcdistillError, ValueError):
    """Wrong input: the message says what was wrong, where, and what would be right; the command line exits with 2."""


class NotFetched(PcdistillError):
    """Files that a model needs are not on this machine, and could not be fetched."""


class TrainingStopped(PcdistillError):
    """Training was stopped because going on would waste time: a loss that is not finite, or accuracy at chance."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint to append to a message: the closest of `names`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
    if not close:
        return ""

    def likeness(other: str) -> tuple[float, bool]:  # of equally close names, the one with the same letters
        return difflib.SequenceMatcher(None, other, name).ratio(), sorted(other) == sorted(name)

    return f'; did you mean "{max(close, key=likeness)}"?'


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def is_text(name: str) -> bool:
    """Whether a name of a file is in UTF-8; Python holds the other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def told(text: str) -> str:
    """A message for a terminal: what steers it, or breaks a line, is shown in letters."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def what_failed(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


WORDS = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # a path that no state of the disk makes right
ADVICE = {
    errno.ENOSPC: "free some, and the same command continues",
    errno.EDQUOT: "free some, and the same command continues",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name another place",
}


def os_sentence(error: OSError) -> str:
    """What the operating system refused: the path, its words, and what can be done."""
    said = error.strerror or str(error) or type(error).__name__
    parts = [f"{error.filename}: {said}" if error.filename is not None else said, ADVICE.get(error.errno or 0)]
    return "; ".join(part for part in parts if part)
