"""`pcdistill.distill(task="detection")`: models and loaders of the caller's own, and the mistakes."""

import copy
import json

import pytest
import torch
from torch.utils.data import DataLoader

import pcdistill
from pcdistill.errors import InputError, TrainingStopped
from tests.detection.families import detector, sample


def loader(count, first=0, batch_size=2):
    pairs = [sample(first + i) for i in range(count)]
    bare = [(image, {key: target[key] for key in ("boxes", "labels")}) for image, target in pairs]
    return DataLoader(bare, batch_size, shuffle=True, collate_fn=lambda b: tuple(zip(*b, strict=True)))


def run(student, teacher=None, **options):
    options = {
        "epochs": 1,
        "lr": 1e-3,
        "optim": {"name": "adamw"},
        "verbose": False,
        "allow": ["weak-teacher"],
        **options,
    }
    return pcdistill.distill(
        task="detection", teacher=teacher, student=student, train=loader(4), val=loader(4, 4), **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [("fasterrcnn", "rt_detr"), ("rt_detr", "fasterrcnn")])
def test_student_and_history_come_back(student, teacher, tmp_path):
    model, held = detector(student), detector(teacher, seed=1)
    before = copy.deepcopy(model.state_dict())
    found, history = run(model, held, method="kd", out=tmp_path, test=loader(4, 8), classes=["red", "green", "blue"])
    assert found is model
    assert not model.training
    assert {"train/detector", "train/kd", "val/map"} <= set(history[0])
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["best"]["test"]["per_class"]) == {"red", "green", "blue"}
    assert (tmp_path / "report.html").exists()


def test_models_of_transformers_are_taken_as_they_are():
    model = detector("detr")
    wrapped = pcdistill.detection.HubDetector(model.inner, min_size=64)
    found = run(wrapped, detector("retinanet", seed=1), method="kd", detection={"boxes": "l1", "top_k": 5})
    assert {"train/set", "train/boxes"} <= set(found.history[0])


def test_alone_and_the_same_twice():
    one, other = (run(detector("fcos")) for _ in range(2))
    assert one.history[0]["train/loss"] == other.history[0]["train/loss"]
    assert all(torch.equal(a, b) for a, b in zip(one.student.parameters(), other.student.parameters(), strict=True))


def test_teacher_classes_are_matched_by_name():
    held = detector("fcos", num_classes=4, seed=1)
    names = {"classes": ["a", "b", "c"], "teacher_classes": ["c", "x", "a", "b"]}
    assert run(detector("fcos"), held, method="kd", **names).history
    with pytest.raises(InputError, match="the teacher does not know 1 of the data's 3 classes: b"):
        run(detector("fcos"), held, method="kd", classes=["a", "b", "c"], teacher_classes=["c", "x", "a", "y"])


WRONG = [
    ({"classes": ["a", "b"]}, "the student gives 3 classes of boxes, but 2 are named"),
    ({"views": 2}, "are for classifiers; detectors are matched by teacher_classes"),
    ({"detection": {"boxs": "l1"}}, 'unknown key "detection.boxs"; did you mean "boxes"'),
    ({"losses": [{"method": "kd"}]}, 'a detector needs the term "detector"'),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        run(detector("fcos"), detector("fcos", seed=1), **options)


BATCHES = [
    ([1], r"a loader of detection must yield \(images, targets\), got int"),
    ([([torch.rand(3, 9, 9)], [])], "a batch has 1 images and 0 targets"),
    ([([torch.zeros(3, 9, 9, dtype=torch.uint8)], [{}])], r"must be a tensor \[3, H, W\] in 0..1, got"),
    ([([torch.rand(3, 9, 9)], [{"boxes": torch.zeros(1, 4)}])], '"boxes" and "labels"'),
    (
        [([torch.rand(3, 9, 9)], [{"boxes": torch.zeros(1, 4), "labels": torch.ones(2).long()}])],
        r"boxes must be \[M, 4\] and labels \[M\] for one image, got \[1, 4\] and \[2\]",
    ),
]


@pytest.mark.parametrize(("batches", "sentence"), BATCHES, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_wrong_batches_are_named(batches, sentence):
    with pytest.raises(InputError, match=sentence):
        pcdistill.distill(
            task="detection", teacher=None, student=detector("fcos"), train=batches, val=batches, verbose=False
        )


def test_held_out_images_without_a_box_are_refused():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    without = [([torch.rand(3, 32, 32)], [dict(empty)])] * 3
    for val in (without, DataLoader(without, None)):
        with pytest.raises(InputError, match="the validation loader: no image of its 3 batches has a box to choose"):
            pcdistill.distill(
                task="detection", teacher=None, student=detector("fcos"), train=loader(4), val=val, verbose=False
            )
    found = pcdistill.distill(
        task="detection",
        teacher=None,
        student=detector("fcos"),
        train=loader(4),
        val=[*without, *loader(2, 4)],
        epochs=1,
        verbose=False,
    )
    assert found.history[0]["val/map"] >= 0


def test_names_of_classes_are_for_detectors():
    with pytest.raises(InputError, match='give task="detection"'):
        pcdistill.distill(teacher=None, student=torch.nn.Linear(1, 1), train=[1], val=[1], classes=["a"])


def test_modes_frozen_parts_and_the_teacher_are_as_before():
    student, teacher = detector("fcos"), detector("fcos", seed=1)
    norms = [part for part in student.backbone.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for part in norms:
        part.eval().requires_grad_(False)
    before = [copy.deepcopy(part.state_dict()) for part in norms]
    run(student, teacher, method="kd")
    assert norms
    for part, old in zip(norms, before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in part.state_dict().items())
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_in_another_precision_is_refused(dtype):
    with pytest.raises(InputError, match=f"the teacher has weights in {str(dtype)[6:]}.*teacher.float"):
        run(detector("fcos"), detector("fcos", seed=1).to(dtype), method="kd")


def test_one_detector_in_both_roles_is_refused():
    one = detector("fcos")
    with pytest.raises(InputError, match="teacher and student are one module"):
        run(one, one, method="kd")


def test_a_teacher_that_fails_is_named():
    teacher = detector("fcos", seed=1)
    norm = next(part for part in teacher.backbone.modules() if isinstance(part, torch.nn.BatchNorm2d))
    norm.running_mean.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match="first in batch 1 of 2: the teacher's .* not finite"):
        run(detector("fcos"), teacher, method="pkd")


@pytest.mark.slow
def test_another_loader_is_not_the_finished_run(tmp_path):
    torch.manual_seed(0)
    start = detector("fcos").state_dict()

    def again(first):
        model = detector("fcos")
        model.load_state_dict(start)
        data = loader(6 + first)
        return pcdistill.distill(
            task="detection", teacher=None, student=model, train=data, val=loader(2, 8), epochs=1, lr=1e-3,
            verbose=False, out=tmp_path / "run",
        )  # fmt: skip

    one = again(0)
    assert again(0).history == one.history
    with pytest.raises(InputError, match="changed"):
        again(2)
