"""A result belongs to contents, not to paths: what was made of another teacher, student or data is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pcdistill import models
from pcdistill.commands.claim import MARK
from pcdistill.commands.compare import Plan, compare
from pcdistill.commands.contents import PresentContents
from pcdistill.commands.session import Session, run
from pcdistill.engine.checkpoint import load_checkpoint, save_checkpoint
from pcdistill.engine.console import Console
from pcdistill.engine.loop import TIMES
from pcdistill.errors import InputError
from pcdistill.recipe import load_recipe
from pcdistill.report import read_metrics

WIDTHS = [4, 4, 8, 8]


@pytest.fixture
def npz(tmp_path):
    return write_npz(tmp_path / "d.npz")


def write_npz(path, seed=0, turned=0):
    """Separable images of 8 x 8 in three classes; `turned` training labels are others."""
    rng = np.random.default_rng(seed)
    y = np.arange(120) % 3
    x = rng.integers(0, 120, (120, 8, 8), dtype=np.uint8)
    for label in range(3):
        x[y == label, 2 * label] += 120
    turned_y = y.copy()
    turned_y[:turned] = (y[:turned] + 1) % 3
    np.savez(path, x_train=x, y_train=turned_y, x_test=x[:30], y_test=y[:30])
    return path


def teacher_file(path, seed=0):
    torch.manual_seed(seed)
    model = models.build_model("cifar/resnet8", num_classes=3, in_channels=1, image_size=8, kwargs={"widths": WIDTHS})
    models.save_weights(model, path, {"classes": ["0", "1", "2"]})
    return path


def recipe(npz, **values):
    tree = {
        "data.name": str(npz),
        "data.batch_size": 16,
        "student.name": "cifar/resnet8",
        "student.kwargs": {"widths": WIDTHS},
        "method": "none",
        "train.epochs": 2,
        "train.device": "cpu",
        "allow": ["weak-teacher"],
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return load_recipe(None, values=tree)


def with_teacher(npz, tmp_path, **values):
    named = {"teacher.name": "cifar/resnet8", "teacher.kwargs": {"widths": WIDTHS}}
    weights = str(tmp_path / "t.safetensors")
    return recipe(npz, **{"method": "kd", **named, "teacher.weights": weights, **values})


class Killed(Exception):
    """Stands for a kill."""


def cut(one, out, epoch=1):
    """A run that ends after an epoch, with what it has in its folder."""

    def kill(row, step):
        if row["epoch"] == epoch:
            raise Killed

    session = Session(one, out, trackers=(kill,))
    session.prepare()
    with pytest.raises(Killed):
        session.train()


def files(folder):
    """The bytes of all files but the mark of whose the folder is."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"turned": 9}, "the labels of train changed"),
        ({"seed": 1}, "the images of train and the images of test changed"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_data_that_changed_between_a_kill_and_a_resume_are_refused(npz, tmp_path, change, says, finished):
    run(recipe(npz), tmp_path / "run") if finished else cut(recipe(npz), tmp_path / "run")
    before = files(tmp_path / "run")
    write_npz(npz, **change)
    with pytest.raises(InputError, match=says):
        run(recipe(npz), tmp_path / "run")
    assert before == files(tmp_path / "run")  # nothing was touched
    write_npz(npz)
    assert run(recipe(npz), tmp_path / "run").summary["status"] == "done"


@pytest.mark.slow
def test_a_teacher_that_changed_is_refused_by_name(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    one = with_teacher(npz, tmp_path)
    cut(one, tmp_path / "cut")
    run(one, tmp_path / "run")
    teacher_file(tmp_path / "t.safetensors", seed=1)
    for name in ("cut", "run"):
        with pytest.raises(InputError, match=r"made of other contents: the teacher's weights changed; name another"):
            run(one, tmp_path / name)


def test_a_students_start_weights_that_changed_are_refused(npz, tmp_path):
    start = teacher_file(tmp_path / "s.safetensors")
    one = recipe(npz, student__weights=str(start))
    cut(one, tmp_path / "run")
    teacher_file(start, seed=1)
    with pytest.raises(InputError, match="the student's start weights changed"):
        run(one, tmp_path / "run")


@pytest.mark.slow
def test_a_folder_of_before_fingerprints_is_resumed(npz, tmp_path):
    cut(recipe(npz), tmp_path / "run")
    whole = run(recipe(npz), tmp_path / "whole")
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(tmp_path / "run" / name)
        state.pop("checksum")
        state.pop("contents", None)
        if name == "last.pt":
            state["best"].pop("checksum")
            state["epoch_seconds"] = 0.0
            state["history"] = [{**row, "seconds": 1.0, "images_per_second": 2.0} for row in state["history"]]
        torch.save(state, tmp_path / "run" / name)
    (tmp_path / "run" / "times.json").unlink()
    again = run(recipe(npz), tmp_path / "run")
    assert again.history[0]["seconds"] == 1.0
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.student.state_dict().values(), whole.student.state_dict().values(), strict=True)
    )


def zeroed(path):
    state = load_checkpoint(path)
    state.pop("checksum")
    state["student"] = {key: torch.zeros_like(value) for key, value in state["student"].items()}
    save_checkpoint(path, state)


def renamed(path):
    state = load_checkpoint(path)
    state.pop("checksum")
    save_checkpoint(path, {**state, "digest": "other"})


