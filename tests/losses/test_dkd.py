"""DKD against a loop over its equations, its golden values, the identity it is built on, and common mistakes."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses._labels import split_target
from pcdistill.losses.base import Needs
from pcdistill.losses.dkd import DKDLoss, dkd_loss
from pcdistill.losses.kd import kd_loss
from tests.helpers import GRAD, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.dkd import dkd
from tests.references.scalars import gradient


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 0.0), 0.123122), ((0.0, 1.0), 0.731093)])
def test_golden_values_of_each_part(weights, expected):
    student, teacher, target = golden_pair()
    loss = dkd_loss(student, teacher, target, target_weight=weights[0], non_target_weight=weights[1])
    assert loss.item() == pytest.approx(expected, abs=6e-7)


def test_the_defaults_are_the_papers_for_cifar_100():
    student, teacher, target = golden_pair()
    assert dkd_loss(student, teacher, target).item() == pytest.approx(0.123122 + 8 * 0.731093, abs=5e-6)


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    options = {"temperature": temperature, "non_target_weight": 2.0, "reduction": "none"}
    checks.check_value(
        lambda s, t, y: dkd_loss(s, t, y, **options), lambda s, t, y: dkd(s, t, y, temperature, 1.0, 2.0), n, c, dtype
    )


@pytest.mark.parametrize("dtype", GRAD, ids=str)
def test_gradient_matches_loop(dtype):
    student, teacher = make_pair(4, 11, dtype)
    target = torch.tensor([0, 10, 3, 3])
    dkd_loss(student, teacher, target, target_weight=2.0, non_target_weight=3.0).backward()

    def loop(rows):
        return sum(dkd(rows, teacher.tolist(), target.tolist(), 4.0, 2.0, 3.0)) / 4

    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(student.grad.double(), gradient(loop, student), rtol=rtol, atol=atol)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: dkd_loss(s, t, y, temperature=2.0))


@given(logit_pairs())
def test_kd_is_the_target_part_plus_the_teachers_doubt_times_the_other_part(pair):
    student, teacher = pair
    target = torch.arange(len(student)) % student.shape[1]
    own = dkd_loss(student, teacher, target, non_target_weight=0.0, reduction="none")
    rest = dkd_loss(student, teacher, target, target_weight=0.0, non_target_weight=1.0, reduction="none")
    doubt = 1 - (teacher / 4).softmax(1)[torch.arange(len(target)), target]
    torch.testing.assert_close(own + doubt * rest, kd_loss(student, teacher, reduction="none"), rtol=1e-7, atol=1e-9)


@given(logit_pairs())
def test_never_negative_zero_at_equality_and_blind_to_shifts_and_class_order(pair):
    student, teacher = pair
    n, c = student.shape
    target = torch.arange(n) % c
    expected = dkd_loss(student, teacher, target, reduction="none")
    assert expected.ge(-1e-12).all()
    assert dkd_loss(teacher, teacher, target, reduction="none").eq(0).all()
    shifted = dkd_loss(student + torch.arange(n)[:, None], teacher - 7.0, target, reduction="none")
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)
    flipped = dkd_loss(student.flip(1), teacher.flip(1), c - 1 - target, reduction="none")
    torch.testing.assert_close(flipped, expected, rtol=1e-9, atol=1e-9)


def test_two_classes_leave_the_target_part_which_is_kd():
    student, teacher = make_pair(6, 2, torch.float64)
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(dkd_loss(student, teacher, target), kd_loss(student, teacher))
    dkd_loss(student, teacher, target, target_weight=0.0).backward()
    assert student.grad.eq(0).all()


def test_the_target_class_is_left_out_exactly():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    own, others = split_target(logits, torch.tensor([0, 1, 2]))
    assert own.tolist() == [1.0, 5.0, 9.0]
    assert others.tolist() == [[2.0, 3.0], [4.0, 6.0], [7.0, 8.0]]
    # At this size an additive mask of -1000 would leave the target class on top of the others.
    student = torch.tensor([[1e4, 0.0, 0.0]])
    far = dkd_loss(student, torch.tensor([[1e4, 0.0, 1.0]]), torch.tensor([0]), temperature=1.0, target_weight=0.0)
    near = dkd_loss(student * 0, torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0]), temperature=1.0, target_weight=0.0)
    torch.testing.assert_close(far, near)
    assert near > 0


def test_reductions_and_module_agree():
    checks.check_reductions(dkd_loss)
    student, teacher, target = checks.random_input(6, 10, torch.float32)
    torch.testing.assert_close(DKDLoss()(student, teacher, target), dkd_loss(student, teacher, target))
    options = {"temperature": 2.0, "target_weight": 3.0, "non_target_weight": 0.5, "reduction": "sum"}
    expected = dkd_loss(student, teacher, target, **options)
    torch.testing.assert_close(DKDLoss(**options)(student, teacher, target), expected)


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(dkd_loss, dtype, c)


def test_empty_batch_autocast_and_constant_teacher():
    checks.check_batch(dkd_loss)
    checks.check_reads_no_value(dkd_loss)


Z = torch.zeros(2, 10)
Y = torch.tensor([0, 1])


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        dkd_loss(student, teacher, Y)


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        dkd_loss(Z, Z, target)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match=r"target must be hard labels \[2\] for this loss, got soft labels \[2, 10\]"):
        dkd_loss(Z, Z, Z)


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
        dkd_loss(Z, Z, Y, **options)
    with pytest.raises(ValueError, match=says):
        DKDLoss(**options)


def test_the_module_says_that_it_needs_hard_labels():
    assert DKDLoss.needs == Needs(labels=True, soft_labels=False)
