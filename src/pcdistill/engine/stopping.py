"""A polite stop: SIGINT or SIGTERM asks for it, and the loop grants it at the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether a stop was asked for; a second SIGINT stops at once.

    Attributes:
        asked: whether.
        signal: by which.
    """

    def __init__(self) -> None:
        self.asked, self.signal = False, int(signal.SIGINT)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals within the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked, self.signal = True, number

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
