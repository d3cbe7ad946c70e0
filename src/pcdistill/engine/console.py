"""What a person sees of a long run: a bar with the time left on a terminal, one line an epoch in a log."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from pcdistill.errors import told

if TYPE_CHECKING:
    from rich.progress import Progress

REDRAW_SECONDS = 0.2
TOLD: set[str] = set()  # warnings of which one is enough
LOG = logging.getLogger("pcdistill")
LOG.addHandler(logging.NullHandler())  # who wants the library's records sets up logging


def duration(seconds: float) -> str:
    """92 -> "1 min 32 s"."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Console:
    """Progress of one run. On a terminal a bar stands below the lines, without colours if NO_COLOR is set.

    Every line is also a record of the logger "pcdistill", quiet or not: INFO, or WARNING.

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
        self._bar: Progress | None = None
        self._rows: dict[str, Any] = {}

    def labelled(self, label: str) -> "Console":
        """The same for something else that runs."""
        return Console(label, quiet=self.quiet, stream=self.stream)

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
        if not self.live or now - self._last_drawn < REDRAW_SECONDS:
            return
        self._last_drawn = now
        fraction = (epoch + batch / max(batches, 1)) / epochs
        left = self.time_left(fraction)
        tail = f"  {duration(left)} left" if left is not None else ""
        at = f"epoch {epoch + 1}/{epochs}, {batch}/{batches}{tail}"
        bar = self._started_bar()
        bar.update(bar.task_ids[0], completed=fraction, at=at, refresh=True)

    def overall(self, fraction: float, text: str, going: Mapping[str, tuple[float, str]] | None = None) -> None:
        """Draw the bar of many runs, and one for each that is going on.

        Args:
            fraction: of all that is done.
            text: beside it.
            going: name to fraction and text of each.
        """
        if not self.live:
            return
        bar, going = self._started_bar(), going or {}
        for name in [name for name in self._rows if name not in going]:
            bar.remove_task(self._rows.pop(name))
        for name, (done, at) in going.items():
            if name not in self._rows:
                self._rows[name] = bar.add_task(name, total=1.0, at="")
            bar.update(self._rows[name], completed=done, at=at)
        bar.update(bar.task_ids[0], completed=fraction, at=text, refresh=True)

    def _started_bar(self) -> "Progress":
        if self._bar is None:
            self._bar, self._rows = _make_bar(self.label, self.stream), {}
            self._bar.start()
        return self._bar

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        """One line at an epoch's end."""
        left = self.time_left((epoch + 1) / epochs)
        tail = f"  ({duration(left)} left)" if left is not None and epoch + 1 < epochs else ""
        self.say(f"{self.label}  epoch {epoch + 1}/{epochs}  {text}{tail}")

    def say(self, text: str) -> None:
        """One line."""
        LOG.info(text)
        if not self.quiet:
            self._write(text)

    def warn(self, text: str) -> None:
        """One line, even when quiet."""
        text = " ".join(told(text).splitlines())
        LOG.warning(text)
        self._write(f"warning: {text}")

    def warn_once(self, text: str) -> None:
        """As :meth:`warn`, but once in this process, however many runs it has."""
        if text not in TOLD:
            TOLD.add(text)
            self.warn(text)

    def close(self) -> None:
        """Take the bar away and give the cursor back; the next step draws it again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, line: str) -> None:
        self.close()
        self.stream.write(line + "\n")
        self.stream.flush()


def _make_bar(label: str, stream: TextIO) -> "Progress":
    """A bar that leaves nothing behind, redrawn only when it is told to."""
    from rich.console import Console as Terminal  # here: it takes a tenth of a second, and a log needs none of it
    from rich.progress import BarColumn, Progress, TextColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(bar_width=None), TextColumn("{task.fields[at]}", markup=False))
    bar = Progress(*columns, console=Terminal(file=stream), transient=True, auto_refresh=False, expand=True)
    bar.add_task(label, total=1.0, at="")
    return bar
