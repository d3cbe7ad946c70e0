"""Strength in a run's objective: what the student's logits feel, what metrics.csv shows, what is refused."""

import csv
import math

import pytest
import torch

from pcdistill.commands.session import run
from pcdistill.detection.distiller import DetectionObjective
from pcdistill.detection.task import Detection
from pcdistill.distillation.objective import Objective, at_strength, build_objective, check_losses
from pcdistill.errors import InputError
from pcdistill.losses import Features
from pcdistill.methods import METHODS
from pcdistill.recipe import load_recipe, make_recipe, with_method

LOGITS = [name for name, m in METHODS.items() if m.kind == "logits" and name not in ("ce", "pld")]


def recipe_of(*terms, **keys):
    base = load_recipe("digits").to_dict()
    return make_recipe({**base, "method": "mine", "methods": {}, "losses": list(terms), **keys})


def objective_of(recipe, classes: int = 10) -> Objective:
    return build_objective(recipe.losses, num_classes=classes)


def pulls(objective: Objective, student, teacher, target):
    """Norms of the gradients at the logits: of the labels' term, and of all that the total adds to it."""
    result = objective(student, teacher, target)
    (whole,) = torch.autograd.grad(result["loss"], student, retain_graph=True)
    (own,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, target), student)
    labels = own if "loss/ce" in result else 0 * own  # some objectives have no term of the labels
    return float(own.norm()), float((whole - labels).norm()), result


@pytest.mark.parametrize("method", LOGITS)
def test_every_logit_method_pulls_as_hard_as_it_is_told(method):
    recipe = at_strength(with_method(load_recipe("digits"), method, 0), 2.5)
    assert recipe is not None
    objective = objective_of(recipe)
    n = 12 * objective.views
    g = torch.Generator().manual_seed(3)
    student = (2 * torch.randn(n, 10, generator=g)).requires_grad_()
    teacher, target = 2 * torch.randn(n, 10, generator=g), torch.arange(n) % 10
    own, term, result = pulls(objective, student, teacher, target)
    terms = [key for key in result if key.startswith("loss/weight/")]
    if len(terms) == 1:
        assert term == pytest.approx(2.5 * own, rel=2e-3)
    else:  # they share the strength, and may pull in different directions
        assert 0 < term <= 2.5 * own * 1.002
    assert recipe.strength == 2.5


def test_the_labels_weight_counts():
    terms = {"method": "ce", "weight": 0.25}, {"method": "kd", "strength": 4.0}
    objective = objective_of(recipe_of(*terms))
    student, teacher = torch.randn(8, 10).requires_grad_(), torch.randn(8, 10)
    target = torch.arange(8)
    result = objective(student, teacher, target)
    (whole,) = torch.autograd.grad(result["loss"], student)
    (own,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, target), student)
    assert float((whole - 0.25 * own).norm() / own.norm()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("before", [[], [{"method": "ce", "weight": 0.0}]], ids=["no term", "weight 0"])
def test_without_a_pull_of_the_labels_their_loss_is_measured_all_the_same(before):
    objective = objective_of(recipe_of(*before, {"method": "kd", "strength": 3.0}))
    student, teacher, target = torch.randn(8, 10).requires_grad_(), torch.randn(8, 10), torch.arange(8)
    (whole,) = torch.autograd.grad(objective(student, teacher, target)["loss"], student)
    (own,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, target), student)
    assert float(whole.norm() / own.norm()) == pytest.approx(3.0, rel=1e-3)


def test_labels_that_are_unlabelled_are_passed_over():
    objective = objective_of(recipe_of({"method": "kd", "strength": 3.0}))
    student, teacher = torch.randn(8, 10).requires_grad_(), torch.randn(8, 10)
    value = objective(student, teacher, torch.full((8,), -100))["loss"]
    assert math.isfinite(float(value.detach()))


def test_half_precision_logits_are_measured_in_float32():
    objective = objective_of(recipe_of({"method": "ce"}, {"method": "kd", "strength": 2.0}))
    student = (1e-3 * torch.randn(4096, 10)).to(torch.float16).requires_grad_()
    result = objective(student, torch.randn(4096, 10), torch.arange(4096) % 10)
    assert math.isfinite(float(result["loss"].detach()))
    assert float(objective.strengths["1"].accepted) == 1


