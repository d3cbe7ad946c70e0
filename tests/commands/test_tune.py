"""Tuning from end to end on digits: nothing of the test set in the search, a kill and what follows, a recipe."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pcdistill
from pcdistill import cli
from pcdistill.classification.task import Classification
from pcdistill.commands.pages import remake_pages
from pcdistill.recipe import load_recipe
from tests.processes import PATIENCE, wait_until

SRC = str(Path(pcdistill.__file__).parents[1])
MODELS = """
from torch import nn

def big(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))

def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def command(folder: Path, *more: str) -> list[str]:
    """Tuning a student of two layers."""
    (folder / "mine.py").write_text(MODELS)
    models = ["--teacher", f"{folder / 'mine.py'}:big", "--student", f"{folder / 'mine.py'}:small"]
    size = ["--teacher-epochs", "6", "--epochs", "3", "--limit", "400", "--final-seeds", "2", "--threads", "1"]
    keys = ["--set", "optim.warmup_epochs=0", "--out", str(folder / "out")]
    return ["tune", "digits", *models, *size, *keys, *more]


@pytest.fixture
def fails(capsys):
    """The sentence that a command ends with, by exit code 2."""

    def of(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(argv))
        assert stop.value.code == 2
        return capsys.readouterr().err.strip()

    return of


def test_without_optuna_a_sentence_names_what_to_install(monkeypatch, fails, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert fails(*command(tmp_path)) == (
        "pcdistill: tune needs optuna, which is not installed: pip install 'pcdistill[tune]'"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--final-seeds", "1"], "--final-seeds must be at least 2, got 1"),
        (["--time-limit", "0"], "--time-limit must be a finite number above 0, got 0"),
        (["--margin", "nan"], "--margin must be a finite number above 0, got nan"),
        (["--methods", "kd,pdc"], 'unknown method "pdc"; did you mean "pcd"'),
        (["--set", "teacher=null"], "tune needs a teacher"),
        (["--methods", "mlkd", "--set", "data.views=1"], "views"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told_before_anything_is_trained(fails, tmp_path, argv, says):
    assert says in fails(*command(tmp_path), *argv)
    assert not (tmp_path / "out").exists()


def test_a_search_by_several_processes_is_refused(fails, tmp_path, monkeypatch):
    """Each would propose trials of its own, and wait for the others in the first."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "tune is started as one process, and there are 2" in fails(*command(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_search_never_evaluates_on_the_test_set_and_ends_in_a_recipe(monkeypatch, capsys, tmp_path):
    out, seen = tmp_path / "out", []
    evaluate = Classification.evaluate

    def watched(self, model, batches, data, placement):
        searching = (out / "trials").exists() and not (out / "trials.csv").exists()
        seen.append((searching, batches is data.test))
        return evaluate(self, model, batches, data, placement)

    monkeypatch.setattr(Classification, "evaluate", watched)
    cli.main(command(tmp_path, "--trials", "4", "--methods", "kd,dist,pcd", "--jobs", "1"))
    assert seen.count((True, False)) >= 4
    assert (True, True) not in seen
    assert seen.count((False, True)) >= 4  # of the final runs

    with open(out / "trials.csv", newline="") as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert len(states) == 4
    assert set(states) <= {"complete", "pruned"}
    assert not list((out / "trials").rglob("*.pt"))
    assert not list((out / "trials").rglob("result.json"))
    trial = yaml.safe_load((out / "trials" / "000" / "recipe.yaml").read_text())
    assert trial["teacher"]["cache"] == str(out / "cache")
    assert trial["train"]["seed"] == 0
    final = {(path.parts[-3].rstrip("0123456789"), path.parts[-2]) for path in out.glob("*/seed-*/result.json")}
    assert final == {(name, f"seed-{seed}") for name in ("default", "trial-") for seed in (1, 2)}

    text = (out / "best.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0].startswith("# Made by: pcdistill tune digits")
    assert "on validation)" in header[1]
    assert header[2].startswith("# On 2 fresh seeds, tuned against default: ")
    recipe = load_recipe(out / "best.yaml")
    assert recipe.teacher.cache is None
    assert recipe.teacher.weights == str(out / "teacher" / "teacher.safetensors")
    assert recipe.method in ("kd", "dist", "pcd")
    printed = capsys.readouterr().out
    assert header[2].removeprefix("# On 2 fresh seeds, ") in printed

    before = {path: path.read_bytes() for path in (out / "report.html", out / "table.md", out / "results.csv")}
    for path in remake_pages(out):
        path.unlink()
    assert set(remake_pages(out)) >= set(before)
    assert {path: path.read_bytes() for path in before} == before
    assert "against default" in printed
    assert (out / "report.html").exists()
    cli.main(["distill", str(out / "best.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_search_side_by_side_is_stopped_and_goes_on(tmp_path, number, capsys):
    out = tmp_path / "out"
    argv = command(tmp_path, "--trials", "3", "--methods", "kd,dist", "--jobs", "2", "--epochs", "4")
    argv = [sys.executable, "-m", "pcdistill", *argv]
    env = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: list(out.glob("trials/*/last.pt")), process)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "methods kd, dist" in stderr
    assert "trials  3, then 2 fresh seeds" in stderr
    if number == signal.SIGINT:
        assert "the same command continues" in stderr
    begun = {path.name for path in out.glob("trials/*")}
    assert begun
    assert not (out / "best.yaml").exists()
    argv[argv.index("--jobs") + 1] = "1"  # no processes to start
    cli.main(argv[3:])
    assert "[3/3] trial" in capsys.readouterr().err
    with open(out / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    assert begun <= {path.name for path in out.glob("trials/*")}
    load_recipe(out / "best.yaml")
