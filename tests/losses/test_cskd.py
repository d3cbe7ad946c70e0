"""CSKD and CSWT against loops over their equations, the golden values, what a cosine ignores, and common mistakes."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.cskd import CSKDLoss, CSKDNoAugLoss, cskd_loss, cswt_temperatures
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, logit_pairs, make_pair
from tests.references.cskd import cskd, cswt
from tests.references.scalars import gradient

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


@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize(("n", "c"), [(2, 2), (10, 13), (14, 5)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_value_matches_loop(dtype, n, c, form):
    student, teacher = make_pair(n, c, dtype)
    actual = cskd_loss(student, teacher, **WEIGHTS, **form)
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.item(), loop(student.tolist(), teacher.tolist(), form), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", GRAD, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_matches_loop(dtype, form):
    student, teacher = make_pair(6, 7, dtype)
    cskd_loss(student, teacher, **WEIGHTS, **form).backward()
    expected = gradient(lambda rows: loop(rows, teacher.tolist(), form), student)
    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(student.grad.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck_with_constant_temperatures(form):
    student, teacher = make_pair(6, 5, torch.float64)
    options = {
        "min_temperature": 3.0,
        "max_temperature": 3.0,
        **form,
    }  # CSWT is a constant to autograd, not to gradcheck
    assert torch.autograd.gradcheck(lambda z: cskd_loss(z, teacher, **options), student)


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


def test_module_is_the_function_and_an_empty_batch_is_zero():
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
    for views in (1, 2):
        empty = torch.zeros(0, 10, requires_grad=True)
        loss = cskd_loss(empty, empty.detach(), views=views)
        loss.backward()
        assert loss == 0


def test_the_module_says_how_many_views_it_compares():
    assert CSKDLoss().needs.views == 2
    assert CSKDLoss(views=1).needs.views == 1
    assert CSKDNoAugLoss().needs.views == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [2, 9])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c, form):
    student, teacher, target = extreme_pair(6, c, dtype)
    loss = cskd_loss(student, teacher, target, **form)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_autocast_changes_nothing():
    student, teacher = make_pair(6, 10, torch.float32)
    expected = cskd_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cskd_loss(student, teacher), expected)


def test_teacher_gets_no_gradient():
    student, teacher = make_pair(2, 4, torch.float32)
    teacher.requires_grad_()
    cskd_loss(student, teacher).backward()
    assert teacher.grad is None


Z = torch.zeros(2, 10)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        (Z, torch.zeros(2, 9), {}, ValueError, r"\[2, 9\].*\[2, 10\]"),
        (torch.zeros(3, 10), torch.zeros(3, 10), {}, ValueError, r"\[2 N, C\].*got \[3, 10\]"),
        (Z, Z, {"temperature": 0.0}, ValueError, "^temperature must be .* got 0.0"),
        (Z, Z, {"min_temperature": -1.0}, ValueError, "min_temperature must be .* got -1.0"),
        (Z, Z, {"max_temperature": float("inf")}, ValueError, "max_temperature must be .* got inf"),
        (Z, Z, {"max_temperature": 1.0}, ValueError, "max_temperature must be at least min_temperature = 2.0, got 1.0"),
        (Z, Z, {"views": 0}, ValueError, "views must be 1 or 2, got 0"),
        (Z, Z, {"cosine_weight": -1.0}, ValueError, "cosine_weight must be a finite number >= 0, got -1.0"),
        (Z, Z, {"fixed_weight": -2.0}, ValueError, "fixed_weight must be a finite number >= 0, got -2.0"),
        (Z, Z, {"cswt_weight": -3.0}, ValueError, "cswt_weight must be a finite number >= 0, got -3.0"),
        (Z, Z, {"class_weight": -4.0}, ValueError, "class_weight must be a finite number >= 0, got -4.0"),
        (Z, Z, {"batch_weight": -5.0}, ValueError, "batch_weight must be a finite number >= 0, got -5.0"),
        (Z, Z, {"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0"),
        (Z.long(), Z.long(), {}, TypeError, "int64"),
    ],
)
def test_bad_input_is_named(student, teacher, options, error, says):
    with pytest.raises(error, match=says):
        cskd_loss(student, teacher, **options)
    if options:
        with pytest.raises(error, match=says):
            CSKDLoss(**options)
