"""A plan: every part is measured, of both tasks, with views and unlabelled images; bad input gets one sentence."""

import json

import pytest
import torch

from pcdistill import cli
from pcdistill.commands.plan import Wanted, part_of, plan, size_text
from pcdistill.data.loader import Batch
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError
from pcdistill.recipe import load_recipe

TINY = {"data.name": "digits", "data.limit": 128, "data.batch_size": 16, "train.device": "cpu", "train.epochs": 3}
MODELS = {"student.name": "cifar/resnet8", "teacher.name": "cifar/resnet8", "method": "kd"}


def planned(wanted=None, **values):
    recipe = load_recipe(None, values={**TINY, **MODELS, **{k.replace("__", "."): v for k, v in values.items()}})
    return plan(recipe, wanted or Wanted(seconds=0.01))


def test_every_part_is_measured_and_told():
    found = planned(Wanted(images=10**6, nodes=2, gpus=4, seconds=0.01), teacher__epochs=2)
    times = found["measured"]["seconds_of_an_image"]
    assert len(times) == 7
    assert all(value > 0 for value in times.values())
    assert found["measured"]["row_bytes"] == 2 * 10
    assert found["here"]["images"] == 128
    assert [way["way"] for way in found["here"]["ways"]] == ["live teacher", "cache, all logits", "student alone"]
    assert found["scaled"]["images"] == 10**6
    assert found["scaled"]["ways"][1]["disk_bytes"] == 3 * 10**6 * 20
    for word in ("What bounds the speed is", "Peak memory", "Gbit/s between nodes", "is trained first", "an epoch"):
        assert word in found["text"]
    json.dumps({key: value for key, value in found.items() if key != "text"}, allow_nan=False)


def test_each_measured_pass_of_the_teacher_is_a_step_of_its_own(monkeypatch):
    """CUDA graphs write over what the pass before returned, so each begins with a mark; none is on a CPU itself."""
    events = []
    forward = Teacher.forward
    monkeypatch.setattr(Placement, "begin_step", lambda _: events.append("step"))
    monkeypatch.setattr(Teacher, "forward", lambda *args: (events.append("pass"), forward(*args))[1])
    planned()
    passes = [i for i, event in enumerate(events) if event == "pass"]
    assert len(passes) > 3
    assert all(events[i - 1] == "step" for i in passes)


def test_a_student_alone_needs_no_teacher():
    found = planned(method="none")
    assert [way["way"] for way in found["here"]["ways"]] == ["student alone"]
    assert found["scaled"] is None


def test_a_method_on_features_runs_the_teacher_itself():
    found = planned(method="fitnet")
    assert [way["way"] for way in found["here"]["ways"]] == ["live teacher", "student alone"]
    assert "fitnet runs the teacher itself" in found["text"]


@pytest.mark.slow
def test_two_views_and_unlabelled_images_cost_more_than_one_image():
    found = planned(method="mlkd", data__unlabelled="rest", data__unlabelled_batch=16, data__limit=64)
    assert found["measured"]["row_bytes"] == 2 * 10 * 4  # two views of one image with a label and one without
    assert found["here"]["images"] == 64


@pytest.mark.slow
def test_a_detector_is_planned_too():
    recipe = load_recipe(
        "digits-detection",
        values={"data.limit": 16, "data.batch_size": 4, "train.device": "cpu", "student.pretrained": False},
    )
    found = plan(recipe, Wanted(seconds=0.01))
    assert "detection runs the teacher itself" in found["text"]
    assert found["measured"]["seconds_of_an_image"]["teacher, forward pass"] > 0


def test_a_part_of_a_batch_keeps_views_and_labels_together():
    target = torch.tensor([0, 1, 2, 3, -100, -100] * 2)
    images = torch.arange(12.0).view(12, 1, 1, 1)
    batch = Batch(images, target, torch.arange(6), labelled=torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]))
    part = part_of(batch, 6, views=2)
    assert part.images.flatten().tolist() == [0, 1, 4, 6, 7, 10]
    assert part.target[part.labelled].ge(0).all()
    assert part.index.tolist() == [0, 1, 4]
    assert part_of(batch, 12, views=2) is batch


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"nodes": 0}, "--nodes must be at least 1, got 0"),
        ({"gpus": -1}, "--gpus must be at least 1"),
        ({"images": 0}, "--data-size must be at least 1"),
        ({"link_gbit": float("nan")}, "--link must be a finite number above 0"),
        ({"top_k": 10}, "--top-k must be below the 10 classes, got 10"),
    ],
)
def test_a_wrong_scale_is_refused(wanted, words):
    with pytest.raises(InputError, match=words):
        planned(Wanted(**wanted, seconds=0.01))


@pytest.mark.slow
def test_the_command_prints_json(capsys):
    argv = ["plan", "--data", "digits", "--limit", "64", "--batch-size", "16", "--epochs", "1", "--device", "cpu"]
    models = ["--student", "cifar/resnet8", "--teacher", "cifar/resnet8", "--method", "kd"]
    cli.main([*argv, *models, "--json", "--gpus", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["scaled"]["gpus"] == 2
    assert found["here"]["assumptions"]


def test_sizes_are_told_in_the_unit_that_fits():
    assert [size_text(n) for n in (20, 1.5e6, 2e9, 4.37e13, 1e16)] == ["0.02 kB", "1.5 MB", "2 GB", "43.7 TB", "10 PB"]
