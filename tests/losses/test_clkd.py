"""CLKD against loops over its equations, its golden values, each term alone, and what its size depends on."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.clkd import CLKDLoss, clkd_loss
from tests.helpers import extreme_pair, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.clkd import classes, correlation, instance

INSTANCE = {"instance_weight": 1.0, "class_weight": 0.0, "correlation_weight": 0.0}
CLASS = {"instance_weight": 0.0, "class_weight": 1.0, "correlation_weight": 0.0}
CORRELATION = {"instance_weight": 0.0, "class_weight": 0.0, "correlation_weight": 1.0}
KINDS = ["class", "class-norm", "class-cosine", "sample", "sample-centred"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (INSTANCE, 0.065622),
        (CLASS, 0.168360),
        ({**CORRELATION, "correlation": "sample"}, 0.786707),
        ({**CORRELATION, "correlation": "sample-centred"}, 0.872063),
        ({**CORRELATION, "correlation": "class"}, 1.128344),
        ({**CORRELATION, "correlation": "class-norm"}, 0.106224),
    ],
)
def test_golden_values_of_each_term_alone(options, expected):
    student, teacher, target = golden_pair()
    assert clkd_loss(student, teacher, target, **options).item() == pytest.approx(expected, abs=6e-7)


def test_the_defaults_are_the_papers_weights():
    student, teacher, _ = golden_pair()
    expected = 0.5 * (0.065622 + 2.0 * 0.168360) + 0.4 * 1.128344
    assert clkd_loss(student, teacher).item() == pytest.approx(expected, abs=2e-6)


def loop(student, teacher, kind):
    c = correlation(student, teacher, kind)
    return 2.0 * instance(student, teacher) + 3.0 * classes(student, teacher) + 0.5 * c


WEIGHTS = {"instance_weight": 2.0, "class_weight": 3.0, "correlation_weight": 0.5}


@checks.DTYPES
@pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 30), (20, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_value_matches_loop(dtype, n, c, kind):
    checks.check_scalar(
        lambda s, t, y: clkd_loss(s, t, y, correlation=kind, **WEIGHTS), lambda s, t, y: loop(s, t, kind), n, c, dtype
    )


@checks.GRAD_DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_loop(dtype, kind):
    checks.check_scalar_gradient(
        lambda s, t, y: clkd_loss(s, t, y, correlation=kind, **WEIGHTS), lambda s, t, y: loop(s, t, kind), 5, 7, dtype
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    checks.check_gradcheck(lambda s, t, y: clkd_loss(s, t, y, correlation=kind))


@given(logit_pairs(scale=5.0))
def test_bounds_and_blindness_of_the_two_mean_squares(pair):
    student, teacher = (x.round(decimals=3) for x in pair)  # rows below the eps are tried elsewhere
    n, c = student.shape
    rows, cols = clkd_loss(student, teacher, **INSTANCE), clkd_loss(student, teacher, **CLASS)
    assert 0 <= rows <= 4 / c + 1e-12
    assert 0 <= cols <= 4 / n + 1e-12
    torch.testing.assert_close(clkd_loss(3 * student, 0.5 * teacher, **INSTANCE), rows)
    torch.testing.assert_close(clkd_loss(3 * student, 0.5 * teacher, **CLASS), cols)
    if n > 1:
        torch.testing.assert_close(clkd_loss(student.T, teacher.T, **INSTANCE), cols)


@given(logit_pairs(scale=5.0))
def test_class_and_sample_order_change_nothing_and_equality_is_zero(pair):
    student, teacher = pair
    for kind in KINDS:
        expected = clkd_loss(student, teacher, correlation=kind)
        torch.testing.assert_close(clkd_loss(student.flip(1), teacher.flip(1), correlation=kind), expected)
        torch.testing.assert_close(clkd_loss(student.flip(0), teacher.flip(0), correlation=kind), expected)
        assert clkd_loss(teacher, teacher, correlation=kind) == 0


@pytest.mark.parametrize(
    ("kind", "power"), [("class", 4), ("sample", 4), ("sample-centred", 4), ("class-norm", 2), ("class-cosine", 0)]
)
def test_the_correlation_term_grows_with_the_logits_as_documented(kind, power):
    student, teacher = make_pair(6, 5, torch.float64)
    one = clkd_loss(student, teacher, correlation=kind, **CORRELATION)
    two = clkd_loss(2 * student, 2 * teacher, correlation=kind, **CORRELATION)
    torch.testing.assert_close(two, 2**power * one)


def test_torchs_covariance_of_the_samples_agrees():
    student, teacher = make_pair(6, 5, torch.float64)
    actual = clkd_loss(student, teacher, correlation="sample-centred", **CORRELATION)
    torch.testing.assert_close(actual, (torch.cov(student) - torch.cov(teacher)).square().sum() / 25)
    shift = 100 * torch.arange(6.0)[:, None]
    shifted = clkd_loss(student + shift, teacher - shift, correlation="sample-centred", **CORRELATION)
    torch.testing.assert_close(shifted, actual)


def test_the_gradient_at_equal_logits_is_zero():
    _, teacher = make_pair(4, 5, torch.float64)
    for kind in KINDS:
        student = teacher.clone().requires_grad_()
        clkd_loss(student, teacher, correlation=kind).backward()
        assert student.grad.eq(0).all()


def test_one_sample_compares_rows_and_signs():
    student, teacher = make_pair(1, 6, torch.float64)
    for kind in ("class", "class-norm", "sample"):
        assert clkd_loss(student, teacher, correlation=kind, **CORRELATION) == 0
    signs = clkd_loss(student, teacher, **CLASS)
    torch.testing.assert_close(signs, (student.sign() - teacher.sign()).square().mean())
    signs.backward()
    assert student.grad.abs().max() < 1e-15


def test_a_row_of_zeros_counts_as_zero_and_gets_no_gradient():
    _, teacher = make_pair(3, 4, torch.float32)
    student = torch.zeros(3, 4, requires_grad=True)
    for options in (INSTANCE, CLASS):
        loss = clkd_loss(student, teacher, **options)
        loss.backward()
        assert loss.item() == pytest.approx(1 / 4 if options is INSTANCE else 1 / 3)  # unit vectors against zeros
        assert student.grad.eq(0).all()


def test_module_is_the_function():
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(CLKDLoss()(student, teacher), clkd_loss(student, teacher))
    options = {**WEIGHTS, "correlation": "sample", "eps": 5.0}
    torch.testing.assert_close(CLKDLoss(**options)(student, teacher), clkd_loss(student, teacher, **options))
    assert clkd_loss(student, teacher, eps=5.0) != clkd_loss(student, teacher)


def test_an_empty_batch_in_float16_is_zero():
    empty = torch.zeros(0, 10, dtype=torch.float16, requires_grad=True)
    loss = clkd_loss(empty, empty.detach())
    loss.backward()
    assert loss == 0
    assert empty.grad is not None


def test_all_weights_zero_is_zero_with_a_graph():
    student, teacher = make_pair(3, 4, torch.float32)
    loss = clkd_loss(student, teacher, **{**CORRELATION, "correlation_weight": 0.0})
    loss.backward()
    assert loss == 0
    assert student.grad.eq(0).all()


@checks.HALF
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, kind, c):
    checks.check_finite_in_half(lambda s, t, y: clkd_loss(s, t, y, correlation=kind), dtype, c)


def test_a_gradient_beyond_float16_keeps_its_direction():
    student, teacher, _ = extreme_pair(6, 9, torch.float16)
    clkd_loss(student, teacher).backward()
    exact = student.detach().double().requires_grad_()
    clkd_loss(exact, teacher.double()).backward()
    assert exact.grad.abs().max() > 65504
    assert student.grad.abs().max() == 65504
    expected = exact.grad * 65504 / exact.grad.abs().max()
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-3, atol=1.0)


def test_a_gradient_within_float16_is_left_alone():
    student, teacher = make_pair(5, 7, torch.float16)
    clkd_loss(student, teacher).backward()
    exact = student.detach().double().requires_grad_()
    clkd_loss(exact, teacher.double()).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_autocast_and_constant_teacher(kind):
    checks.check_batch(lambda s, t, y: clkd_loss(s, t, y, correlation=kind))
    checks.check_reads_no_value(lambda s, t, y: clkd_loss(s, t, y, correlation=kind))


Z = torch.zeros(2, 10)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        clkd_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"instance_weight": -1.0}, "instance_weight must be a finite number >= 0, got -1.0"),
        ({"class_weight": -2.0}, "class_weight must be a finite number >= 0, got -2.0"),
        ({"correlation_weight": -3.0}, "correlation_weight must be .* got -3.0"),
        ({"correlation": "row"}, "correlation must be one of 'class', .* got 'row'"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        clkd_loss(Z, Z, **options)
    with pytest.raises(ValueError, match=says):
        CLKDLoss(**options)