def earlier(path):
    state = load_checkpoint(path)
    state.pop("checksum")
    save_checkpoint(path, {**state, "epoch": 0})


DAMAGES = [zeroed, renamed, earlier, lambda path: path.write_bytes(bytes(1000))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_best_checkpoint_is_not_continued_from(npz, tmp_path, damage):
    cut(recipe(npz, train__epochs=3), tmp_path / "run", epoch=2)
    damage(tmp_path / "run" / "best.pt")
    with pytest.raises(InputError, match=r"best\.pt (is not the one that last\.pt knows of|cannot be read)"):
        run(recipe(npz, train__epochs=3), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_student_is_made_of_another_best_checkpoint(npz, tmp_path, damage):
    run(recipe(npz), tmp_path / "run")
    student = tmp_path / "run" / "student.safetensors"
    whole = student.read_bytes()
    damage(tmp_path / "run" / "best.pt")
    run(recipe(npz), tmp_path / "run")
    assert student.read_bytes() == whole
    student.unlink()
    with pytest.raises(InputError, match=r"best\.pt (is not the checkpoint of the result|cannot be read)"):
        run(recipe(npz), tmp_path / "run")
    assert not student.exists()


@pytest.mark.slow
def test_a_kill_between_best_and_last_loses_nothing(npz, tmp_path):
    whole = run(recipe(npz), tmp_path / "whole")
    best = whole.summary["best"]["epoch"]
    cut(recipe(npz), tmp_path / "run", epoch=1)
    if best == 1:  # a best.pt that is newer than last.pt, of the epoch that is run again
        state = load_checkpoint(tmp_path / "run" / "last.pt")
        state.pop("checksum")
        state["best"] = {"epoch": 0, "value": float("-inf")}
        save_checkpoint(tmp_path / "run" / "last.pt", state)
        best = 2
    else:
        shutil.copy(tmp_path / "whole" / "best.pt", tmp_path / "run" / "best.pt")
    again = run(recipe(npz), tmp_path / "run")
    assert again.summary["best"]["epoch"] == best


@pytest.mark.slow
def test_equal_runs_leave_equal_bytes_but_for_their_times(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    one = with_teacher(npz, tmp_path)
    run(one, tmp_path / "a")
    cut(one, tmp_path / "b")
    run(one, tmp_path / "b")  # resumed, which changes no bit either
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys()
    of_times = {"README.md", "environment.json", "metrics.csv", "report.html", "result.json", "times.json"}
    assert {name for name in a if a[name] != b[name]} <= of_times
    rows = [read_metrics(tmp_path / n / "metrics.csv") for n in "ab"]
    assert [list(row) for row in rows[0]] == [list(row) for row in rows[1]]
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in rows[0]] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in rows[1]
    ]
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in "ab"]
    for result in results:
        for key in (*TIMES, "seconds_this_session", "checksum"):
            result.pop(key)
    assert results[0] == results[1]


@pytest.mark.slow
def test_parts_that_killed_runs_left_are_cleared_when_a_run_begins(npz, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".last.pt.999999999.part").write_bytes(b"x")
    run(recipe(npz, train__epochs=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [MARK]


@pytest.mark.slow
def test_a_comparison_does_not_mix_two_teachers(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    one = with_teacher(npz, tmp_path, train__epochs=1)

    def again(seeds):
        return compare(one, Plan(["none", "kd"], seeds, jobs=1, threads=1), tmp_path / "c", console=Console(quiet=True))

    table = again(1)
    assert again(1) == table
    teacher_file(tmp_path / "t.safetensors", seed=1)
    for seeds in (1, 2):
        with pytest.raises(InputError, match=r"kd/seed-0 was made of other contents: the teacher's weights changed"):
            again(seeds)
    assert not (tmp_path / "c" / "none" / "seed-1").exists()
    teacher_file(tmp_path / "t.safetensors")
    write_npz(npz, turned=9)
    with pytest.raises(InputError, match=r"none/seed-0 was made of other contents: the labels of train changed"):
        again(1)


def test_a_search_goes_on_only_with_its_contents(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    one, attrs = with_teacher(npz, tmp_path), {}
    study = SimpleNamespace(user_attrs=attrs, set_user_attr=attrs.__setitem__)
    for _ in range(2):
        PresentContents().settle_study(tmp_path, study, one)
    assert json.loads(json.dumps(attrs)) == attrs
    teacher_file(tmp_path / "t.safetensors", seed=1)
    with pytest.raises(InputError, match="the teacher's weights changed"):
        PresentContents().settle_study(tmp_path, study, one)


@pytest.mark.slow
def test_what_a_run_records_is_what_a_comparison_finds(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    one = with_teacher(npz, tmp_path, train__seed=3, train__epochs=1)
    recorded = run(one, tmp_path / "run").summary["contents"]
    found = PresentContents().of(one)
    assert {key: recorded[key] for key in found} == found
    assert set(recorded) - set(found) == {"student.kept"}


def test_tensors_of_a_teacher_are_not_all_of_it(npz, tmp_path):
    teacher_file(tmp_path / "t.safetensors")
    first = PresentContents().of(with_teacher(npz, tmp_path))
    other = PresentContents().of(with_teacher(npz, tmp_path, teacher__mean=[0.1], teacher__std=[0.2]))
    assert {key for key in first if first[key] != other[key]} == {"teacher.input"}
