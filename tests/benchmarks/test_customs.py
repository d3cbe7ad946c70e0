import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.report.runs import make_result, make_rows, make_run, stopped

PATH = Path(__file__).parents[2] / "benchmarks" / "customs.py"


@pytest.fixture(scope="module")
def customs():
    sys.path.insert(0, str(PATH.parent))
    spec = importlib.util.spec_from_file_location("customs", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["customs"] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(PATH.parent))
    del sys.modules["customs"]


def runs_of(customs, **values):
    return {
        name: {seed: customs.Run(chosen, peak=chosen + 1, flattered=0.5) for seed, chosen in enumerate(of_seeds)}
        for name, of_seeds in values.items()
    }


def test_a_comparisons_folder_is_read(customs, tmp_path):
    result = make_result("kd", 1, best=91.0, last=90.5)  # on validation one point more
    result["best"]["val"]["top1"] = 93.0
    make_run(tmp_path / "kd" / "seed-1", result=result, rows=make_rows(shift=5.0))
    make_run(tmp_path / "pcd" / "seed-0", result=stopped("pcd", 0))
    make_run(tmp_path / "teacher", result=make_result("none"))
    found = customs.read_runs(tmp_path)
    assert found == {"kd": {1: customs.Run(chosen=91.0, peak=95.0, flattered=1.0)}}


def test_one_run_of_each_misleads_in_the_share_worked_out_by_hand(customs):
    # b is better by 1 at each seed but for rounding; of the nine pairs of seeds, a's 92 beats b's 91 and ties none.
    runs = runs_of(customs, a=[90.0, 91.0, 92.5], b=[91.0, 92.01, 93.49])
    row = customs.customs(runs, 0.5)
    assert (row["pairs"], row["told apart"]) == (1, 1)
    # gains of a, less than none: 91 - 91 = 0 is no winner; 92.5 - 91 and 92.5 - 92.01 name a
    assert row["wrong winner, one seed (%)"] == pytest.approx(100 * 2 / 9)
    assert row["not told apart, but a winner by > 0.5, one seed (%)"] == ""


def test_pairs_that_seeds_do_not_tell_apart_get_winners_from_one_seed(customs):
    row = customs.customs(runs_of(customs, a=[90.0, 91.0], b=[91.0, 90.2]), 0.5)
    assert row["told apart"] == 0
    # gains -1, -0.2, 0, 0.8: two of four by more than 0.5
    assert row["not told apart, but a winner by > 0.5, one seed, best epoch (%)"] == 50.0
    assert row["best epoch flatters by (points)"] == "0.50 ± 0.00"


def test_the_row_can_be_printed_and_stored(customs, tmp_path, capsys, monkeypatch):
    for method, best in (("kd", 90.0), ("pcd", 91.0)):
        for seed in (0, 1):
            make_run(tmp_path / "c" / method / f"seed-{seed}", result=make_result(method, seed, best + 0.1 * seed))
    out = tmp_path / "customs.json"
    monkeypatch.setattr(sys, "argv", ["customs.py", str(tmp_path / "c"), "--json", str(out)])
    customs.main()
    assert "| c | 2 | 2 | 1 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["comparison"] == "c"
