"""The table of docs/reliability.md: every part that was counted, and their sum."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import faults_table  # the folder of scripts is no package


def test_every_part_and_the_sum_are_rows(tmp_path):
    for part, tried in (("kills", 3), ("bytes", 40)):
        counts = {"part": part, "tried": tried, "refused": 1, "worked": tried - 1, "lost": 0}
        (tmp_path / f"{part}.json").write_text(json.dumps(counts))
    rows = faults_table.table(tmp_path).splitlines()
    assert rows[2:] == ["| bytes | 40 | 1 | 39 | 0 |", "| kills | 3 | 1 | 2 | 0 |", "| all | 43 | 2 | 41 | 0 |"]


def test_without_counts_the_page_stays(tmp_path, capsys):
    assert faults_table.main(tmp_path) == 1
    assert "make test-faults" in capsys.readouterr().err
