"""What benchmarks share: rounds that take turns, continue after a stop, and never mix figures of two machines."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "_bench.py"


@pytest.fixture(scope="module")
def shared():
    spec = importlib.util.spec_from_file_location("_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_bench"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_bench"]


class Contender:
    """Counts how often it is built and run; breaks at its last round."""

    def __init__(self, name, log, breaks_at=99):
        self.name, self.log, self.breaks_at, self.runs = name, log, breaks_at, 0

    def __call__(self):
        self.log.append(f"build {self.name}")
        return self.run

    def run(self):
        self.runs += 1
        if self.runs == self.breaks_at:
            raise KeyboardInterrupt
        self.log.append(self.name)
        return float(self.runs)


def test_contenders_take_turns(shared, tmp_path):
    log = []
    found = shared.Rounds(tmp_path / "t.json", {"device": "x"}, 2).run("pair", {n: Contender(n, log) for n in "ab"})
    assert log == ["build a", "a", "build b", "b", "a", "b"]
    assert found == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_a_stopped_benchmark_continues_and_then_leaves_nothing(shared, tmp_path, capsys):
    out, log = tmp_path / "t.json", []
    with pytest.raises(KeyboardInterrupt):
        shared.Rounds(out, {"device": "x"}, 3).run("pair", {"a": Contender("a", log), "b": Contender("b", log, 2)})
    log.clear()
    rounds = shared.Rounds(out, {"device": "x", "date": "later"}, 3)
    rounds.run("pair", {"a": Contender("a", log), "b": Contender("b", log)})
    assert log == ["build b", "b", "build a", "a", "b"]
    assert "continued from" in capsys.readouterr().out
    rounds.close()
    assert list(tmp_path.iterdir()) == []


def test_figures_of_another_machine_are_not_taken(shared, tmp_path):
    out = tmp_path / "t.json"
    shared.Rounds(out, {"device": "x"}, 1).run("pair", {"a": Contender("a", [])})
    assert shared.Rounds(out, {"device": "y"}, 1).figures == {}


def test_the_ratio_is_the_median_of_the_rounds_own(shared):
    found = shared.in_turns([10.0, 40.0, 9.0], [10.0, 20.0, 3.0])
    assert found["ratio"] == 2.0
    assert found["images_per_second"] == 10.0
