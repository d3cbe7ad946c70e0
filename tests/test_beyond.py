"""Runs beyond the loss: patient, unlabelled images, several teachers, the teacher's head; repeated, cached, resumed."""

import io

import pytest
import torch

from pcdistill import models
from pcdistill.classification.task import build_distiller
from pcdistill.commands.cache import make_cache
from pcdistill.commands.compare import Plan, compare
from pcdistill.commands.session import Session, run, teacher_recipe
from pcdistill.distillation.cache_replay import CachedBatches
from pcdistill.distillation.cache_store import TeacherCache
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Trainer
from pcdistill.errors import InputError
from pcdistill.recipe import load_recipe, with_method
from tests.helpers import data_of, on_cpu

BASE = {
    "data.name": "digits",
    "data.limit": 200,
    "data.batch_size": 32,
    "student.name": "cifar/resnet8",
    "student.kwargs": {"widths": [4, 4, 8, 8]},
    "teacher.name": "cifar/resnet8",
    "train.epochs": 2,
    "train.device": "cpu",
    "allow": ["weak-teacher"],
}
WIDE = {"widths": [4, 4, 8, 64]}
UNLABELLED = {"data__unlabelled": "rest", "data__unlabelled_batch": 48}


def recipe(source=None, **values):
    return load_recipe(source, values={**BASE, **{key.replace("__", "."): value for key, value in values.items()}})


def trained(tmp_path_factory, seed):
    out = tmp_path_factory.mktemp(f"teacher-{seed}")
    run(recipe(method="none", student__kwargs={}, data__limit=600, train__seed=seed), out)
    return str(out / "student.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return trained(tmp_path_factory, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return trained(tmp_path_factory, 1)


def two(weights, others, **values):
    teachers = [
        {"name": "cifar/resnet8", "weights": weights, "weight": 2.0},
        {"name": "cifar/resnet8", "weights": others},
    ]
    for teacher, cache in zip(teachers, values.pop("caches", ()), strict=False):
        teacher["cache"] = cache
    base = {key: value for key, value in BASE.items() if key != "teacher.name"}
    return load_recipe(
        None, values={**base, "teachers": teachers, **{key.replace("__", "."): value for key, value in values.items()}}
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def killed_and_continued(made, out, monkeypatch, step):
    calm = Trainer.save_if_due

    def die(self):
        calm(self)
        if self.step == step:
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "save_if_due", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(made, out)
    monkeypatch.undo()
    return run(made, out)


def test_patient_shows_teacher_and_student_one_view_and_reads_no_label():
    made = recipe("patient", data__mixup=1.0)
    assert [(t.method, t.weight, t.options) for t in made.losses] == [("kd", 1.0, {"temperature": 1.0})]
    assert (load_recipe("patient").data.mixup, load_recipe("patient").data.augment) == (1.0, "aggressive")
    data = data_of("digits", batch_size=32, limit=256, mixup=1.0, augment="aggressive")
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, images):
            seen.append(images.clone())
            return self.linear(images.flatten(1))

    distiller = build_distiller(made, Spy(), Teacher(Spy()), data=data, placement=on_cpu())
    seen.clear()
    batch = next(iter(data.train.epoch(0)))
    value = distiller(batch)["loss"]
    assert torch.equal(seen[0], batch.images)
    assert torch.equal(seen[1], batch.images)
    shuffled = type(batch)(batch.images, batch.target.flip(0), batch.index)
    assert torch.equal(distiller(shuffled)["loss"], value)
    assert bool(((batch.target > 0.05) & (batch.target < 0.95)).any()), "images are mixed"


LONG = [pytest.param({"method": method}, marks=pytest.mark.slow) for method in ("mlkd", "crd")]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"data__mixup": 1.0}, *LONG], ids=str)
def test_a_run_with_unlabelled_images_is_repeated_and_resumed_to_the_bit(extra, weights, tmp_path, monkeypatch):
    made = recipe(
        **{"method": "kd", "teacher__weights": weights, "train__checkpoint_seconds": 0.0, **UNLABELLED, **extra}
    )
    whole = run(made, tmp_path / "whole")
    assert whole.summary["status"] == "done"
    cut = killed_and_continued(made, tmp_path / "cut", monkeypatch, 8)  # in the second epoch
    assert_same(whole.student.state_dict(), cut.student.state_dict())
    assert all(0 <= row["train/top1"] <= 100 for row in whole.history)
    without = run(recipe(**{"method": "kd", "teacher__weights": weights, **extra}), tmp_path / "without")
    first = next(key for key in whole.student.state_dict() if key.endswith("weight"))
    assert not torch.equal(whole.student.state_dict()[first], without.student.state_dict()[first])


