"""What `list` prints: all names in a pipe, a few words on a terminal, and names that fit a pattern."""

import io
import json
import re

from pcdistill.cli import main
from pcdistill.commands.listing import fitting, listed, print_rows, summarised

ROWS = [("timm/resnet18", ""), ("timm/resnet18d", ""), ("torchvision/resnet18", ""), ("cifar/vgg8", "")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pattern_is_a_part_of_the_name_or_a_glob():
    assert [name for name, _ in fitting(ROWS, "RESNET18D")] == ["timm/resnet18d"]
    assert [name for name, _ in fitting(ROWS, "resnet18")] == [name for name, _ in ROWS[:3]]
    assert [name for name, _ in fitting(ROWS, "*net18")] == ["timm/resnet18", "torchvision/resnet18"]
    assert fitting(ROWS, "") == ROWS


def test_models_are_counted_for_a_person():
    (timm, said), *_, (_, hint) = summarised(ROWS, "models")
    assert (timm, said) == ("timm/", "2: resnet18, resnet18d, ...")
    assert "pcdistill list models resnet18" in hint


def test_a_terminal_gets_whole_words_in_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    rows = listed("methods")
    print_rows(rows, stream)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    words = {word for row in rows for part in row for word in part.split()}
    assert {word for line in lines for word in line.split()} <= words


def test_json_is_for_machines(capsys):
    main(["list", "methods", "pcd", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found[0]["name"] == "pcd"
    assert found[0]["about"]
