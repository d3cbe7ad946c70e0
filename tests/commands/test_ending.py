"""After the end nothing is written but what is missing; and a kill or a full disk at any write loses nothing."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pcdistill
from pcdistill import cli
from pcdistill.classification.task import Classification
from pcdistill.commands.session import Session
from pcdistill.engine.loop import Trainer
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.recipe import load_recipe
from pcdistill.report import run_page

FILES = {
    *(".pcdistill", "recipe.yaml", "environment.json", "metrics.csv", "best.pt", "last.pt", "student.safetensors"),
    *("report.html", "README.md", "result.json", "times.json", "answers.npz"),
}
DERIVED = ("recipe.yaml", "metrics.csv", "student.safetensors", "report.html", "README.md")
MODELS = """
from torch import nn

def big(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))

def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def net(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


def run(out: Path, *, method: str = "kd", lr: float = 0.05, **options):
    """A distillation of two epochs on four classes of noise that are easily told apart."""
    torch.manual_seed(1)
    labels = torch.arange(96) % 4
    images = 0.3 * torch.randn(96, 1, 4, 4)
    images[torch.arange(96), 0, labels, 0] += 3
    loader = DataLoader(TensorDataset(images, labels), 32)
    teacher = net(16, 9)
    with torch.no_grad():
        teacher[1].weight.zero_()
        teacher[1].bias.zero_()
        teacher[3].weight.zero_()
        for i in range(4):
            teacher[1].weight[i, 4 * i] = 1.0
            teacher[3].weight[i, i] = 3.0
    return pcdistill.distill(
        **{"teacher": teacher, "student": net(6), "train": loader, "val": loader, "epochs": 2, "verbose": False},
        **{
            "method": method,
            "lr": lr,
            "out": out,
            "optim": {"warmup_epochs": 0},
            "train_options": {"keep": "best", **options},
        },
    )


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def idle(monkeypatch):
    """Nothing may be trained or evaluated."""

    def never(*args, **kwargs):
        pytest.fail("it was trained or evaluated again")

    def arm():
        for owner, name in ((Classification, "evaluate"), (Classification, "gate"), (Trainer, "fit")):
            monkeypatch.setattr(owner, name, never)

    return arm


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"keep": "last", "ema": 0.5}], ids=["best", "last of an average"])
def test_repeating_a_finished_run_gives_it_back_and_writes_nothing(tmp_path, idle, options):
    whole = run(tmp_path, **options)
    before = state(tmp_path)
    assert set(before) == FILES
    idle()
    again = run(tmp_path, **options)
    assert state(tmp_path) == before
    assert again.history == whole.history
    assert again.summary == json.loads(json.dumps(whole.summary))
    assert all(
        torch.equal(a, b) for a, b in zip(*(one.student.state_dict().values() for one in (whole, again)), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"keep": "last", "ema": 0.5}], ids=["best", "last of an average"])
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_missing_is_made_again_to_the_same_bits_and_nothing_else(tmp_path, idle, name, options):
    run(tmp_path, **options)
    before = state(tmp_path)
    (tmp_path / name).unlink()
    idle()
    run(tmp_path, **options)
    after = state(tmp_path)
    assert after.pop(name)[0] == before.pop(name)[0]
    assert after == before


