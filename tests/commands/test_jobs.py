"""Runs side by side: the same bits as one by one, and no run's end is another's."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pcdistill
from pcdistill.commands import jobs as module
from pcdistill.commands.jobs import Job, Share, run_jobs, shares
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.models import read_metadata
from pcdistill.recipe import load_recipe, make_recipe
from tests.processes import PATIENCE, wait_until

SRC = str(Path(pcdistill.__file__).parents[1])


def recipe(seed: int = 0, epochs: int = 1, **keys):
    base = load_recipe("digits").to_dict()
    train = {**base["train"], "epochs": epochs, "seed": seed}
    data = {**base["data"], "limit": 200, "batch_size": 50}
    return make_recipe({**base, "method": "none", "losses": [], "teacher": None, "data": data, "train": train, **keys})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "last.pt", weights_only=True)["student"]
    assert isinstance(state, dict)
    return state


@pytest.mark.parametrize(
    ("jobs", "runs", "threads", "cores", "expected"),
    [
        ("auto", 8, None, 2, [1, 1]),
        ("auto", 8, 2, 8, [2, 2, 2, 2]),
        ("auto", 1, None, 8, [8]),
        ("auto", 3, None, 8, [2, 2, 2]),
        (4, 8, None, 2, [1, 1, 1, 1]),
        (1, 8, None, 2, [2]),
        (8, 2, None, 8, [4, 4]),
        ("auto", 8, 16, 2, [16]),
    ],
)
def test_the_cores_are_shared_out(monkeypatch, jobs, runs, threads, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    found = shares(jobs, runs, threads=threads, device="cpu")
    assert [share.threads for share in found] == expected
    assert all(share.gpu is None for share in found)


def test_every_gpu_gets_its_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [share.gpu for share in shares("auto", 9)] == [0, 1]
    assert [share.gpu for share in shares(5, 9)] == [0, 1, 0, 1, 0]
    assert [share.gpu for share in shares(2, 9, device="cpu")] == [None, None]


@pytest.mark.parametrize("options", [{"jobs": 0}, {"jobs": -1}, {"jobs": "auto", "threads": 0}])
def test_numbers_below_1_are_refused(options):
    with pytest.raises(InputError, match="must be"):
        shares(options["jobs"], 3, threads=options.get("threads"))


@pytest.mark.slow
def test_side_by_side_and_one_by_one_give_the_same_bits(tmp_path):
    def carry_out(name: str, places: list[Share]) -> None:
        todo = [Job(f"seed {seed}", recipe(seed), tmp_path / name / str(seed)) for seed in range(3)]
        found = {job.name: outcome for job, outcome in run_jobs(todo, places, console=Console(quiet=True))}
        assert {outcome.status for outcome in found.values()} == {"done"}
        assert all(outcome.summary["threads"] == 1 for outcome in found.values())

    carry_out("alone", [Share(1)])
    carry_out("together", [Share(1), Share(1)])
    for seed in range(3):
        one, other = (weights(tmp_path / name / str(seed)) for name in ("alone", "together"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    files = [tmp_path / name / "0" / "student.safetensors" for name in ("alone", "together")]
    assert read_metadata(files[0]) == read_metadata(files[1])


def test_jobs_are_handed_out_in_order_and_a_place_without_one_is_asked_again():
    workers = [SimpleNamespace(job=None, told=[]) for _ in range(3)]
    for one in workers:
        one.give = lambda job, one=one: (setattr(one, "job", job), one.told.append(job))
    waiting = iter(["a", None, "b", None, "c"])

    def handed() -> list[object]:
        module._hand_out(workers, waiting)
        return [one.job for one in workers]

    assert handed() == ["a", None, None]
    assert handed() == ["a", "b", None]
    workers[0].job = None
    assert handed() == ["c", "b", None]
    assert [one.told for one in workers] == [["a", "c"], ["b"], [None]]


def test_no_process_is_started_that_would_have_no_job(tmp_path, monkeypatch):
    monkeypatch.delattr(module, "_Worker")
    ((_, outcome),) = run_jobs([Job("one", recipe(), tmp_path)], [Share(1)] * 4, console=Console(quiet=True))
    assert outcome.status == "done"


def test_several_processes_of_one_run_are_one_place(monkeypatch):
    """Each GPU is one process's then, and several runs would wait for each other's processes."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert shares("auto", 9) == shares(1, 9) == [Share(4)]
    assert shares("auto", 9, threads=2) == [Share(2)]
    with pytest.raises(InputError, match="--jobs 2 is several runs at a time, and each run takes all 8 processes"):
        shares(2, 9)


