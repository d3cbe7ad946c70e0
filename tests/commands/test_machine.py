"""What `--json` prints of a folder that a command left."""

import pytest

from pcdistill.commands.folder import read_json
from pcdistill.commands.machine import machine_result
from tests.commands.folders import finished_run

TABLE = "method,seed,best/test/top1,note\nkd,0,95.5,\npcd,1,96,mean\n"
ROWS = [
    {"method": "kd", "seed": 0, "best/test/top1": 95.5, "note": None},
    {"method": "pcd", "seed": 1, "best/test/top1": 96, "note": "mean"},
]


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_a_table_has_numbers_where_they_are(command, tmp_path):
    (tmp_path / "results.csv").write_text(TABLE)
    found = machine_result(command, tmp_path)
    assert found["runs"] == ROWS
    assert found["table"] == str(tmp_path / "table.md")
    assert ("trials" in found) == (command == "tune")


def test_a_comparison_without_a_table_has_no_runs(tmp_path):
    assert machine_result("compare", tmp_path)["runs"] == []


def test_a_runs_result_stands_beside_its_files(tmp_path):
    finished_run(tmp_path, "cifar/resnet8")
    found = machine_result("distill", tmp_path)
    assert found["weights"] == str(tmp_path / "student.safetensors")
    assert found.items() >= read_json(tmp_path / "result.json").items()
