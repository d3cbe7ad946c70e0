"""Whole runs in a folder: soft labels, two views, moving averages, trackers, schedules of terms."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from pcdistill.classification.task import build_distiller, build_student
from pcdistill.commands.compare import Plan, compare, expand_methods
from pcdistill.commands.folder import recorded_summary
from pcdistill.commands.run import run_with_report
from pcdistill.commands.session import Session, run
from pcdistill.commands.tune import TunePlan, tune
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.recipe import load_recipe
from tests.helpers import data_of, on_cpu

BASE = {
    "data.name": "digits",
    "data.limit": 256,
    "student.name": "cifar/resnet8",
    "student.kwargs": {"widths": [4, 4, 8, 8]},
    "teacher.name": "cifar/resnet8",
    "teacher.epochs": 3,
    "train.epochs": 2,
    "train.device": "cpu",
    "allow": ["weak-teacher"],
}


def recipe(**values):
    return load_recipe(None, values={**BASE, **{key.replace("__", "."): value for key, value in values.items()}})


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(recipe(method="none", student__kwargs={}, train__epochs=3), out)
    return str(out / "student.safetensors")


@pytest.mark.slow
def test_a_session_goes_step_by_step(teacher, tmp_path):
    whole = run(recipe(method="kd", teacher__weights=teacher, train__epochs=1), tmp_path / "whole")
    session = Session(recipe(method="kd", teacher__weights=teacher, train__epochs=1), tmp_path / "run")
    session.prepare()
    assert (tmp_path / "run" / "recipe.yaml").exists()
    assert not (tmp_path / "run" / "metrics.csv").exists()
    session.train()
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    result = session.conclude()
    assert result.history == session.trainer.history
    for key in ("best", "last", "teacher", "student", "digest", "status"):
        assert result.summary[key] == whole.summary[key]
    assert recorded_summary(tmp_path / "run", session.recipe) == json.loads(json.dumps(result.summary))
    assert recorded_summary(tmp_path / "run", recipe(method="kd")) is None


def test_a_run_that_diverges_is_recorded_with_its_reason_and_reported(tmp_path):
    wild = recipe(method="none", optim__lr=1e30, optim__clip_norm=None, train__epochs=1)
    wild = replace(wild, optim=replace(wild.optim, clip_norm=None))
    with pytest.raises(TrainingStopped, match="the loss is not finite"):
        run_with_report(wild, tmp_path / "run")
    summary = recorded_summary(tmp_path / "run", wild)
    assert summary["status"] == "stopped"
    assert "the loss is not finite" in summary["notes"][0]
    assert "the loss is not finite" in (tmp_path / "run" / "report.html").read_text()


def test_groups_of_methods_are_spelt_out_once():
    found = expand_methods("kd, all-logit,kd", recipe())
    assert found[0] == "kd"
    assert len(found) == len(set(found)) > 10
    assert {"ce", "detector"}.isdisjoint(found)
    assert expand_methods("ce,mine.py:Loss", recipe()) == ["ce", "mine.py:Loss"]
    with pytest.raises(InputError, match='unknown method "pdc"; did you mean "pcd"'):
        expand_methods("kd,pdc", recipe())
    with pytest.raises(InputError, match="must name at least one"):
        expand_methods(" , ", recipe())


@pytest.mark.slow
def test_mixup_cutmix_smoothing_average_and_tensorboard(teacher, tmp_path):
    smoothed = [{"method": "ce", "label_smoothing": 0.1}, {"method": "pcd", "weight_to": 0.5}]
    mixed = recipe(
        teacher__weights=teacher,
        losses=smoothed,
        data__mixup=0.4,
        data__cutmix=1.0,
        train__ema=0.9,
        train__trackers=["tensorboard"],
    )
    result = run(mixed, tmp_path / "run")
    assert result.summary["status"] == "done"
    assert len(rows(tmp_path / "run")) == 2
    assert all(float(row["train/pcd"]) > 0 for row in rows(tmp_path / "run"))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    report = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"val", "test"} <= set(report["best"])
    assert {"val", "test"} <= set(report["last"])


def test_the_teacher_sees_exactly_the_students_images():
    for views in (1, 2):
        mixed = recipe(method="mlkd" if views == 2 else "kd", data__mixup=0.4)
        data = data_of("digits", batch_size=32, limit=256, mixup=0.4, views=views)
        student = build_student(mixed.student, classes=list(data.classes), data=data)
        seen = {"student": [], "teacher": []}

        class Spy(torch.nn.Module):
            def __init__(self, name, seen=seen):
                super().__init__()
                self.name, self.seen, self.linear = name, seen, torch.nn.Linear(64, 10)

            def forward(self, images):
                self.seen[self.name].append(images.clone())
                return self.linear(images.flatten(1))

        student = Spy("student")
        distiller = build_distiller(mixed, student, Teacher(Spy("teacher")), data=data, placement=on_cpu())
        seen["student"].clear()
        seen["teacher"].clear()
        batch = next(iter(data.train.epoch(0)))
        distiller(batch)
        assert len(batch.images) == 32 * views
        assert torch.equal(seen["student"][0], batch.images)
        assert torch.equal(seen["teacher"][0], batch.images)


def test_a_method_with_hard_labels_refuses_mixup_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match="dkd: target must be hard labels.*turn mixup, cutmix"):
        run(recipe(method="dkd", data__mixup=0.2), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.slow
def test_a_method_of_two_views_gets_them(teacher, tmp_path):
    two = recipe(method="mlkd", teacher__weights=teacher, train__epochs=1)
    assert run(two, tmp_path / "run").summary["status"] == "done"
    with pytest.raises(InputError, match=r"compares two views of each image; set data\.views to 2"):
        run(recipe(method="mlkd", teacher__weights=teacher, data__views=1), tmp_path / "one")


@pytest.mark.slow
def test_the_average_of_the_weights_is_what_is_kept(teacher, tmp_path):
    kept = {}
    for ema in (0.0, 0.5):
        averaged = recipe(method="kd", teacher__weights=teacher, train__ema=ema, train__keep="last", train__epochs=1)
        kept[ema] = run(averaged, tmp_path / str(ema)).student.state_dict()
    key = "conv1.weight" if "conv1.weight" in kept[0.0] else next(k for k in kept[0.0] if k.endswith("weight"))
    assert not torch.equal(kept[0.0][key], kept[0.5][key])
    # An average over the last steps of one and the same path of training lies near its end.
    assert (kept[0.0][key] - kept[0.5][key]).norm() < 0.5 * kept[0.0][key].norm()


def test_a_tracker_that_is_not_installed_is_named_before_the_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"trackers: wandb needs wandb, which is not installed: pip install 'pcdistill\[wandb\]'"
    ):
        run(recipe(method="kd", train__trackers=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_that_breaks_in_channels_last_is_named_before_the_teacher_is_trained(tmp_path):
    narrow = recipe(method="kd", train__channels_last=True)  # a shortcut of 4 channels; the teacher's have 16
    with pytest.raises(InputError, match=r"train.channels_last: layer2.0.shortcut.0 is a strided 1x1 convolution"):
        run(narrow, tmp_path / "run")
    assert not (tmp_path / "run").exists()


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs=64, outputs=10, fails=False):
        super().__init__()
        self.head, self.fails = nn.Linear(inputs, outputs), fails

    def forward(self, images):
        if self.fails and self.training:
            raise KeyError("no such thing")
        return self.head(images.flatten(1))

def other_size(num_classes):
    return Net(inputs=7)

def more_outputs(num_classes):
    return Net(outputs=num_classes + 3)

def in_training(num_classes):
    return Net(fails=True)

def frozen(num_classes):
    return Net().requires_grad_(False)

def undone(num_classes):
    model = Net()
    nn.init.constant_(model.head.weight, float("nan"))
    return model
"""
FAULTS = {
    "other_size": r"cannot run on images \[2, 1, 8, 8\] \(RuntimeError: .*shapes cannot be multiplied",
    "more_outputs": r"own.py:more_outputs gives 13 outputs for each image, and the data have 10 classes",
    "in_training": r"own.py:in_training cannot be trained on images \[2, 1, 8, 8\] \(KeyError: 'no such thing'\)",
    "frozen": r"the student has no parameter that requires a gradient",
    "undone": r"the student's head.weight holds NaN before training",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_student_of_the_users_own_that_cannot_be_trained_is_named_before_the_teacher_is_trained(tmp_path, name):
    (tmp_path / "own.py").write_text(OWN)
    wrong = recipe(method="kd", student__name=f"{tmp_path / 'own.py'}:{name}", student__kwargs={})
    with pytest.raises(InputError, match=FAULTS[name]):
        run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=FAULTS[name]):
        compare(wrong, Plan(["none", "kd"], 1, jobs=1), tmp_path / "many", console=Console(quiet=True))
    assert not list((tmp_path / "many").rglob("*.pt"))
    with pytest.raises(InputError, match=FAULTS[name]):
        tune(wrong, TunePlan(["kd"], 1, jobs=1), tmp_path / "search", console=Console(quiet=True))
    assert not (tmp_path / "search").exists()


def test_a_student_for_larger_images_is_named_before_the_teacher_is_trained(tmp_path):
    wrong = recipe(method="kd", student__name="torchvision/alexnet", student__kwargs={})
    with pytest.raises(
        InputError, match=r"AlexNet cannot be run on an image \[1, 1, 8, 8\] \(RuntimeError: .*too small"
    ):
        run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_emulated_bfloat16_is_told_once(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pcdistill.commands.big_teachers.emulates_bfloat16", lambda: True)
    monkeypatch.setattr("pcdistill.engine.console.TOLD", set())
    for name in ("one", "two"):
        session = Session(recipe(method="kd", teacher__weights=teacher, train__precision="bfloat16"), tmp_path / name)
        session.prepare()
    assert capsys.readouterr().err.count("has no bfloat16 instructions") == 1
