"""Getting a model's files where there may be no network: one look whether the hub answers, and one sentence."""

import functools
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pcdistill.errors import NotFetched

HUB = "https://huggingface.co"
PATIENCE = 5.0  # seconds for an answer of any kind
STALL = 30.0  # seconds without a byte, after which a download is given up
UNREACHED = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError")


@contextmanager
def within_reach() -> Iterator[None]:
    """Within the block the hub's client tries nothing that cannot succeed: without a network it takes cached files.

    Left alone it tries each file six times, over half a minute.
    """
    before, constants = socket.getdefaulttimeout(), _constants()
    offline = constants is not None and not constants.HF_HUB_OFFLINE and not answers(_endpoint(constants))
    socket.setdefaulttimeout(before or STALL)
    if offline:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        if offline:
            constants.HF_HUB_OFFLINE = False


def out_of_reach(error: BaseException) -> str | None:
    """The host that could not be reached, if that is what an error comes from."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ in UNREACHED:
            return _endpoint(_constants()).partition("://")[2]
        if isinstance(seen, urllib.error.URLError) and _is_silence(seen):
            return "the server of these weights"
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def advising(role: str) -> Iterator[None]:
    """Add to a NotFetched what can be done: of a run's "teacher" or "student", or of the "model" that is trained."""
    flag = {"teacher": "--teacher-", "student": "--student-", "model": "--"}[role]
    key = "teacher" if role == "teacher" else "student"
    train = f" {flag}epochs N" if role == "teacher" else ""
    try:
        yield
    except NotFetched as error:
        raise NotFetched(
            f"{error}; give {key}.weights ({flag}weights FILE), or start from random weights with {key}.pretrained "
            f"false ({flag}pretrained False{train})"
        ) from error


def _constants() -> Any:
    """The client's settings; None where it is not installed."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return sys.modules.get("huggingface_hub.constants", constants)


def _endpoint(constants: Any) -> str:
    return str(getattr(constants, "ENDPOINT", HUB))


@functools.cache
def answers(url: str) -> bool:
    """Whether a host says anything at all, by way of the proxies that are set."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return not _is_silence(error)
    except (OSError, ValueError):
        return False


def _is_silence(error: urllib.error.URLError) -> bool:
    """Whether nothing answered; a certificate that is not trusted is an answer."""
    return not isinstance(error, urllib.error.HTTPError) and not isinstance(error.reason, ssl.SSLError)