@pytest.mark.slow
def test_a_free_place_waits_where_no_job_can_begin_yet(tmp_path):
    """None stands for "later": the place is offered again when another run has ended, and then takes what came up."""
    ended = []

    def one_after_the_other():
        yield Job("first", recipe(0), tmp_path / "first")
        while "first" not in ended:
            yield None
        yield Job("second", recipe(1), tmp_path / "second", threads=2)
        yield Job("third", recipe(2), tmp_path / "third")

    places = [Share(1), Share(1), Share(1)]
    threads = {}
    for job, outcome in run_jobs(one_after_the_other(), places, console=Console(quiet=True), total=3):
        ended.append(job.name)
        threads[job.name] = outcome.summary["threads"]
    assert ended[0] == "first"
    assert threads == {"first": 1, "second": 2, "third": 1}


@pytest.mark.slow
def test_a_failed_run_and_a_killed_process_do_not_end_the_others(tmp_path):
    wrong = recipe(student={"name": "cifar/resnet8", "kwargs": {"no_such": 1}})
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal\ndef model(**kwargs):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    dies = recipe(student={"name": f"{crash}:model"})
    todo = [
        Job("wrong", wrong, tmp_path / "wrong"),
        Job("dies", dies, tmp_path / "dies"),
        Job("first", recipe(0), tmp_path / "first"),
        Job("second", recipe(1), tmp_path / "second"),
    ]
    found = {job.name: outcome for job, outcome in run_jobs(todo, [Share(1), Share(1)], console=Console(quiet=True))}
    assert {name: outcome.status for name, outcome in found.items()} == {
        "wrong": "failed",
        "dies": "failed",
        "first": "done",
        "second": "done",
    }
    assert "no_such" in found["wrong"].text
    assert "SIGKILL" in found["dies"].text


def test_a_run_that_stops_itself_says_why(tmp_path):
    diverges = recipe(epochs=2)
    diverges = replace(diverges, optim=replace(diverges.optim, lr=1e30, clip_norm=None, warmup_epochs=0.0))
    ((job, outcome),) = run_jobs([Job("one", diverges, tmp_path)], [Share(1)], console=Console(quiet=True))
    assert (job.name, outcome.status) == ("one", "stopped")
    assert "not finite" in outcome.text


@pytest.mark.slow
def test_threads_are_as_before_afterwards(tmp_path):
    before = torch.get_num_threads()
    list(run_jobs([Job("one", recipe(), tmp_path)], [Share(before + 1)], console=Console(quiet=True)))
    assert torch.get_num_threads() == before


def test_a_process_finds_its_share_in_its_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with module.environment_of(Share(2, gpu=1)):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("2", "5")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_ends_all_and_goes_on(tmp_path, number):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "pcdistill", "compare", "digits", "--methods", "none", "--seeds", "2", "--jobs", "2"]
    argv += ["--epochs", "60", "--limit", "600", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: len(list(out.rglob("metrics.csv"))) == 2, process)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, stderr
    assert "the same command continues" in stderr
    states = [torch.load(path, weights_only=True) for path in out.rglob("last.pt")]
    assert len(states) == 2
    assert all(0 < state["epoch"] < 60 for state in states)