def test_evaluation_measures_nothing():
    objective = objective_of(recipe_of({"method": "ce"}, {"method": "kd", "strength": 2.0}))
    with torch.no_grad():
        objective(torch.randn(8, 10), torch.randn(8, 10), torch.arange(8))
    assert objective.strengths["1"].steps == 0


def test_on_feature_maps_the_place_is_the_maps():
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    head = torch.nn.Linear(4, 10)
    images = torch.randn(6, 3, 8, 8)
    student_map = conv(images)
    pooled = student_map.mean((2, 3))
    student = Features([student_map], None, pooled, head(pooled))
    teacher = Features([torch.randn(6, 4, 8, 8)], None, torch.randn(6, 4), torch.randn(6, 10))
    recipe = recipe_of({"method": "ce"}, {"method": "at", "strength": 2.0})
    objective = build_objective(recipe.losses, num_classes=10, context={"student": student, "teacher": teacher})
    target = torch.arange(6)
    result = objective(student, teacher, target)
    (whole,) = torch.autograd.grad(result["loss"], student_map, retain_graph=True)
    cross_entropy = torch.nn.functional.cross_entropy(student.logits, target)
    (own,) = torch.autograd.grad(cross_entropy, student_map)
    assert float((whole - own).norm() / own.norm()) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([{"method": "ce", "strength": 1.0}], "strength is for terms that compare with the teacher"),
        ([{"method": "pld", "strength": 1.0}], "stands for cross-entropy too"),
        ([{"method": "simkd", "strength": 1.0}], "stands for cross-entropy too"),
        ([{"method": "ce"}, {"method": "kd", "strength": 1.0, "weight": 2.0}], "give a weight or a strength, not both"),
    ],
)
def test_a_strength_without_a_meaning_is_refused_before_training(terms, says):
    with pytest.raises(InputError, match=says):
        check_losses(recipe_of(*terms), 10)


@pytest.mark.parametrize("strength", [0, -1, "nan"])
def test_a_strength_must_be_above_0(strength):
    with pytest.raises(InputError, match="strength"):
        recipe_of({"method": "ce"}, {"method": "kd", "strength": strength})


def test_the_recipe_keeps_a_strength_that_is_not_followed():
    recipe = recipe_of({"method": "ce"}, {"method": "kd", "strength": 4.0, "strength_follow": False})
    again = make_recipe(recipe.to_dict())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.strength == 4.0


@pytest.mark.slow
def test_metrics_csv_shows_the_weight_and_an_interrupted_run_goes_on_with_it(tmp_path):
    recipe = make_recipe(
        {
            **load_recipe("digits").to_dict(),
            "losses": [{"method": "ce"}, {"method": "kd", "strength": 4.0}],
            "data": {"name": "digits", "limit": 300, "batch_size": 50},
            "teacher": {"name": "cifar/resnet8", "epochs": 1},
            "train": {"epochs": 2, "device": "cpu"},
            "allow": ["weak-teacher"],
        }
    )
    result = run(recipe, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["train/weight/kd"]) > 0 for row in rows)
    assert result.summary["strength"] == 4.0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert any("log_ratio" in key for key in state["objective"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [("kd", "fasterrcnn"), ("pkd", "retinanet")])
def test_detectors_terms_are_measured_at_their_logits_and_levels(family, method, tmp_path):
    recipe = make_recipe(
        {
            **load_recipe("digits-detection").to_dict(),
            "losses": [{"method": "detector"}, {"method": method, "strength": 2.0}],
            "data": {"name": "digits-detection", "limit": 16, "batch_size": 4, "image_size": 64},
            "student": {"name": f"{family}/tiny4"},
            "teacher": {"name": f"{family}/tiny4", "epochs": 1},
            "train": {"epochs": 1, "device": "cpu"},
            "allow": ["weak-teacher"],
        }
    )
    Detection().check(recipe, type("Data", (), {"classes": ["0"] * 10})())
    assert issubclass(DetectionObjective, Objective)
    run(recipe, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row[f"train/weight/{method}"]) < 1e4
