"""The objective: weighted sum, warm-ups, moving weights and temperatures, every shipped method in it."""

import importlib
import pkgutil

import pytest
import torch

import pcdistill.losses as losses
from pcdistill.data.loader import UNLABELLED
from pcdistill.distillation.objective import (
    Objective,
    Term,
    build_loss,
    build_objective,
    check_losses,
    term_needs,
    views_of,
)
from pcdistill.errors import InputError
from pcdistill.losses import (
    CELoss,
    EntropyWeightedLoss,
    KDLoss,
    LDRLDLoss,
    LogitLoss,
    Needs,
    StandardizedLoss,
    eakd_loss,
    entropy_weights,
    pcd_loss,
    standardize_logits,
)
from pcdistill.methods import METHODS
from pcdistill.recipe import load_recipe, make_recipe

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


@pytest.mark.parametrize("wrap", [StandardizedLoss, EntropyWeightedLoss])
def test_the_temperature_of_a_wrapped_loss_moves(wrap):
    kd = KDLoss(temperature=2.0)
    objective = Objective([Term("kd", wrap(kd), temperature_to=4.0)])
    objective.set_progress(progress=0.5, epoch=1.0, total_epochs=2)
    assert kd.temperature == 4.0


def test_entropy_weighting_is_one_key_of_any_term_with_a_value_for_every_sample():
    student, teacher, target = logits()
    terms = [
        {"method": "kd", "entropy_weighting": True},
        {"method": "pcd", "entropy_weighting": 2, "standardize": True},
    ]
    kd, pcd = build_objective(make_recipe({"losses": terms}).losses, num_classes=10).losses
    torch.testing.assert_close(kd(student, teacher, target), eakd_loss(student, teacher))
    assert pcd.entropy_temperature == 2.0
    expected = entropy_weights(student, teacher, entropy_temperature=2.0) * pcd_loss(
        standardize_logits(student), standardize_logits(teacher), reduction="none"
    )
    torch.testing.assert_close(pcd(student, teacher, target), expected.mean())


@pytest.mark.parametrize(
    ("method", "value", "says"),
    [
        ("dist", True, "dist: entropy_weighting: .* a value for every sample, and DISTLoss has one for the batch"),
        ("ce", True, "ce: entropy_weighting: .*, and CELoss does not look at the teacher"),
        ("kd", -1, "kd: entropy_weighting: entropy_temperature must be a finite number > 0, got -1.0"),
    ],
)
def test_entropy_weighting_that_does_not_fit_is_refused_in_one_sentence(method, value, says):
    recipe = make_recipe({"losses": [{"method": "kd"}, {"method": method, "entropy_weighting": value}]})
    with pytest.raises(InputError, match=f"^losses.1: {says}$"):
        check_losses(recipe, 10)


def test_entropy_weighting_of_features_is_refused():
    with pytest.raises(InputError, match="entropy_weighting fits losses on logits; rkd compares features"):
        build_loss("rkd", {}, entropy_weighting=True)


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
    built = build_loss("ldrld", {"top_classes": 5})
    assert isinstance(built, LDRLDLoss)
    assert built.top_classes == 5
    with pytest.raises(InputError, match='ldrld has no option "top_clases"; did you mean "top_classes"'):
        build_loss("ldrld", {"top_clases": 5})


def test_views_follow_the_terms_options():
    two = load_recipe("default", values={"method": "mlkd"})
    one = load_recipe("default", ["losses.mlkd.views=1"], values={"method": "mlkd"})
    assert (views_of(two), views_of(one)) == (2, 1)


