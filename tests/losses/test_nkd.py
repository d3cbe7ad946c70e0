"""NKD against a loop over its equations, its golden values, its minimum, and the mistakes people make."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.nkd import NKDLoss, nkd_loss
from tests.helpers import GRAD, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.nkd import nkd
from tests.references.scalars import gradient


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3.155611), ({"non_target_weight": 0.0}, 0.318940), ({"target_weight": 0.0}, 2.836672)],
)
def test_golden_values(options, expected):
    student, teacher, target = golden_pair()
    assert nkd_loss(student, teacher, target, **options).item() == pytest.approx(expected, abs=6e-7)


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_matches_loop(dtype, n, c, temperature):
    options = {"temperature": temperature, "target_weight": 2.0, "non_target_weight": 3.5, "reduction": "none"}
    checks.check_value(
        lambda s, t, y: nkd_loss(s, t, y, **options), lambda s, t, y: nkd(s, t, y, temperature, 2.0, 3.5), n, c, dtype
    )


@pytest.mark.parametrize("dtype", GRAD, ids=str)
def test_gradient_matches_loop(dtype):
    student, teacher = make_pair(4, 11, dtype)
    target = torch.tensor([0, 10, 3, 3])
    nkd_loss(student, teacher, target, temperature=3.0).backward()

    def loop(rows):
        return sum(nkd(rows, teacher.tolist(), target.tolist(), 3.0, 1.0, 1.5)) / 4

    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(student.grad.double(), gradient(loop, student), rtol=rtol, atol=atol)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: nkd_loss(s, t, y, temperature=2.0))


@given(logit_pairs())
def test_the_non_target_part_is_least_at_equality_and_blind_to_the_target_logit(pair):
    student, teacher = pair
    n, c = student.shape
    target = torch.arange(n) % c
    options = {"target_weight": 0.0, "non_target_weight": 1.0, "reduction": "none"}
    expected = nkd_loss(student, teacher, target, **options)
    assert (expected - nkd_loss(teacher, teacher, target, **options)).ge(-1e-9).all()
    moved = student.clone()
    moved[torch.arange(n), target] += 3.0
    torch.testing.assert_close(nkd_loss(moved, teacher, target, **options), expected)


@given(logit_pairs())
def test_a_shift_per_sample_and_an_order_of_classes_change_nothing(pair):
    student, teacher = pair
    n, c = student.shape
    target = torch.arange(n) % c
    expected = nkd_loss(student, teacher, target, reduction="none")
    shifted = nkd_loss(student + torch.arange(n)[:, None], teacher - 7.0, target, reduction="none")
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)
    flipped = nkd_loss(student.flip(1), teacher.flip(1), c - 1 - target, reduction="none")
    torch.testing.assert_close(flipped, expected, rtol=1e-9, atol=1e-9)


def test_a_teacher_sure_of_the_label_makes_the_target_part_cross_entropy():
    student, _ = make_pair(4, 6, torch.float64)
    target = torch.tensor([0, 1, 5, 3])
    teacher = torch.nn.functional.one_hot(target, 6) * 1e3
    actual = nkd_loss(student, teacher.double(), target, non_target_weight=0.0)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(student, target))


def test_two_classes_leave_the_target_part():
    student, teacher = make_pair(3, 2, torch.float64)
    target = torch.tensor([0, 1, 1])
    torch.testing.assert_close(
        nkd_loss(student, teacher, target), nkd_loss(student, teacher, target, non_target_weight=0.0)
    )
    nkd_loss(student, teacher, target, target_weight=0.0).backward()
    assert student.grad.eq(0).all()


def test_reductions_and_module_agree():
    checks.check_reductions(nkd_loss)
    student, teacher, target = checks.random_input(6, 10, torch.float32)
    torch.testing.assert_close(NKDLoss()(student, teacher, target), nkd_loss(student, teacher, target))
    options = {"temperature": 3.0, "target_weight": 0.5, "non_target_weight": 3.5, "reduction": "sum"}
    expected = nkd_loss(student, teacher, target, **options)
    torch.testing.assert_close(NKDLoss(**options)(student, teacher, target), expected)


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(nkd_loss, dtype, c)


def test_empty_batch_autocast_and_constant_teacher():
    checks.check_batch(nkd_loss)
    checks.check_reads_no_value(nkd_loss)


Z = torch.zeros(2, 10)
Y = torch.tensor([0, 1])


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        nkd_loss(student, teacher, Y)


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        nkd_loss(Z, Z, target)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match=r"target must be hard labels \[2\] for this loss, got soft labels \[2, 10\]"):
        nkd_loss(Z, Z, Z)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"target_weight": -1.0}, "target_weight must be a finite number >= 0, got -1.0"),
        ({"non_target_weight": -2.0}, "non_target_weight must be .* got -2.0"),
        ({"reduction": "avg"}, "'avg'"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        nkd_loss(Z, Z, Y, **options)
    with pytest.raises(ValueError, match=says):
        NKDLoss(**options)


def test_the_module_says_that_it_needs_hard_labels():
    assert NKDLoss.needs == Needs(labels=True, soft_labels=False)
