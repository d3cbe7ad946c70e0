"""CSKD and CSWT against loops over their equations, the golden values, what a cosine ignores, and common mistakes."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.cskd import CSKDLoss, CSKDNoAugLoss, cskd_loss, cswt_temperatures
from tests.helpers import golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.cskd import cskd, cswt

COSINE = {"views": 1, "masks": False, "class_weight": 0.0, "batch_weight": 0.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"cswt_weight": 0.0}, 1.168219), ({"fixed_weight": 0.0}, 0.941278), ({}, 1.168219 + 0.941278)],
)
def test_golden_values(options, expected):
    student, teacher, target = golden_pair()
    assert cskd_loss(student, teacher, target, **COSINE, **options).item() == pytest.approx(expected, abs=1.2e-6)


def test_golden_temperatures():
    student, teacher, _ = golden_pair()
    actual = cswt_temperatures(student, teacher).tolist()
    assert actual == pytest.approx([6.0000, 2.0000, 2.3016, 3.4314], abs=6e-5)


WEIGHTS = {
    "cosine_weight": 1.5,
    "fixed_weight": 0.5,
    "cswt_weight": 2.0,
    "class_weight": 3.0,
    "batch_weight": 4.0,
    "temperature": 3.0,
    "min_temperature": 1.5,
    "max_temperature": 4.0,
}
FORMS = [{}, {"masks": False}, {"views": 1}, {"views": 1, "masks": False}]


def loop(student, teacher, form):
    form = {"masked" if name == "masks" else name: value for name, value in form.items()}
    return cskd(student, teacher, temperature=3.0, span=(1.5, 4.0), weights=(1.5, 0.5, 2.0, 3.0, 4.0), **form)


@checks.DTYPES
@pytest.mark.parametrize(("n", "c"), [(2, 2), (10, 13), (14, 5)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_value_matches_loop(dtype, n, c, form):
    checks.check_scalar(
        lambda s, t, y: cskd_loss(s, t, y, **WEIGHTS, **form), lambda s, t, y: loop(s, t, form), n, c, dtype
    )


@checks.GRAD_DTYPES
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_matches_loop(dtype, form):
    checks.check_scalar_gradient(
        lambda s, t, y: cskd_loss(s, t, y, **WEIGHTS, **form), lambda s, t, y: loop(s, t, form), 6, 7, dtype
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck_with_constant_temperatures(form):
    # CSWT is a constant to autograd, not to gradcheck
    options = {"min_temperature": 3.0, "max_temperature": 3.0, **form}
    checks.check_gradcheck(lambda s, t, y: cskd_loss(s, t, y, **options), 6, 5)


def test_temperatures_match_loop_and_span_the_range():
    student, teacher = make_pair(20, 10, torch.float64)
    actual = cswt_temperatures(student, teacher, min_temperature=1.0, max_temperature=5.0)
    expected = cswt(student.tolist(), teacher.tolist(), 1.0, 5.0)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    assert (actual.min(), actual.max()) == (1.0, 5.0)
    assert not actual.requires_grad


def test_equally_similar_samples_all_get_the_lowest_temperature():
    _, teacher = make_pair(5, 4, torch.float32)
    assert cswt_temperatures(teacher, teacher).tolist() == pytest.approx([2.0] * 5, abs=1e-5)
    assert cswt_temperatures(teacher[:1] + torch.arange(4), teacher[:1]).tolist() == [2.0]
    assert cswt_temperatures(teacher[:0], teacher[:0]).shape == (0,)


@given(logit_pairs(scale=5.0))
def test_bounded_small_at_equality_and_blind_to_shifts_and_orders(pair):
    student, teacher = (x.round(decimals=2) for x in pair)
    options = {"views": 1, "masks": False, "cswt_weight": 0.0}
    expected = cskd_loss(student, teacher, **options)
    assert -1e-12 <= expected <= 2 * 16 + 2
    assert cskd_loss(teacher, teacher, **options) < 1e-3  # eps against the product of two norms
    shifted = cskd_loss(student + torch.arange(len(student))[:, None], teacher - 7.0, **options)
    torch.testing.assert_close(shifted, expected)
    for dim in (0, 1):
        torch.testing.assert_close(cskd_loss(student.flip(dim), teacher.flip(dim), **options), expected)


def test_one_sample_has_no_direction_but_its_class_term():
    student, teacher = make_pair(1, 5, torch.float64)
    student = (student / 3).detach().requires_grad_()
    options = {"views": 1, "class_weight": 0.0}
    assert cskd_loss(student, teacher / 3, **options) < 1e-4
    with_class = cskd_loss(student, teacher / 3, views=1)
    assert with_class > 1e-2
    with_class.backward()
    assert student.grad.isfinite().all()


def test_the_gram_terms_look_at_the_weak_view_only():
    student, teacher = make_pair(8, 5, torch.float64)
    cskd_loss(student, teacher, cosine_weight=0.0).backward()
    assert student.grad[4:].eq(0).all()
    assert student.grad[:4].ne(0).all()


def test_the_strong_view_is_compared_at_the_weak_views_temperatures():
    student, teacher = make_pair(8, 5, torch.float64)
    options = {**COSINE, "fixed_weight": 0.0}
    both = cskd_loss(student, teacher, **{**options, "views": 2})
    weak = cskd_loss(student[:4], teacher[:4], **options)
    t = cswt_temperatures(student[:4], teacher[:4])[:, None]
    q, p = (student[4:] / t).softmax(1), (teacher[4:] / t).softmax(1)
    strong = 2 * t.mean() ** 2 * (1 - torch.nn.functional.cosine_similarity(p, q, dim=0).mean())
    torch.testing.assert_close(both, weak + strong, rtol=1e-5, atol=1e-6)


def test_module_is_the_function():
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(CSKDLoss()(student, teacher), cskd_loss(student, teacher))
    one = cskd_loss(student, teacher, views=1, masks=False)
    torch.testing.assert_close(CSKDNoAugLoss()(student, teacher), one)
    options = {**WEIGHTS, "eps": 1e-2}
    for extra in FORMS:
        expected = cskd_loss(student, teacher, **options, **extra)
        torch.testing.assert_close(CSKDLoss(**options, **extra)(student, teacher), expected)
    one = cskd_loss(student, teacher, views=1, masks=False, **options)
    torch.testing.assert_close(CSKDNoAugLoss(**options)(student, teacher), one)


def test_the_module_says_how_many_views_it_compares():
    assert CSKDLoss().needs.views == 2
    assert CSKDLoss(views=1).needs.views == 1
    assert CSKDNoAugLoss().needs.views == 1


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c, form):
    checks.check_finite_in_half(lambda s, t, y: cskd_loss(s, t, y, **form), dtype, c)


@pytest.mark.parametrize("views", [1, 2])
def test_empty_batch_autocast_and_constant_teacher(views):
    checks.check_batch(lambda s, t, y: cskd_loss(s, t, y, views=views))
    checks.check_reads_no_value(lambda s, t, y: cskd_loss(s, t, y, views=views))


Z = torch.zeros(2, 10)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        cskd_loss(student, teacher)


def test_an_odd_number_of_rows_is_no_two_views():
    with pytest.raises(ValueError, match=r"\[2 N, C\].*got \[3, 10\]"):
        cskd_loss(torch.zeros(3, 10), torch.zeros(3, 10))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "^temperature must be .* got 0.0"),
        ({"min_temperature": -1.0}, "min_temperature must be .* got -1.0"),
        ({"max_temperature": float("inf")}, "max_temperature must be .* got inf"),
        ({"max_temperature": 1.0}, "max_temperature must be at least min_temperature = 2.0, got 1.0"),
        ({"views": 0}, "views must be 1 or 2, got 0"),
        ({"cosine_weight": -1.0}, "cosine_weight must be a finite number >= 0, got -1.0"),
        ({"fixed_weight": -2.0}, "fixed_weight must be a finite number >= 0, got -2.0"),
        ({"cswt_weight": -3.0}, "cswt_weight must be a finite number >= 0, got -3.0"),
        ({"class_weight": -4.0}, "class_weight must be a finite number >= 0, got -4.0"),
        ({"batch_weight": -5.0}, "batch_weight must be a finite number >= 0, got -5.0"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        cskd_loss(Z, Z, **options)
    with pytest.raises(ValueError, match=says):
        CSKDLoss(**options)