@pytest.mark.slow
def test_without_checkpoints_a_finished_run_is_given_back_from_its_other_files(tmp_path, idle):
    whole = run(tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    before = state(tmp_path)
    idle()
    again = run(tmp_path)
    assert state(tmp_path) == before
    assert [row["epoch"] for row in again.history] == [row["epoch"] for row in whole.history]


@pytest.mark.slow
def test_a_finished_run_without_weights_says_so(tmp_path):
    run(tmp_path)
    for name in ("best.pt", "student.safetensors"):
        (tmp_path / name).unlink()
    before = state(tmp_path)
    with pytest.raises(InputError, match=r"is done, but its weights are gone \(student.safetensors and best.pt\)"):
        run(tmp_path)
    assert state(tmp_path) == before


@pytest.mark.slow
def test_weights_of_another_run_are_not_given_back(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1, lr=0.07)
    for name in ("best.pt", "student.safetensors"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(InputError, match=r"student.safetensors is not what the run in .* left"):
        run(tmp_path / "a")
    (tmp_path / "a" / "student.safetensors").unlink()
    with pytest.raises(InputError, match=r"best.pt is not the checkpoint of the result"):
        run(tmp_path / "a")


class Killed(BaseException):
    """As good as SIGKILL to what is written."""


def at_write(monkeypatch, number: int, error: BaseException) -> list[str]:
    """Fail at so many-th file that is to take its place; the names of all before."""
    names: list[str] = []
    replace = os.replace

    def counted(source, target):
        if len(names) == number:
            raise error
        names.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("pcdistill.files.os.replace", counted)
    return names


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_torch_and_safetensors_do_not_hide_what_the_system_says(tmp_path, monkeypatch, number):
    """Writing fails within their serialisation too."""
    from pcdistill.engine.checkpoint import save_checkpoint
    from pcdistill.models import save_weights

    def full(self, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pcdistill.engine.checkpoint._Hashing.write", full)
    with pytest.raises(OSError, match=r"a\.pt") as stop:
        save_checkpoint(tmp_path / "a.pt", {"a": torch.zeros(3)})
    assert stop.value.errno == number
    monkeypatch.setattr("pcdistill.files.os.fsync", lambda file: full(None, None))
    with pytest.raises(OSError, match=r"a\.safetensors") as stop:
        save_weights(net(4), tmp_path / "a.safetensors")
    assert stop.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_says_so_again_and_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(TrainingStopped, match="the loss is not finite"):
        run(tmp_path / "run", lr=1e30)
    before = state(tmp_path)
    assert "result.json" in {Path(name).name for name in before}
    with pytest.raises(
        TrainingStopped,
        match=r"run holds a run of this recipe, which was stopped: the loss is not finite.*"
        r"Change the recipe and name another folder \(out=\".*run-2\"\), or delete .*run to try it again",
    ):
        run(tmp_path / "run", lr=1e30)
    with pytest.raises(
        InputError,
        match=r"a run that was stopped \(the loss is not finite.*\) of another recipe \(lr 1e\+30 -> 0.05\)",
    ):
        run(tmp_path / "run")
    assert state(tmp_path) == before


@pytest.mark.slow
def test_environment_of_a_run_that_goes_on_keeps_its_beginning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        names = at_write(patch, 6, Killed())
        with pytest.raises(Killed):
            run(tmp_path)
    assert "last.pt" in names
    first = json.loads((tmp_path / "environment.json").read_text())
    monkeypatch.setattr("pcdistill.commands.environment.platform.platform", lambda: "another machine")
    run(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    (later,) = found.pop("continued")
    assert found == first
    assert later["platform"] == "another machine"
    assert later.keys() <= {"started", "platform"}


@pytest.mark.slow
def test_pages_come_before_the_result_and_show_it(tmp_path, monkeypatch):
    seen = []

    def watched(out, result=None):
        seen.append((out / "result.json").exists())
        return run_page.write_run_report(out, result)

    monkeypatch.setattr("pcdistill.report.write_run_report", watched)
    found = run(tmp_path)
    assert seen == [False]
    assert f"{found.summary['best']['val']['top1']:.2f}" in (tmp_path / "report.html").read_text()
    assert "result.json is not in the folder" not in (tmp_path / "report.html").read_text()


# Commands


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """A command on digits with models of two layers: its exit code, and what it wrote on standard error."""
    (tmp_path / "mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)

    def go(name: str, *argv: str) -> tuple[int, str]:
        models = ["--teacher", "mine.py:big", *([] if name == "cache" else ["--student", "mine.py:small"])]
        size = ["--limit", "300", "--device", "cpu", "--quiet", "--allow", "weak-teacher"]
        own = [] if name == "cache" else ["--teacher-epochs", "3"]
        try:
            cli.main([name, "digits", *models, *size, *own, "--set", "optim.warmup_epochs=0", *argv])
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err.strip()
        return 0, capsys.readouterr().err.strip()

    return go


COMPARE = ("--methods", "none,kd", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--out", "out")


@pytest.mark.slow
def test_a_comparison_that_is_done_is_left_as_it_is(call, tmp_path, idle):
    assert call("compare", *COMPARE) == (0, "")
    before = state(tmp_path / "out")
    assert {"comparison.json", "report.html", "table.md", "results.csv", ".pcdistill"} <= set(before)
    idle()
    assert call("compare", *COMPARE, "--threads", "1") == (0, "")
    assert state(tmp_path / "out") == before
    for name in ("report.html", "results.csv", "kd/seed-0/report.html", "none/seed-1/README.md"):
        (tmp_path / "out" / name).unlink()
        assert call("compare", *COMPARE) == (0, "")
        after = state(tmp_path / "out")
        assert after[name][0] == before[name][0]
        assert {key: one for key, one in after.items() if key != name} == {
            key: one for key, one in before.items() if key != name
        }
        before = after
    assert call("compare", *COMPARE, "--margin", "3") == (0, "")
    assert (tmp_path / "out" / "table.md").read_bytes() != before["table.md"][0]


@pytest.mark.slow
def test_a_comparison_keeps_finished_runs_without_checkpoints(call, tmp_path, idle):
    assert call("compare", *COMPARE)[0] == 0
    for path in (tmp_path / "out").rglob("*.pt"):
        path.unlink()
    before = state(tmp_path / "out")
    idle()
    assert call("compare", *COMPARE) == (0, "")
    assert state(tmp_path / "out") == before


@pytest.mark.slow
def test_another_recipe_of_a_comparison_is_refused_at_once_with_its_keys(call, tmp_path, idle):
    assert call("compare", *COMPARE)[0] == 0
    before = state(tmp_path / "out")
    idle()
    code, said = call("compare", *COMPARE, "--set", "optim.lr=0.01")
    assert code == 2
    assert said == (
        "pcdistill: out/teacher holds the result of another recipe (optim.lr 0.05 -> 0.01); name another folder "
        "(--out out-2), or delete out/teacher"
    )
    code, said = call("compare", *(value if value != "1" else "2" for value in COMPARE))
    assert code == 2
    assert "out/none/seed-0 holds the result of another recipe (train.epochs 1 -> 2)" in said
    code, said = call("compare", *COMPARE, "--student", "cifar/resnet9", "--epochs", "3")
    assert code == 2
    assert "another recipe" not in said
    assert "resnet9" in said
    assert state(tmp_path / "out") == before


@pytest.mark.slow
def test_a_comparison_says_that_its_teacher_was_stopped(call, tmp_path):
    wild = ("--set", "optim.lr=1e30", "--set", "optim.clip_norm=null")
    assert call("compare", *COMPARE, *wild)[0] == 1
    code, said = call("compare", *COMPARE, *wild)
    assert code == 1
    assert said.startswith(
        "pcdistill: out/teacher holds a run of this recipe, which was stopped: the loss is not finite in epoch 1"
    )
    assert said.endswith("name another folder (--out out-2), or delete out/teacher to try it again")
    code, said = call("compare", *COMPARE)
    assert code == 2
    assert "out/teacher holds a run that was stopped (the loss is not finite in epoch 1" in said
    assert "of another recipe (optim.lr 1e+30 -> 0.05, optim.clip_norm none -> 5.0)" in said
    assert said.endswith("name another folder (--out out-2), or delete out/teacher")
    (tmp_path / "out" / "teacher").rename(tmp_path / "gone")
    assert call("compare", *COMPARE) == (0, "")


def test_a_run_says_that_its_teacher_was_stopped(call):
    argv = ("--method", "kd", "--epochs", "1", "--out", "run")
    assert call("distill", *argv, "--set", "optim.lr=1e30")[0] == 1
    code, said = call("distill", *argv, "--set", "optim.lr=1e30")
    assert code == 1
    assert "run/teacher holds a run of this recipe, which was stopped" in said
    code, said = call("distill", *argv)
    assert code == 2
    assert "name another folder (--out run-2), or delete run/teacher" in said


@pytest.mark.slow
def test_a_mistyped_name_is_not_hidden_by_another_recipe(call):
    argv = ("--method", "kd", "--epochs", "1", "--out", "run")
    assert call("distill", *argv)[0] == 0
    for wrong in (("--student", "cifar/resnet9"), ("--teacher", "cifar/resnet9"), ("--set", "losses.kd.temperatur=2")):
        code, said = call("distill", *argv, *wrong)
        assert code == 2
        assert "another recipe" not in said, said
        assert wrong[1].rpartition("=")[0].removeprefix("losses.kd.") in said


@pytest.mark.slow
def test_a_finished_run_does_not_need_its_teacher(call, tmp_path, idle):
    argv = ("--method", "kd", "--epochs", "1", "--out", "run")
    assert call("distill", *argv)[0] == 0
    (tmp_path / "run" / "teacher").rename(tmp_path / "gone")
    before = state(tmp_path / "run")
    idle()
    assert call("distill", *argv) == (0, "")
    assert state(tmp_path / "run") == before


@pytest.mark.slow
def test_a_cache_that_is_done_is_left_as_it_is_and_repaired(call, tmp_path, idle):
    assert call("distill", "--method", "none", "--student", "mine.py:big", "--epochs", "2", "--out", "big")[0] == 0
    argv = ("--teacher-weights", "big/student.safetensors", "--epochs", "2", "--out", "cache")
    assert call("cache", *argv) == (0, "")
    before = state(tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcdistill.classification.task.check_teacher", lambda *args, **kwargs: pytest.fail("evaluated"))
        assert call("cache", *argv) == (0, "")
    assert state(tmp_path / "cache") == before
    (tmp_path / "cache" / "epoch-0000.bin").unlink()
    (tmp_path / "cache" / "epoch-0001.bin").write_bytes(b"cut")
    assert call("cache", *argv) == (0, "")
    assert {name: one[0] for name, one in state(tmp_path / "cache").items()} == {n: one[0] for n, one in before.items()}
    code, said = call("cache", *argv, "--batch-size", "30")
    assert code == 2
    assert "cache holds another cache (data.batch_size 64 -> 30" in said
    assert said.endswith("name another folder (--out cache-2), or delete cache")


@pytest.mark.slow
def test_a_search_that_is_done_is_left_as_it_is(call, tmp_path, idle):
    argv = ("--methods", "kd,dist", "--trials", "3", "--final-seeds", "2", "--epochs", "2", "--jobs", "1")
    assert call("tune", *argv, "--out", "out") == (0, "")
    before = state(tmp_path / "out")
    assert "best.yaml" in before
    idle()
    assert call("tune", *argv, "--out", "out", "--threads", "1") == (0, "")
    assert state(tmp_path / "out") == before
    for name in ("best.yaml", "trials.csv", "report.html"):
        (tmp_path / "out" / name).unlink()
    assert call("tune", *argv, "--out", "out") == (0, "")
    after = state(tmp_path / "out")
    assert set(after) == set(before)
    assert after["trials.csv"][0] == before["trials.csv"][0]
    code, said = call("tune", *argv, "--out", "out", "--set", "optim.lr=0.01")
    assert code == 2
    assert "holds the search of another recipe or other methods (optim.lr 0.05 -> 0.01)" in said
    assert "name another folder (--out out-2), or delete out" in said


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("mine.py", "mine.py is a file; --out must name a folder"),
        ("mine.py/run", "mine.py/run cannot be a folder: Not a directory"),
        ("loop", "loop cannot be a folder: Too many levels of symbolic links"),
        ("x" * 300, "cannot be a folder: File name too long"),
        ("/".join(["y" * 200] * 30), "cannot be a folder: File name too long"),
        (".", "holds files that pcdistill did not write (README.md, loop, mine.py and 1 more)"),
    ],
    ids=["file", "below a file", "loop", "long", "long path", "a user's"],
)
@pytest.mark.parametrize("name", ["distill", "compare", "cache"])
def test_a_folder_that_cannot_be_one_is_one_sentence_and_exit_code_2(call, tmp_path, name, out, says):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "recipe.yaml").write_text("mine: 1")
    before = state(tmp_path)
    argv = ("--seeds", "1", "--methods", "none") if name == "compare" else ()
    code, said = call(name, *argv, "--epochs", "1", "--out", out)
    assert code == 2
    assert says in said
    assert len(said.splitlines()) == 1
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b: No space left on device; free some, and"),
        (OSError(errno.EROFS, "Read-only file system", "a"), 1, "a: Read-only file system; name another place"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "a: Permission denied; change its permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "a: File name too long"),
        (OSError("no number"), 1, "no number"),
        (KeyboardInterrupt(), 130, "stopped at once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_the_system_says_is_one_sentence(capsys, monkeypatch, error, code, says):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli.List, "run", refuse)
    with pytest.raises(SystemExit) as stop:
        cli.main(["list"])
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(f"pcdistill: {says}")
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_metrics_that_a_kill_left_behind_are_complete_at_the_end(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        names = at_write(patch, 1000, Killed())
        run(tmp_path / "whole")
    last = max(
        i for i, name in enumerate(names) if name == "metrics.csv" and i < names.index("student.safetensors") - 1
    )
    with monkeypatch.context() as patch:
        at_write(patch, last, Killed())
        with pytest.raises(Killed):
            run(tmp_path / "run")
    run(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.slow
def test_a_session_in_steps_finds_the_end_too(tmp_path):
    values = {"data.name": "digits", "data.limit": 200, "student.name": "cifar/resnet8", "method": "none"}
    recipe = load_recipe(None, values={**values, "train.epochs": 1, "train.device": "cpu"})
    for _ in range(2):
        session = Session(recipe, tmp_path / "run")
        session.prepare()
        session.train()
        result = session.conclude()
    assert session.stored == result.summary
