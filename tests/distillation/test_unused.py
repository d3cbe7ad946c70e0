"""Parameters without a gradient are named from one graph, and the distiller does not notice."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pcdistill.distillation.objective import Objective, Term, build_objective
from pcdistill.distillation.unused import unused_parameters
from pcdistill.losses import CELoss
from pcdistill.losses._features import Features
from pcdistill.methods import METHODS
from pcdistill.recipe import make_recipe
from tests.losses.feature_checks import make_features

FEATURES = sorted(name for name, method in METHODS.items() if method.kind == "features")


class Student(nn.Module):
    """A stage, a batch normalisation, dropout, a classifier, and a layer that no pass uses."""

    def __init__(self, extra=True):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(4, 5)
        if extra:
            self.spare = nn.Linear(2, 2)

    def features(self, images):
        maps = self.stage(images)
        pooled = self.drop(maps.mean((2, 3)))
        return Features([maps], [maps], pooled, self.classifier(pooled), self.classifier, torch.arange(len(images)))


class Distiller(nn.Module):
    def __init__(self, student, objective, teacher=None):
        super().__init__()
        self.student, self.objective, self._hidden = student, objective, (teacher,)

    def forward(self, batch):
        return self.objective(self.student.features(batch.images), self._hidden[0], batch.target)


def make_batch(n=6):
    g = torch.Generator().manual_seed(0)
    return SimpleNamespace(images=torch.randn(n, 1, 8, 8, generator=g), target=torch.arange(n) % 5)


def snapshot(module):
    return {name: x.clone() for name, x in [*module.named_parameters(), *module.named_buffers()]}


def test_the_layer_that_is_not_called_is_named():
    distiller = Distiller(Student(), Objective([Term("ce", CELoss())]))
    assert unused_parameters(distiller, make_batch()) == ["student.spare.weight", "student.spare.bias"]
    assert unused_parameters(Distiller(Student(extra=False), distiller.objective), make_batch()) == []


def test_frozen_parameters_are_not_looked_for():
    distiller = Distiller(Student(), Objective([Term("ce", CELoss())]))
    distiller.student.spare.requires_grad_(False)
    assert unused_parameters(distiller, make_batch()) == []


def test_a_term_that_has_no_weight_yet_counts_as_used():
    distiller = Distiller(Student(extra=False), Objective([Term("ce", CELoss(), 0.0, weight_to=1.0)]))
    assert distiller.objective.factors == [0.0]
    assert unused_parameters(distiller, make_batch()) == []


@pytest.mark.parametrize("training", [True, False])
def test_statistics_memories_gradients_modes_and_random_numbers_stay(training):
    student = Student()
    teacher = make_features(n=6, widths=(6,), sizes=(8,), seed=2)
    context = {"student": student.features(make_batch().images), "teacher": teacher, "n_data": 32}
    crd = make_recipe({"losses": [{"method": "ce"}, {"method": "crd", "negatives": 8}]}).losses
    distiller = Distiller(student, build_objective(crd, num_classes=5, context=context), teacher)
    distiller.train(training)
    student.classifier.weight.grad = torch.ones_like(student.classifier.weight)
    before, random = snapshot(distiller), torch.get_rng_state()
    assert unused_parameters(distiller, make_batch()) == ["student.spare.weight", "student.spare.bias"]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in snapshot(distiller).items())
    assert torch.equal(student.classifier.weight.grad, torch.ones_like(student.classifier.weight))
    assert [name for name, p in distiller.named_parameters() if p.grad is not None] == ["student.classifier.weight"]
    assert all(module.training == training for module in distiller.modules())


def test_a_measured_strength_stays_as_it_was():
    terms = make_recipe({"losses": [{"method": "ce"}, {"method": "kd", "strength": 4}]}).losses
    teacher = make_features(n=6, widths=(6,), sizes=(8,), seed=2)
    distiller = Distiller(Student(), build_objective(terms, num_classes=5), teacher)
    (strength,) = distiller.objective.strengths.values()
    distiller(make_batch())
    before = (strength.steps, strength.log_ratio.clone(), strength.accepted.clone())
    unused_parameters(distiller, make_batch())
    assert (strength.steps, strength.log_ratio, strength.accepted) == before
    assert strength.steps == 1


@pytest.mark.parametrize("name", FEATURES)
def test_it_agrees_with_the_gradients_of_a_step(name):
    student = Student()
    teacher = make_features(n=6, widths=(6,), sizes=(8,), seed=2)
    context = {"student": student.features(make_batch().images), "teacher": teacher, "n_data": 32}
    options = {"crd": {"negatives": 8}, "fitnet": {"stage": 0}}.get(name, {})
    terms = make_recipe({"losses": [{"method": name, **options}]}).losses
    distiller = Distiller(student, build_objective(terms, num_classes=5, context=context), teacher)
    unused = unused_parameters(distiller, make_batch())
    distiller(make_batch())["loss"].backward()
    assert unused == [name for name, p in distiller.named_parameters() if p.grad is None]
    assert "student.spare.weight" in unused
