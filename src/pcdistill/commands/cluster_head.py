"""The head of a Ray cluster: where it is, whether it answers, and being connected to it.

Ray itself waits for a quarter of an hour for an address where something listens that is no head, and tells nothing.
"""

import io
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from pcdistill.engine.console import LOG
from pcdistill.errors import InputError, first_line
from pcdistill.plain import one_line

ANSWER_SECONDS = 10.0  # in which a head must say its first word
JOIN_SECONDS = 60.0  # in which it must take this process in; Ray looks at the clock between attempts of 40 s
FRAME = 9  # bytes of the head of a frame of HTTP/2
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # a client's preface, then settings without content
SETTINGS = 4  # the type of the frame with which every server of HTTP/2, and so of gRPC, begins


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Connected to the cluster; signals are afterwards as they were, and what Ray prints goes to the log.

    Args:
        address: "auto", or HOST:PORT of the cluster's head.

    Raises:
        InputError: none answers, or one of other versions.
    """
    head = find_head(address)
    main = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(_ToLog()):
        try:
            with _within(JOIN_SECONDS):
                ray.init(head, log_to_driver=False, logging_level=logging.ERROR, namespace="pcdistill")
        except (OSError, RuntimeError, ValueError, RayError) as error:
            ray.shutdown()
            raise InputError(f"--cluster {address}: {_why(error)}") from error
        try:
            yield
        finally:
            ray.shutdown()
            if main:
                signal.signal(signal.SIGTERM, old)


def find_head(address: str) -> str:
    """HOST:PORT where the head of a cluster answers.

    Args:
        address: "auto" (RAY_ADDRESS, else the cluster that this machine belongs to), or HOST:PORT.

    Raises:
        InputError: it is neither, or no head answers there within some seconds.
    """
    told = address
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS", "auto") or "auto") != "auto":
        address, told = named, f"auto (RAY_ADDRESS is {named})"
    if address != "auto" and _parts(address) is None:
        raise InputError(f"--cluster must be auto or HOST:PORT of the cluster's head, got {told}")
    found = _as_ray_finds(address)
    if found is None:
        raise InputError(
            f"--cluster {told}: this machine belongs to no Ray cluster; start one with `ray start --head`, or name "
            "the head of one that this machine has joined, as HOST:PORT"
        )
    parts = _parts(found)
    fault = None if parts is None else _fault(*parts)
    if fault is not None:
        at = "" if found == told else f" ({found})"
        raise InputError(f"--cluster {told}: {fault}{at}; `ray status` on a machine of the cluster names its head")
    return found


def _parts(address: str) -> tuple[str, int] | None:
    """Host and port; None if these are none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or "/" in address:
        return None
    return host.strip("[]"), int(port)


def _as_ray_finds(address: str) -> str | None:
    """The address that Ray makes of this one: it looks for "auto", and takes another for "localhost"; None: no cluster.

    The function is not among those that Ray promises to keep. Without it, the address is taken as it is.
    """
    with suppress(ImportError, AttributeError, TypeError):
        from ray._private.services import canonicalize_bootstrap_address

        try:
            found: str | None = canonicalize_bootstrap_address(address)
            return found
        except ConnectionError:
            return None
        except (OSError, ValueError):
            return address
    return address


def _fault(host: str, port: int) -> str | None:
    """Why what listens there cannot be a head; None if it can."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # then it waits for a handshake
                return None
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(HELLO)
            said = b""
            while len(said) < FRAME and (more := connection.recv(FRAME - len(said))):
                said += more
    except (OSError, OverflowError, UnicodeError) as error:
        return f"nothing answers there ({one_line(str(error))})"
    return None if len(said) == FRAME and said[3] == SETTINGS else "what answers there is no head of a Ray cluster"


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when the time is over, as soon as Python gets the word."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _why(error: Exception) -> str:
    """Why Ray did not take this process in, and what helps."""
    text = str(error)
    if "ersion mismatch" in text:  # over several lines: the cluster's, then this process's
        whole = one_line(" ".join(text.split()))
        return f"the cluster is of other versions ({whole}); install the same Ray and the same Python everywhere"
    return (
        f"no Ray cluster takes this process in ({one_line(first_line(error))}); run the command on a machine of the "
        "cluster, with the head's own port (`ray status` says it)"
    )


class _ToLog(io.TextIOBase):
    """Takes what Ray prints of dying nodes, between the lines of a result, to the log."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            LOG.debug(text.rstrip())
        return len(text)
