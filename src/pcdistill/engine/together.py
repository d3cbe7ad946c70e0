"""Several processes fail together: one that raises tells the others why, and none waits for it for ever."""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch

from pcdistill.errors import PcdistillError, TrainingStopped

POLL = 0.5  # seconds between looks at whether another process has failed
HEARD = 5.0  # seconds that a failing process waits for the others to hear of it
GRACE = 10.0  # seconds for a process to end by itself after it heard; one that waits in an exchange cannot


class FailTogether:
    """A block that several processes go through: an exception in one of them ends all of them, with its sentence.

    The process that raises leaves the sentence in the processes' common store. Each of the others looks there twice a
    second, from a thread. If an exchange with the lost process breaks there, the sentence is raised in place of the
    network's error; a process that is still in the block after 10 s prints it and exits with 1. A TrainingStopped is no
    failure: all processes agree on it. In a single process the block is just a block.
    """

    entered = 0  # in every process alike: blocks are entered in one order

    def __init__(self) -> None:
        FailTogether.entered += 1
        self._key = f"pcdistill/failed/{FailTogether.entered}"
        self._left = threading.Event()
        self._heard: str | None = None

    def __enter__(self) -> "FailTogether":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or _several():
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        if error is None or isinstance(error, TrainingStopped | GeneratorExit) or not _several():
            return
        told = self._heard or self._read()
        if told is not None:
            if not isinstance(error, PcdistillError):
                raise PcdistillError(told) from error
            return
        self._tell(error)

    def _tell(self, error: BaseException) -> None:
        text = str(error) if isinstance(error, PcdistillError) else f"{type(error).__name__}: {error}"
        store, rank = _store(), torch.distributed.get_rank()
        try:
            store.set(self._key, f"process {rank} failed: {text}")
            # The store may end with this process, so it waits until the others have read it.
            others, until = torch.distributed.get_world_size() - 1, time.monotonic() + HEARD
            while store.add(f"{self._key}/heard", 0) < others and time.monotonic() < until:
                time.sleep(POLL / 5)
        except RuntimeError:  # the store's own process has gone: it failed first
            return

    def _read(self) -> str | None:
        """Another process's sentence, and count that it was heard."""
        try:
            store = _store()
            if not store.check([self._key]):
                return None
            text: str = store.get(self._key).decode()
            store.add(f"{self._key}/heard", 1)
        except RuntimeError:
            return None
        return text

    def _listen(self) -> None:
        while not self._left.wait(POLL):
            self._heard = self._read() if _several() else None
            if self._heard is None:
                continue
            if not self._left.wait(GRACE):
                print(f"error: {self._heard}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def _several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
