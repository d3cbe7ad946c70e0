"""What a person sees of a long run: a bar with the time left on a terminal, one line an epoch in a log."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """92 -> "1 min 32 s"."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Console:
    """Progress of one run. `quiet` shows nothing but warnings.

    Args:
        label: what is running, for the start of each line.
        quiet: only warnings.
        stream: where to write; standard error by default, so that results can be piped.
    """

    def __init__(self, label: str = "", *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.label = label
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.live = not quiet and self.stream.isatty()
        self._started = time.monotonic()
        self._first_fraction = 0.0
        self._last_drawn = 0.0

    def start(self, fraction_done: float = 0.0) -> None:
        """Begin timing; a resumed run starts at a fraction above 0."""
        self._started = time.monotonic()
        self._first_fraction = fraction_done

    def time_left(self, fraction_done: float) -> float | None:
        """Seconds left at the speed so far, None before there is one."""
        done = fraction_done - self._first_fraction
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * (1 - fraction_done)

    def step(self, epoch: int, epochs: int, batch: int, batches: int) -> None:
        """Draw the bar, at most five times a second, only on a terminal."""
        now = time.monotonic()
        if not self.live or now - self._last_drawn < 0.2:
            return
        self._last_drawn = now
        fraction = (epoch + batch / max(batches, 1)) / epochs
        left = self.time_left(fraction)
        width = 24
        bar = "#" * round(width * fraction)
        tail = f"  {duration(left)} left" if left is not None else ""
        self._write(f"\r{self.label}  [{bar:<{width}}] epoch {epoch + 1}/{epochs}, {batch}/{batches}{tail}  \x1b[K")

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        """One line at an epoch's end."""
        if self.quiet:
            return
        left = self.time_left((epoch + 1) / epochs)
        tail = f"  ({duration(left)} left)" if left is not None and epoch + 1 < epochs else ""
        self.say(f"{self.label}  epoch {epoch + 1}/{epochs}  {text}{tail}")

    def say(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self._write(("\r\x1b[K" if self.live else "") + text + "\n")

    def warn(self, text: str) -> None:
        """One line, even when quiet."""
        self._write(("\r\x1b[K" if self.live else "") + f"warning: {text}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
