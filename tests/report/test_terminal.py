"""A comparison on a terminal: no line is wider than it, and no colour where none is wanted."""

import re

import pytest

from pcdistill.report import comparison_text, terminal_text


def results(seeds=3):
    return [
        {
            "status": "done", "method": method, "seed": seed, "metric": "top1", "kept": "best",
            "teacher": {"name": "cifar/resnet32x4", "test": {"top1": 79.0}},
            **{epoch: {"val": {"top1": value}, "test": {"top1": value + seed}} for epoch in ("best", "last")},
        }
        for method, value in (("none", 60.0), ("kd", 70.0), ("pcd", 71.0), ("a/long path/to/mine.py:Loss", 65.0))
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal_text(results(), width=width))
    assert max(len(line) for line in text.splitlines()) <= width
    assert max(len(line) for line in comparison_text(results()).splitlines()) > 80  # what a file gets
    assert width < 80 or all(value in text for value in ("71.00 ± 2.48", "72.00 ± 2.48", "-10.00 (3 equal)"))


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_honoured(colours, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    assert bool(re.search(r"\x1b\[3\d", terminal_text(results(), width=80))) == colours
