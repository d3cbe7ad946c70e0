"""What a person sees: lines in a log, a bar that leaves nothing behind on a terminal, no colours with NO_COLOR."""

import io

import pytest

from pcdistill.engine import console as module
from pcdistill.engine.console import Console, duration


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_a_log_gets_lines_and_no_bar():
    stream = io.StringIO()
    console = Console("kd", stream=stream)
    console.start()
    console.step(0, 2, 1, 10)
    console.epoch(0, 2, "loss 1.0")
    console.say("words [in brackets]")
    console.warn("look")
    first, *others = stream.getvalue().splitlines()
    assert first.startswith("kd  epoch 1/2  loss 1.0  (")
    assert others == ["words [in brackets]", "warning: look"]
    assert "\x1b" not in stream.getvalue()


def test_quiet_shows_warnings_alone():
    stream = Terminal()
    console = Console("kd", quiet=True, stream=stream)
    console.step(0, 1, 1, 10)
    console.epoch(0, 1, "loss 1.0")
    console.say("words")
    console.warn("look")
    assert stream.getvalue() == "warning: look\n"


def test_a_warning_is_one_line_whatever_name_is_in_it():
    stream = io.StringIO()
    Console("kd", stream=stream, quiet=True).warn("the folder a\x1eb\x1b[31m\u2028\udce4ä is empty\nand more")
    assert stream.getvalue() == "warning: the folder a\\x1eb\\x1b[31m\\u2028\\udce4ä is empty and more\n"


def test_a_terminal_gets_a_bar_that_gives_way_to_lines():
    stream = Terminal()
    console = Console("kd", stream=stream)
    console.start()
    console.step(0, 2, 5, 10)
    assert "epoch 1/2, 5/10" in stream.getvalue()
    assert "left" in stream.getvalue()
    assert "\x1b[?25l" in stream.getvalue()  # the cursor is hidden while the bar stands
    console.say("a line")
    assert stream.getvalue().endswith("a line\n")
    console.step(1, 2, 5, 10)
    console.close()
    console.close()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 2


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_honoured(colours, monkeypatch):
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    console = Console("kd", stream=stream)
    console.step(0, 2, 5, 10)
    console.close()
    assert ("\x1b[38;" in stream.getvalue()) == colours


def test_time_left_counts_from_where_a_run_was_resumed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(quiet=True)
    console.start(0.5)
    assert console.time_left(0.5) is None
    now[0] = 10.0
    assert console.time_left(0.75) == pytest.approx(10.0)


def test_durations_read_well():
    assert [duration(s) for s in (-1, 59.6, 92, 3725)] == ["0 s", "1 min 00 s", "1 min 32 s", "1 h 02 min"]


def test_another_label_keeps_the_stream_and_the_quiet():
    console = Console("compare", quiet=True, stream=io.StringIO())
    other = console.labelled("teacher")
    assert (other.label, other.quiet, other.stream) == ("teacher", True, console.stream)