@pytest.mark.slow
def test_training_accuracy_counts_labelled_images_alone(weights):
    made = recipe(method="kd", teacher__weights=weights, **UNLABELLED)
    session = Session(made)
    session.prepare()
    batch = next(iter(session.data.train.epoch(0)))
    out = session.distiller(batch)
    assert (len(batch), float(out["sum/counted"])) == (80, 32.0)


@pytest.mark.slow
def test_without_a_teacher_and_for_the_teacher_itself_unlabelled_images_play_no_part(tmp_path):
    alone = run(recipe(method="none", train__epochs=1), tmp_path / "alone")
    with_teacher = recipe(method="kd", teacher__epochs=1, train__epochs=1, **UNLABELLED)
    same = run(with_method(with_teacher, "none", 0), tmp_path / "same")
    assert_same(alone.student.state_dict(), same.student.state_dict())
    made = recipe(teacher__epochs=1, **UNLABELLED)
    assert teacher_recipe(made).digest() == teacher_recipe(recipe(teacher__epochs=1)).digest()


def test_a_method_that_reads_labels_in_every_term_refuses_unlabelled_images(tmp_path):
    with pytest.raises(InputError, match="every term of dkd reads labels, so these images would teach it nothing"):
        run(recipe(method="dkd", teacher__epochs=1, **UNLABELLED), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_shares_of_the_unlabelled_batch_must_be_whole(tmp_path):
    with pytest.raises(
        InputError, match="data.unlabelled_batch 47 must be divisible by train.accumulate x processes = 2"
    ):
        run(
            recipe(method="kd", data__unlabelled="rest", data__unlabelled_batch=47, train__accumulate=2), tmp_path / "r"
        )


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 2])
def test_a_cache_covers_both_parts(views, weights, tmp_path):
    made = recipe(method="mlkd" if views == 2 else "kd", teacher__weights=weights, **UNLABELLED)
    make_cache(made, tmp_path / "cache", epochs=2)
    cached = recipe(method=made.method, teacher__weights=weights, teacher__cache=str(tmp_path / "cache"), **UNLABELLED)
    session = Session(cached)
    session.prepare()
    batch = next(iter(session.data.train.epoch(1)))
    assert len(batch.teacher_logits) == len(batch) == 80 * views
    torch.testing.assert_close(batch.teacher_logits, session.teacher(batch.images), rtol=1e-3, atol=2e-3)
    for rank in (0, 1):
        part = data_of(
            "digits",
            batch_size=32,
            limit=200,
            unlabelled="rest",
            unlabelled_batch=48,
            views=views,
            rank=rank,
            world_size=2,
        ).train
        replay = CachedBatches(part, TeacherCache(tmp_path / "cache"), rank=rank, world_size=2)
        own = list(replay.epoch(1))[2]
        torch.testing.assert_close(own.teacher_logits, session.teacher(own.images), rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_several_teachers_are_trained_apart_and_teach_together(tmp_path):
    teachers = [{"name": "cifar/resnet8", "epochs": 1}] * 2
    base = {key: value for key, value in BASE.items() if key != "teacher.name"}
    made = load_recipe(None, values={**base, "teachers": teachers, "method": "kd", "train.epochs": 1})
    result = run(made, tmp_path / "run")
    facts = result.summary["teacher"]
    assert facts["name"] == "cifar/resnet8 + cifar/resnet8"
    assert facts["parameters"] == sum(member["parameters"] for member in facts["members"])
    assert facts["test"]["top1"] > 0
    one, other = (
        torch.load(tmp_path / "run" / name / "best.pt", weights_only=True) for name in ("teacher", "teacher-2")
    )
    assert any(not torch.equal(one["student"][key], other["student"][key]) for key in one["student"])
    table = compare(made, Plan(["none", "kd"], 1, jobs=1), tmp_path / "compare", console=Console(quiet=True))
    assert "teacher: cifar/resnet8 + cifar/resnet8" in table
    assert (tmp_path / "compare" / "teacher-2" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_several_teachers_with_caches_teach_as_they_do_live(weights, others, tmp_path, monkeypatch):
    for i, one in enumerate((weights, others)):
        make_cache(recipe(method="kd", teacher__weights=one), tmp_path / f"cache-{i}", epochs=2 + i)
    caches = [str(tmp_path / f"cache-{i}") for i in (0, 1)]
    for combine in ("probabilities", "logits"):
        session = Session(two(weights, others, method="kd", caches=caches, teachers_combine=combine))
        session.prepare()
        for epoch in (1, 3):
            batch = next(iter(session.data.train.epoch(epoch)))
            torch.testing.assert_close(batch.teacher_logits, session.teacher(batch.images), rtol=2e-3, atol=5e-3)
    made = two(weights, others, method="kd", caches=caches, train__checkpoint_seconds=0.0)
    whole = run(made, tmp_path / "whole")
    cut = killed_and_continued(made, tmp_path / "cut", monkeypatch, 8)
    assert_same(whole.student.state_dict(), cut.student.state_dict())
    with pytest.raises(InputError, match="has no cache and another has; give one to each, or to none"):
        run(two(weights, others, method="kd", caches=caches[:1]), tmp_path / "half")


@pytest.mark.slow
def test_what_needs_one_teacher_refuses_several(weights, others, tmp_path):
    with pytest.raises(InputError, match=r"losses.1: fitnet compares features with one teacher's, and there are 2"):
        run(two(weights, others, method="fitnet"), tmp_path / "run")
    with pytest.raises(InputError, match="there are several teachers, so there is no one head to copy"):
        run(two(weights, others, method="kd", student__head="teacher"), tmp_path / "run")
    with pytest.raises(InputError, match="a cache is of one teacher"):
        make_cache(two(weights, others, method="kd"), tmp_path / "cache", epochs=1)


def test_each_of_several_teachers_passes_the_gate(weights, tmp_path):
    untrained = tmp_path / "untrained.safetensors"
    models.save_weights(models.build_model("cifar/resnet8", num_classes=10, in_channels=1), untrained)
    with pytest.raises(InputError, match="near chance"):
        run(two(weights, str(untrained), method="kd", allow=[]), tmp_path / "run")


ENSEMBLE = """
import torch
from torch import nn
from pcdistill.models import build_model

class Mean(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images):
        return torch.stack([member(images) for member in self.members]).mean(0)

def both(num_classes):
    weights = {weights!r}
    return Mean([build_model("cifar/resnet8", num_classes=num_classes, in_channels=1, weights=w) for w in weights])
"""


@pytest.mark.slow
def test_the_users_own_ensemble_teaches_by_its_path(weights, others, tmp_path):
    (tmp_path / "mine.py").write_text(ENSEMBLE.replace("{weights!r}", repr([weights, others])))
    stats = models.read_metadata(weights)  # a module of one's own does not say how its images were normalised
    own = {
        "teacher__name": f"{tmp_path / 'mine.py'}:both",
        "teacher__mean": stats["mean"],
        "teacher__std": stats["std"],
    }
    with pytest.raises(InputError, match=r"or teacher\.pretrained true if the function gives a trained model"):
        run(recipe(method="kd", **own), tmp_path / "no")
    result = run(recipe(method="kd", **own, teacher__pretrained=True, train__epochs=1), tmp_path / "run")
    assert result.summary["teacher"]["val"]["top1"] > 30
    sessions = [
        Session(recipe(method="kd", **own, teacher__pretrained=True)),
        Session(two(weights, others, method="kd", teachers_combine="logits")),
    ]
    for session in sessions:
        session.prepare()
    sessions[1].teacher.shares = [0.5, 0.5]
    batch = next(iter(sessions[0].data.train.epoch(0))).images
    torch.testing.assert_close(sessions[0].teacher(batch), sessions[1].teacher(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_teachers_head_is_copied_and_a_resumed_run_keeps_to_the_bits(weights, tmp_path, monkeypatch):
    copied = {"method": "kd", "teacher__weights": weights, "student__kwargs": WIDE, "student__head": "teacher"}
    made = recipe(**copied, train__checkpoint_seconds=0.0)
    session = Session(made)
    session.prepare()
    whole_head = dict(session.student.named_parameters())
    head = next(name for name in whole_head if whole_head[name].shape == (10, 64))
    teacher = session.teacher.model.state_dict()
    assert torch.equal(whole_head[head], teacher[head])
    whole = run(made, tmp_path / "whole")
    cut = killed_and_continued(made, tmp_path / "cut", monkeypatch, 8)
    assert_same(whole.student.state_dict(), cut.student.state_dict())
    with pytest.raises(InputError, match="student's classifier reads 8 features"):
        run(recipe(**{**copied, "student__kwargs": {"widths": [4, 4, 8, 8]}}), tmp_path / "narrow")
    one = recipe(**copied, train__epochs=1)
    run(with_method(one, "none", 0), tmp_path / "none")  # no teacher, nothing to copy


@pytest.mark.slow
def test_the_console_says_which_weights_a_student_starts_from(weights, tmp_path):
    said = io.StringIO()
    console = Console("kd", stream=said)
    run(recipe(method="kd", teacher__weights=weights, train__epochs=1), tmp_path / "a", console=console)
    assert "student cifar/resnet8: starts from random weights" in said.getvalue()
    start = str(tmp_path / "a" / "student.safetensors")
    run(
        recipe(method="kd", teacher__weights=weights, student__weights=start, train__epochs=1),
        tmp_path / "b",
        console=console,
    )
    assert f"student cifar/resnet8: starts from the weights in {start}" in said.getvalue()
