"""The command line as a user meets it: the main job, the mistakes people make, a kill and a resume, speed of --help."""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from pcdistill import cli
from pcdistill.commands import machine
from pcdistill.recipe import load_recipe
from pcdistill.stats import MARGIN
from tests.processes import PATIENCE, wait_until

QUICK = ["--epochs", "1", "--teacher-epochs", "6", "--limit", "512", "--teacher", "cifar/resnet8", "--quiet"]


def call(*argv: str) -> None:
    cli.main([str(part) for part in argv])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher trained on digits for a moment: good enough to pass the gate."""
    out = tmp_path_factory.mktemp("teacher")
    call("train", "--data", "digits", "--model", "cifar/resnet8", "--epochs", "3", "--out", out, "--quiet")
    return out / "student.safetensors"


def distill(teacher: Path, out: Path, *more: str) -> None:
    call(
        *("distill", "--data", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", teacher),
        *("--student", "cifar/resnet8", "--epochs", "2", "--limit", "256", "--out", out, "--quiet", *more),
    )


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def error_of(capsys, *argv: str) -> str:
    """The one sentence that a wrong input gives, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert "Traceback" not in text
    return text


def test_distill_leaves_a_complete_folder(teacher, tmp_path, capsys):
    out = tmp_path / "run"
    distill(teacher, out)
    names = {path.name for path in out.iterdir()}
    assert names >= {
        *("recipe.yaml", "environment.json", "metrics.csv", "best.pt", "last.pt", "result.json"),
        *("student.safetensors", "report.html", "README.md"),
    }
    summary = json.loads((out / "result.json").read_text())
    assert summary["status"] == "done"
    assert {"best", "last"} <= set(summary)
    for which in ("best", "last"):
        assert 0 <= summary[which]["test"]["top1"] <= 100
    rows = rows_of(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train/ce", "train/dist", "val/top1"} <= set(rows[0])
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert [term["method"] for term in recipe["losses"]] == ["ce", "dist"]
    printed = capsys.readouterr().out
    assert "teacher" in printed
    assert "(best epoch" in printed
    assert "(last epoch" in printed
    assert "student.safetensors" in printed
    # The teacher is in no checkpoint: every tensor of the student's file is the student's own.
    saved = set(load_file(out / "student.safetensors"))
    assert set(torch.load(out / "last.pt", weights_only=True)["student"]) >= saved
    assert not any("teacher" in key for key in saved)

    call("evaluate", out)
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == pytest.approx(summary[summary["kept"]]["test"]["top1"], abs=1e-6)


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_changes_nothing(teacher, tmp_path):
    distill(teacher, tmp_path / "run")
    before = load_file(tmp_path / "run" / "student.safetensors")
    distill(teacher, tmp_path / "run")
    after = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_two_runs_of_one_command_give_the_same_weights(teacher, tmp_path):
    distill(teacher, tmp_path / "a")
    distill(teacher, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_compare_prints_and_writes_its_table_and_repeats_it(tmp_path, capsys):
    argv = ["compare", "--data", "digits", "--methods", "none,kd,pcd", "--seeds", "2", "--student", "cifar/resnet8"]
    tables = []
    for name in ("a", "b", "a"):  # the third finds everything done
        call(*argv, *QUICK, "--out", tmp_path / name)
        tables.append(capsys.readouterr().out.split("written:")[0])
    assert tables[0] == tables[1] == tables[2]
    assert tables[0].startswith("Verdict, test top-1 of the best epoch:")
    call(*argv, *(part for part in QUICK if part != "--quiet"), "--margin", "2", "--out", tmp_path / "a")
    again = capsys.readouterr()
    assert "No difference greater than 2 points" in again.out
    assert "[6/6] pcd, seed 1" in again.err
    assert "left" not in again.err  # nothing was trained, so nothing is known of the time left
    assert all(method in tables[0] for method in ("none", "kd", "pcd"))
    rows = rows_of(tmp_path / "a" / "results.csv")
    assert len(rows) == 6
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_compare_at_equal_strengths_trains_every_method_at_each(tmp_path, capsys):
    argv = ["compare", "--data", "digits", "--methods", "none,kd,pld", "--seeds", "1", "--student", "cifar/resnet8"]
    call(*argv, "--equal-strength", "4,1", *QUICK, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert "| method | strength 1 | strength 4 |" in shown
    rows = rows_of(tmp_path / "results.csv")
    assert [(row["method"], row["strength"]) for row in rows] == [
        ("none", ""),
        ("kd", "1.0"),
        ("kd", "4.0"),
        ("pld", ""),  # it stands for the labels too: trained once, as it is
    ]
    assert (tmp_path / "kd" / "strength-4" / "seed-0" / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--equal-strength", "1,0"], 'finite numbers above 0, as in 1,4,16; got "0"'),
        (["--equal-strength", "1,,4"], "finite numbers above 0"),
        (["--equal-strength", "many"], 'got "many"'),
        (["--jobs", "many"], "--jobs must be auto or a number, got many"),
        (["--jobs", "0"], "--jobs must be auto or at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_of_a_comparison_are_refused(flags, says, tmp_path, capsys):
    argv = ["compare", "--data", "digits", "--methods", "none", "--seeds", "1", "--epochs", "1", "--limit", "64"]
    with pytest.raises(SystemExit) as stop:
        call(*argv, *flags, "--out", tmp_path)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # before a teacher is trained


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(teacher, tmp_path):
    """SIGKILL in mid-epoch, then the same command: the same weights as the run that was left alone."""
    base = [
        *(sys.executable, "-m", "pcdistill.cli", "distill", "--data", "digits", "--teacher", "cifar/resnet8"),
        *("--teacher-weights", str(teacher), "--student", "cifar/resnet8", "--epochs", "4", "--seed", "3"),
        *("--set", "train.checkpoint_seconds=0", "--set", "train.ema=0.9", "--quiet", "--device", "cpu"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    subprocess.run([*base, "--out", str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [*base, "--out", str(cut)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE
    killed_at = None
    while time.monotonic() < deadline and process.poll() is None and killed_at is None:
        if (cut / "last.pt").exists():
            try:
                state = torch.load(cut / "last.pt", weights_only=True)
            except (RuntimeError, EOFError, OSError):
                continue
            if state["epoch"] >= 1 and state["batch"] > 2:
                process.send_signal(signal.SIGKILL)
                killed_at = (state["epoch"], state["batch"])
        time.sleep(0.002)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (cut / "result.json").exists()
    subprocess.run([*base, "--out", str(cut)], check=True, env=env, capture_output=True)
    whole, resumed = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(teacher, tmp_path):
    argv = [
        *(sys.executable, "-m", "pcdistill.cli", "distill", "--data", "digits", "--teacher", "cifar/resnet8"),
        *("--teacher-weights", str(teacher), "--student", "cifar/resnet8", "--epochs", "200", "--device", "cpu"),
        *("--out", str(tmp_path / "run"), "--set", "train.checkpoint_seconds=0.1"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "run" / "last.pt").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "interrupted in epoch" in err or "interrupted after epoch" in err
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_every_flag_sets_a_key_of_the_recipe_and_is_named_by_it():
    tree = asdict(load_recipe("default"))
    found = set()
    for command in cli.COMMANDS.values():
        for hint in get_type_hints(command, include_extras=True).values():
            for key in getattr(hint, "__metadata__", ()):
                if isinstance(key, cli.Key):
                    group, _, name = key.name.partition(".")
                    assert group in tree
                    assert not name or name in tree[group]
                    found.add(key.name)
    assert len(found) > 15


def test_a_flag_and_set_give_the_same_recipe(capsys):
    shown = []
    for way in (["--teacher", "timm/resnet18"], ["--set", "teacher.name=timm/resnet18"]):
        call("distill", "--data", "digits", *way, "--print-config")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert yaml.safe_load(shown[0])["teacher"]["pretrained"] is True


def test_the_package_is_a_program():
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    argv = [sys.executable, "-m", "pcdistill", "list", "methods", "--search", "pcd"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pcd ")


@pytest.mark.slow
def test_help_is_quick_and_imports_no_torch():
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    code = (
        "import sys\nfrom pcdistill.cli import main\n"
        "for command in ([], *[[name] for name in sys.argv[1:]]):\n"
        "    try:\n        main([*command, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code in (0, None)\n"
        "    slow = {'torch', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)\n"
        "    assert not slow, f'{command}: {slow} was imported'"
    )
    argv = [sys.executable, "-c", code, *cli.COMMANDS]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage") >= 1 + len(cli.COMMANDS)


@pytest.mark.parametrize("what", ["methods", "data", "recipes"])
def test_list_needs_no_torch(what):
    code = f"import sys\nfrom pcdistill.cli import main\nmain(['list', '{what}'])\nassert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2


def test_print_config_shows_the_resolved_recipe_and_runs_nothing(tmp_path, capsys):
    call("distill", "cifar100-resnet56-resnet20", "--epochs", "7", "--print-config", "--out", tmp_path / "run")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["epochs"] == 7
    assert shown["optim"]["milestones"] == [4.38, 5.25, 6.12]  # at the same shares of seven epochs as of 240
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("3", 0)])
@pytest.mark.parametrize(
    ("more", "says"),
    [((), "done: recipe"), (("--json",), '"done": "recipe"'), (("--print-config",), "task: classification")],
)
def test_of_several_processes_the_first_alone_says_it(rank, times, more, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.Cache, "carry_out", lambda *_: "done: recipe")
    monkeypatch.setattr(machine, "machine_result", lambda *_: {"done": "recipe"})
    monkeypatch.setenv("RANK", rank)
    call("cache", "digits", "--out", tmp_path, *more)
    said = capsys.readouterr()
    assert said.out.count(says) == times
    assert bool(said.out) == bool(times)
    assert said.err == ""


# Wrong input: one clear sentence, exit code 2.


def test_a_missing_folder(capsys, tmp_path):
    assert str(tmp_path / "no") in error_of(
        capsys, "distill", "--data", tmp_path / "no", *QUICK, "--out", tmp_path / "o"
    )


@pytest.mark.parametrize("data", ["{}", "{}.npz", "coco:{}.json", "yolo:{}.yaml", "voc:{}", "wds:{}.tar", "hf:{}"])
@pytest.mark.parametrize("command", ["train", "check-data"])
def test_the_home_of_a_user_that_is_not_there_is_one_sentence(capsys, tmp_path, monkeypatch, command, data):
    """Python has no path for it. As in a shell it is taken as it stands."""
    monkeypatch.chdir(tmp_path)
    name = "~nobody-is-called-so/photos"
    argv = ("--data", data.format(name)) if command == "train" else (data.format(name),)
    assert name in error_of(capsys, command, *argv)


def test_a_home_is_followed_wherever_a_path_may_stand(teacher, tmp_path, monkeypatch, capsys):
    """A shell follows ~ neither in --out=~/runs nor in a recipe: so a folder ~ would be made."""
    home, work = tmp_path / "hömé x", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copy(teacher, home / "teacher.safetensors")
    (home / "net.py").write_text("from pcdistill.models.cifar import MODELS\n\n\nsmall = MODELS['resnet8']\n")
    (home / "base.yaml").write_text("data: {name: digits, limit: 256}\ntrain: {epochs: 1}\n")
    (home / "r.yaml").write_text(
        "base: ~/base.yaml\nmethod: kd\nteacher: {name: cifar/resnet8, weights: ~/teacher.safetensors}\n"
        "student: {name: '~/net.py:small'}\n"
    )
    call("cache", "~/r.yaml", "--epochs", "1", "--out=~/cache", "--quiet")
    call("distill", "~/r.yaml", "--teacher-cache=~/cache", "--out=~/run", "--quiet")
    call("evaluate", "~/run", "--weights=~/run/student.safetensors")
    call("report", "~/run")
    assert (home / "run" / "report.html").exists()
    assert list(work.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_of_files_that_are_no_text(tmp_path, capsys):
    """Archives of before UTF-8: pictures are taken by their bytes, classes and folders to write to are refused."""
    data = os.fsencode(tmp_path / "data")
    for number, name in enumerate((b"apfel", b"birne")):
        os.makedirs(data + b"/" + name)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 90 * number, 9)).save(tmp_path / "one.png")
            os.replace(tmp_path / "one.png", data + b"/" + name + b"/b\xfcld%d.png" % i)
    words = ("--data", tmp_path / "data", "--model", "cifar/resnet8", "--image-size", "16", "--epochs", "1", "--quiet")
    call("train", *words, "--out", tmp_path / "run")
    call("predict", tmp_path / "run", tmp_path / "data", "--out", tmp_path / "answers.csv")
    assert b"b\xfcld0.png,apfel" in (tmp_path / "answers.csv").read_bytes() or (
        b"b\xfcld0.png,birne" in (tmp_path / "answers.csv").read_bytes()
    )
    call("check-data", tmp_path / "data", "--out", tmp_path / "page.html")
    assert "is not in UTF-8; rename the file or folder" in error_of(capsys, "train", *words, "--out", "r\udce4")
    os.rename(data + b"/apfel", data + b"/\xe4pfel")
    said = error_of(capsys, "train", *words, "--out", tmp_path / "b")
    assert r"the class folder '\udce4pfel' in" in said
    assert "has a name that is not in UTF-8; rename it" in said


def test_an_unknown_option_names_the_nearest(capsys):
    assert "--epochs" in error_of(capsys, "distill", "--epoch", "3")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "pdc"], 'unknown method "pdc"; did you mean "pcd"'),
        (["--set", "optim.lrr=1"], 'unknown key "optim.lrr"; did you mean "lr"'),
        (["--student", "cifar/resnet9"], "cifar/resnet"),
        (["--student", "timm/resnet1818"], "timm/resnet"),
        (["--data", "digit"], "digits"),
        (["--method", "pcd", "--set", "losses.pcd.stages=6"], "stages must be at most C // 2 = 5"),
        (["--method", "pcd", "--set", "losses.pcd.temperature=0"], "temperature must be a finite number > 0, got 0"),
        (["--method", "pcd", "--set", "losses.pcd.stagess=3"], 'pcd has no option "stagess"; did you mean "stages"'),
        (["--set", "data.augment=flipp"], "flip"),
        (["--teacher-weights", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--unlabelled", ""], "data.unlabelled is empty; name a folder or a file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_names_and_values(capsys, tmp_path, argv, says):
    base = ["distill", "digits", *QUICK[:-3], "--quiet", "--out", str(tmp_path / "out")]
    text = error_of(capsys, *base, *argv)
    assert says in text
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("margin", ["0", "-0.5", "nan", "inf"])
def test_a_margin_that_is_none(capsys, margin):
    text = error_of(capsys, "compare", "digits", f"--margin={margin}")
    assert text.strip() == f"pcdistill: --margin must be a finite number above 0, got {margin}"


def test_the_margins_default_is_that_of_the_statistics():
    assert cli.Compare.margin == MARGIN


def test_checkpoints_that_are_damaged_or_carry_code(capsys, teacher, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(teacher.read_bytes()[: teacher.stat().st_size // 2])
    evil = tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    evil.write_bytes(pickle.dumps({"state_dict": Evil()}))
    for file in (damaged, evil):
        text = error_of(
            *(capsys, "distill", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", file),
            *("--out", tmp_path / "out", "--quiet"),
        )
        assert file.name in text
        assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "pwned").exists()


def npz(path: Path, classes: int, names: list[str]) -> Path:
    g = np.random.default_rng(0)
    y = np.arange(80) % classes
    x = (g.integers(0, 60, (80, 8, 8)) + 20 * y[:, None, None]).clip(0, 255).astype(np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20], classes=np.array(names))
    return path


def test_class_sets_that_do_not_match(capsys, teacher, tmp_path):
    data = npz(tmp_path / "own.npz", 4, ["ant", "bee", "cat", "dog"])
    text = error_of(
        *(capsys, "distill", "--data", data, "--teacher", "cifar/resnet8", "--teacher-weights", teacher),
        *("--student", "cifar/resnet8", "--out", tmp_path / "out", "--quiet"),
    )
    assert "does not know 4 of the data's 4 classes: ant, bee" in text


def test_class_counts_that_do_not_match(capsys, teacher, tmp_path):
    data = npz(tmp_path / "own.npz", 4, ["ant", "bee", "cat", "dog"])
    nameless = tmp_path / "nameless.safetensors"
    save_file(load_file(teacher), nameless)
    text = error_of(
        *(capsys, "distill", "--data", data, "--teacher", "cifar/resnet8", "--teacher-weights", nameless),
        *("--student", "cifar/resnet8", "--out", tmp_path / "out", "--quiet"),
    )
    assert "fc.weight" in text


@pytest.mark.slow
def test_a_teacher_at_chance_stops_the_run_and_can_be_allowed(capsys, teacher, tmp_path):
    weights = load_file(teacher)
    weights["fc.weight"], weights["fc.bias"] = weights["fc.weight"] * 0, weights["fc.bias"] * 0
    save_file(weights, tmp_path / "blank.safetensors")
    argv = [
        *("distill", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", str(tmp_path / "blank.safetensors")),
        *("--student", "cifar/resnet8", "--epochs", "1", "--limit", "128", "--out", str(tmp_path / "out"), "--quiet"),
    ]
    text = error_of(capsys, *argv)
    assert "near chance (10.0 %)" in text
    assert "--allow weak-teacher" in text
    call(*argv, "--allow", "weak-teacher")
    assert "near chance" in capsys.readouterr().err


def test_a_teacher_with_nan_in_its_logits_stops_the_run(capsys, teacher, tmp_path):
    weights = load_file(teacher)
    weights["fc.bias"] = weights["fc.bias"] * float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    text = error_of(
        *(capsys, "distill", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", tmp_path / "nan.safetensors"),
        *("--out", tmp_path / "out", "--quiet"),
    )
    assert "holds parameters that are not finite: fc.bias" in text
    # Finite weights may give NaN all the same.
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Broken(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * float('nan')\n"
        "def broken(num_classes):\n"
        "    return Broken(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    save_file({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, tmp_path / "fine.safetensors")
    text = error_of(
        *(capsys, "distill", "digits", "--teacher", f"{tmp_path / 'mine.py'}:broken", "--allow", "weak-teacher"),
        *("--teacher-weights", tmp_path / "fine.safetensors", "--out", tmp_path / "out", "--quiet"),
    )
    assert "the teacher's logits are NaN or infinite on held-out images" in text


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(capsys, teacher, tmp_path):
    distill(teacher, tmp_path / "run")
    text = error_of(
        *(capsys, "distill", "--data", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", teacher),
        *("--student", "cifar/resnet8", "--epochs", "3", "--out", tmp_path / "run", "--quiet"),
    )
    assert "another recipe (data.limit 256 -> none, train.epochs 2 -> 3); name another folder" in text
    assert f"(--out {tmp_path / 'run-2'})" in text


@pytest.mark.slow
def test_a_users_own_models_and_loss_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def big(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
        "class Mse(nn.Module):\n"
        "    def __init__(self, *, scale=1.0):\n"
        "        super().__init__()\n"
        "        self.scale = scale\n"
        "    def forward(self, student_logits, teacher_logits, target=None):\n"
        "        return self.scale * (student_logits - teacher_logits).square().mean()\n"
    )
    file = tmp_path / "mine.py"
    call(
        *("distill", "digits", "--teacher", f"{file}:big", "--student", f"{file}:small", "--method", f"{file}:Mse"),
        *(
            "--set",
            "losses.1.scale=0.5",
            "--teacher-epochs",
            "3",
            "--epochs",
            "2",
            "--out",
            tmp_path / "run",
            "--quiet",
        ),
    )
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["train/Mse"]) > 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["distill", "--lr", "-1"], "pcdistill: --lr: input should be greater than 0, got -1.0"),
        (["distill", "--seed", "5000000000"], "--seed: input should be less than or equal to 4294967295"),
        (["distill", "--lr", "0", "--epochs", "0"], "  --lr: input"),
        (["distill", "--method", "pdc"], '--method: unknown method "pdc"'),
        (["distill", "--method", "none", "--unlabelled", "x"], "--unlabelled: images without labels have no effect"),
        (["distill", "--method", "pcd", "--set", "losses.pcd.stages=6", "--print-config"], "losses.1: pcd: stages"),
        (
            ["train", "--set", "teacher.epochs=3"],
            "--set teacher.epochs has no effect on this command: it trains",
        ),
        (["compare", "--set", "losses.pcd.stages=2"], "--set losses.pcd.stages has no effect on this command: every"),
        (["compare", "--set", "train.seed=2"], "--set train.seed has no effect on this command: the seeds are"),
        (["compare", "--seeds", "1000000000"], "--seeds must be at most 1000"),
        (["compare", "--jobs", "²"], "--jobs must be auto or a number"),
        (["tune", "--final-seeds", "1000000"], "--final-seeds must be at most 1000"),
        (["demo", "--set", "method=kd"], "--set method has no effect on this command"),
        (["cache", "--temperature", "4"], "--temperature has no effect without --top-k"),
        (["cache", "--temperature", "nan", "--top-k", "3"], "--temperature must be a finite number above 0, got nan"),
        (["cache", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["evaluate", "--data", "digits", "--model", "cifar/resnet8", "--image-size", "0"], "--image-size: input"),
        (["list", "models", "--options", "kd"], "--options is of a method; leave models out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_is_wrong_or_without_effect_is_refused_in_the_users_words(argv, says, capsys):
    assert says in error_of(capsys, *argv)


def test_the_version(capsys):
    call("--version")
    assert capsys.readouterr().out.startswith("pcdistill ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lr=-1"], "--lr: input should be greater than 0, got -1"),
        (["--set", "optim.lr=-1"], "--set optim.lr: input should be greater than 0, got -1"),
        (["--batch-size", "0"], "--batch-size: input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_value_names_what_was_typed(capsys, argv, says):
    assert says in error_of(capsys, "distill", "digits", *argv)


def test_the_data_may_stand_where_a_recipe_may(capsys, tmp_path):
    data = npz(tmp_path / "own.npz", 4, ["ant", "bee", "cat", "dog"])
    call("distill", data, "--print-config")
    assert yaml.safe_load(capsys.readouterr().out)["data"]["name"] == str(data)
    assert "both name data" in error_of(capsys, "distill", data, "--data", "digits")


def test_stages_too_high_for_the_classes_are_found_before_a_run(capsys):
    argv = ["--method", "pcd", "--set", "losses.pcd.stages=6", "--print-config"]
    assert "stages must be at most C // 2 = 5 for 10 classes, got 6" in error_of(capsys, "distill", "digits", *argv)
    call("distill", "digits", "--method", "pcd", "--print-config")
    assert "#   pcd (strength 4, temperature 4, stages 3," in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_begins_with_what_it_is_going_to_do(teacher, tmp_path, capsys):
    call(
        *("distill", "digits", "--teacher", "cifar/resnet8", "--teacher-weights", teacher, "--epochs", "1"),
        *("--limit", "64", "--out", tmp_path / "run"),
    )
    said = capsys.readouterr().err
    for text in (
        "data    digits: 10 classes (0, 1, 2, 3, ...); images 1 x 8 x 8",
        "train: 64 images; data.limit leaves 1,230 out",
        "val: 144 images; 10% of the training images, held out",
        "test: 359 images; a fifth of the digits, set aside",
        "hint: only 1 step an epoch; --batch-size 2 or more --epochs",
        f"teacher cifar/resnet8: starts from the weights in {teacher}",
        "student cifar/resnet8: starts from random weights; 5.14 k parameters",
        "method  dist: ce (weight 1, label_smoothing 0) + dist (strength 4, temperature 4",
        "train   1 epoch of 1 step of 64 images; sgd, rate 0.05",
        f"folder  {tmp_path / 'run'}",
    ):
        assert text in said
    assert said.index("folder  ") < said.index("epoch 1/1")
