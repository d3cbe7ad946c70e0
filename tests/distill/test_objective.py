"""The objective: weighted sum, warm-ups, moving weights and temperatures, every shipped method in it."""

import importlib
import pkgutil

import pytest
import torch

import pcdistill.losses as losses
from pcdistill.classification.task import build_objective, views_of
from pcdistill.distill.objective import Objective, Term, build_loss
from pcdistill.errors import InputError
from pcdistill.losses import CELoss, KDLoss, LDRLDLoss, StandardizedLoss
from pcdistill.methods import METHODS
from pcdistill.recipe import load_recipe

LOGIT_METHODS = sorted(name for name, method in METHODS.items() if method.kind == "logits")


def logits(n=8, c=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(n) % c


def test_total_is_the_weighted_sum_and_parts_are_unweighted():
    student, teacher, target = logits()
    out = Objective([Term("ce", CELoss(), 0.3), Term("kd", KDLoss(), 2.0)])(student, teacher, target)
    torch.testing.assert_close(out["loss"], 0.3 * out["loss/ce"] + 2.0 * out["loss/kd"])
    torch.testing.assert_close(out["loss/kd"], KDLoss()(student, teacher).detach())
    assert out["loss"].requires_grad
    assert not out["loss/kd"].requires_grad


def test_each_term_has_its_own_warm_up_weight_and_temperature_schedule():
    kd = KDLoss(temperature=4.0)
    objective = Objective(
        [
            Term("ce", CELoss(), 1.0, weight_to=0.0),
            Term("kd", kd, 2.0, warmup_epochs=4, temperature_to=1.0),
            Term("plain", KDLoss(), 3.0),
        ]
    )
    seen = []
    for epoch in range(4):
        objective.set_progress(progress=(epoch + 0.5) / 4, epoch=epoch + 0.5, total_epochs=4)
        seen.append([*objective.factors, kd.temperature])
    assert seen == [pytest.approx(row) for row in ([1, 0.5, 3, 4], [2 / 3, 1, 3, 3], [1 / 3, 1.5, 3, 2], [0, 2, 3, 1])]
    objective.set_progress(progress=0.0, epoch=0.0, total_epochs=4)  # no state: a run may resume anywhere
    assert [*objective.factors, kd.temperature] == pytest.approx([1, 0.5, 3, 4])


def test_the_temperature_of_a_standardised_loss_moves():
    kd = KDLoss(temperature=2.0)
    objective = Objective([Term("kd", StandardizedLoss(kd), temperature_to=4.0)])
    objective.set_progress(progress=0.5, epoch=1.0, total_epochs=2)
    assert kd.temperature == 4.0


def test_a_moving_temperature_needs_a_temperature():
    with pytest.raises(InputError, match="ce: temperature_to needs a loss with one temperature"):
        Objective([Term("ce", CELoss(), temperature_to=2.0)])


def test_a_weight_that_rises_from_nothing_needs_the_teacher():
    assert Objective([Term("kd", KDLoss(), 0.0, weight_to=1.0)]).needs_teacher
    assert not Objective([Term("kd", KDLoss(), 0.0), Term("ce", CELoss())]).needs_teacher


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_every_logit_method_is_built_from_its_name_and_learns_from_the_teacher(name):
    recipe = load_recipe("default", values={"method": name})
    objective = build_objective(recipe.losses, num_classes=10)
    assert views_of(recipe) == objective.views
    student, teacher, target = logits(n=8)
    out = objective(student, teacher, target)
    (gradient,) = torch.autograd.grad(out["loss"], student)
    assert out["loss"].isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    if name != "ce":
        changed = objective(student, teacher.flip(1), target)
        assert not torch.allclose(changed["loss"], out["loss"])


def test_every_entry_of_the_table_is_a_public_loss_with_an_objective():
    for name, method in METHODS.items():
        assert getattr(losses, method.load().__name__) is method.load(), name
        assert method.terms, name


def test_every_loss_of_a_file_is_public():
    for info in pkgutil.iter_modules(losses.__path__):
        module = importlib.import_module(f"pcdistill.losses.{info.name}")
        defined = {n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
        wanted = {n for n in defined if n.endswith(("_loss", "Loss")) and n[0] != "_"} if info.name[0] != "_" else set()
        assert wanted <= set(getattr(module, "__all__", ())), info.name
        for name in getattr(module, "__all__", ()):
            assert getattr(losses, name) is getattr(module, name)


def test_options_are_checked_against_the_loss():
    built, kind = build_loss("ldrld", {"top_classes": 5})
    assert isinstance(built, LDRLDLoss)
    assert (built.top_classes, kind) == (5, "logits")
    with pytest.raises(InputError, match='ldrld has no option "top_clases"; did you mean "top_classes"'):
        build_loss("ldrld", {"top_clases": 5})


def test_views_follow_the_terms_options():
    two = load_recipe("default", values={"method": "mlkd"})
    one = load_recipe("default", ["losses.mlkd.views=1"], values={"method": "mlkd"})
    assert (views_of(two), views_of(one)) == (2, 1)