def recipe_of(*terms, **values):
    return make_recipe({"losses": list(terms), "data": {"mixup": 0.4, **values}})


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_with_soft_labels_a_method_trains_a_step_or_is_refused_before_training(name, views):
    """What passes the check must not fail at the first step."""
    recipe = recipe_of({"method": name}, views=views)
    needs = term_needs(recipe.losses[0])
    allowed = needs.views <= views and (needs.soft_labels or not needs.labels)
    if not allowed:
        with pytest.raises(InputError, match=rf"^losses.0: {name}: (compares two views|target must be hard labels)"):
            check_losses(recipe, 10)
        return
    check_losses(recipe, 10)
    if METHODS[name].kind == "logits":
        student, teacher, target = logits(n=4 * views)
        soft = torch.nn.functional.one_hot(target, 10).double()
        out = build_objective(recipe.losses, num_classes=10)(student, teacher, soft)
        assert torch.autograd.grad(out["loss"], student)[0].isfinite().all()


OWN = """
import torch
from torch import nn
from pcdistill.losses import LogitLoss, Needs

class Plain(nn.Module):
    def forward(self, student, teacher, target=None):
        return (student - teacher.detach()).square().mean()

class Gathers(Plain):
    def forward(self, student, teacher, target=None):
        return super().forward(student, teacher) - student.gather(1, target[:, None]).mean()

class Refuses(Plain):
    def forward(self, student, teacher, target=None):
        if target.ndim == 2:
            raise ValueError("no soft labels, please")
        return super().forward(student, teacher)

class Says(LogitLoss):
    needs = Needs(labels=True, soft_labels=False)
    forward = Plain.forward

class Two(LogitLoss):
    needs = Needs(views=2)
    forward = Plain.forward

class Unreduced(Plain):
    def forward(self, student, teacher, target=None):
        return (student - teacher.detach()).square().mean(1)

class Detached(Plain):
    def forward(self, student, teacher, target=None):
        return super().forward(student.detach(), teacher)

class Former(Plain):
    hard_target_only = True

class Odd(Plain):
    kind = "detection"
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Gathers", r"losses.1: Gathers: cannot be computed on logits \[4, 10\] with probabilities \[4, 10\]: Runtime"),
        ("Refuses", "losses.1: Refuses: no soft labels, please"),
        ("Says", "losses.1: Says: target must be hard labels for this loss, and this run makes soft ones"),
        ("Two", "losses.1: Two: compares two views of each image; set data.views to 2"),
        ("Unreduced", r"losses.1: Unreduced: must give a scalar, got \[4\]; reduce over the samples"),
        ("Detached", "losses.1: Detached: must depend on the student's logits"),
        (
            "Former",
            r"losses.1: .*own.py:Former: hard_target_only has no effect; write needs = Needs\(",
        ),
        ("Odd", "losses.1: .*own.py:Odd: kind must be 'logits', 'features' or 'pyramids', got 'detection'"),
    ],
)
def test_a_users_loss_that_does_not_fit_is_refused_before_training(tmp_path, name, says):
    (tmp_path / "own.py").write_text(OWN)
    check_losses(recipe_of({"method": "ce"}, {"method": f"{tmp_path}/own.py:Plain"}), 10)
    with pytest.raises(InputError, match=says):
        check_losses(recipe_of({"method": "ce"}, {"method": f"{tmp_path}/own.py:{name}"}, views=1), 10)


def test_a_users_loss_of_two_views_gets_them(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    recipe = make_recipe({"losses": [{"method": "ce"}, {"method": f"{tmp_path}/own.py:Two"}]})
    assert views_of(recipe) == 2
    check_losses(recipe, 10)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"method": "pcd", "stages": 9}, "losses.0: pcd: stages must be "),
        ({"method": "kd", "reduction": "none"}, r"losses.0: kd: must give a scalar, got \[4\]"),
        ({"method": "sdd"}, "losses.0: sdd: target must be hard labels"),
        ({"method": "fitnet", "stag": 1}, 'losses.0: fitnet has no option "stag"; did you mean "stage"'),
        ({"method": "crd", "labels": [1]}, 'losses.0: crd has no option "labels"'),
    ],
)
def test_a_term_that_does_not_fit_is_refused_before_training(term, says):
    with pytest.raises(InputError, match=says):
        check_losses(recipe_of(term), 10)


def test_the_check_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_losses(recipe_of({"method": "kd"}, {"method": "ctkd"}), 10)
    assert torch.equal(torch.rand(4), expected)


def test_a_loss_gets_the_labels_only_if_it_asks_for_them():
    seen = []

    class Blind(LogitLoss):
        def forward(self, student, teacher, target=None):
            seen.append(target)
            return student.sum()

    class Reads(Blind):
        needs = Needs(labels=True)

    student, teacher, target = logits()
    Objective([Term("blind", Blind()), Term("reads", Reads())])(student, teacher, target)
    assert seen[0] is None
    assert seen[1] is target


def mixed_target():
    student, teacher, target = logits()
    labelled = torch.tensor([0, 1, 4, 5])
    target[[2, 3, 6, 7]] = UNLABELLED
    return student, teacher, target, labelled


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_terms_that_read_labels_get_the_labelled_rows_and_the_others_all(name):
    student, teacher, target, labelled = mixed_target()
    terms = [{"method": name, "views": 1}] if name in ("mlkd", "cskd") else [{"method": name}]
    recipe = recipe_of(*terms)
    made = build_objective(recipe.losses, num_classes=10)
    reads = made.terms[0].needs.labels
    value = made(student, teacher, target, labelled)["loss"]
    torch.manual_seed(0)
    with torch.no_grad():
        rows = labelled if reads else slice(None)
        expected = made.terms[0].loss(student[rows], teacher[rows], target[rows] if reads else None)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student)
    assert bool((gradient[[2, 3, 6, 7]] != 0).any()) != reads


@pytest.mark.parametrize("name", ["ce", "dkd", "pld", "rld"])
def test_without_a_labelled_row_a_term_that_reads_labels_is_zero_with_a_graph(name):
    student, teacher, target = logits()
    made = build_objective(recipe_of({"method": name}).losses, num_classes=10)
    out = made(student, teacher, torch.full_like(target, UNLABELLED), torch.arange(0))
    assert out["loss"].item() == 0
    (gradient,) = torch.autograd.grad(out["loss"], student)
    assert bool((gradient == 0).all())


def test_soft_labels_too_are_read_from_the_labelled_rows():
    student, teacher, _, labelled = mixed_target()
    soft = torch.full((8, 10), float(UNLABELLED), dtype=torch.float64)
    soft[labelled] = torch.rand(4, 10, dtype=torch.float64).softmax(1)
    value = Objective([Term("ce", CELoss())])(student, teacher, soft, labelled)["loss"]
    torch.testing.assert_close(value, CELoss()(student[labelled], target=soft[labelled]))


def test_feature_terms_that_read_labels_get_the_features_of_the_labelled_rows():
    class Reads(losses.FeatureLoss):
        needs = Needs(labels=True)

        def forward(self, student, teacher, target=None):
            assert len(student.maps[0]) == len(student.pooled) == len(student.index) == len(teacher.logits) == 4
            assert target.tolist() == [0, 1, 4, 5]
            return student.pooled.sum()

    def features(n):
        map_ = torch.arange(float(n))[:, None, None, None].expand(n, 2, 3, 3)
        return losses.Features([map_], None, map_.mean((2, 3)), torch.zeros(n, 10), index=torch.arange(n))

    _, _, target, labelled = mixed_target()
    value = Objective([Term("own", Reads())])(features(8), features(8), target, labelled)["loss"]
    assert value.item() == 2 * (0 + 1 + 4 + 5)


def test_a_strength_compares_with_the_labels_of_the_labelled_rows():
    student, teacher, target, labelled = mixed_target()
    made = build_objective(recipe_of({"method": "kd", "strength": 2.0}).losses, num_classes=10)
    made(student, teacher, target, labelled)
    (term,) = torch.autograd.grad(made.terms[0].loss(student, teacher), student)
    (own,) = torch.autograd.grad(CELoss()(student[labelled], target=target[labelled]), student)
    torch.testing.assert_close(made.terms[0].strength.factor.double(), 2 * own.norm() / term.norm(), rtol=1e-4, atol=0)
