"""NKD against a loop over its equations, its golden values, its minimum, and the mistakes people make."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.nkd import NKDLoss, nkd_loss
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, logit_pairs, make_pair
from tests.references.nkd import nkd
from tests.references.scalars import gradient


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3.155611), ({"non_target_weight": 0.0}, 0.318940), ({"target_weight": 0.0}, 2.836672)],
)
def test_golden_values(options, expected):
    student, teacher, target = golden_pair()
    assert nkd_loss(student, teacher, target, **options).item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 100), (2, 1003)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_matches_loop(dtype, n, c, temperature):
    student, teacher = make_pair(n, c, dtype)
    target = torch.arange(n) * 5 % c
    expected = nkd(student.tolist(), teacher.tolist(), target.tolist(), temperature, 2.0, 3.5)
    options = {"temperature": temperature, "target_weight": 2.0, "non_target_weight": 3.5}
    actual = nkd_loss(student, teacher, target, reduction="none", **options)
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


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
    student, teacher = make_pair(3, 5, torch.float64)
    target = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: nkd_loss(z, teacher, target, temperature=2.0), student)


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


def test_reductions_module_and_empty_batch_agree():
    student, teacher = make_pair(6, 10, torch.float32)
    target = torch.arange(6)
    per_sample = nkd_loss(student, teacher, target, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(NKDLoss()(student, teacher, target), per_sample.mean())
    options = {"temperature": 3.0, "target_weight": 0.5, "non_target_weight": 3.5, "reduction": "sum"}
    torch.testing.assert_close(
        NKDLoss(**options)(student, teacher, target), nkd_loss(student, teacher, target, **options)
    )
    torch.testing.assert_close(nkd_loss(student, teacher, target, reduction="sum"), per_sample.sum())
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = nkd_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    student, teacher, target = extreme_pair(6, c, dtype)
    loss = nkd_loss(student, teacher, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher = make_pair(2, 4, torch.float32)
    teacher.requires_grad_()
    nkd_loss(student, teacher, torch.tensor([0, 1])).backward()
    assert teacher.grad is None


Z = torch.zeros(2, 10)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("student", "teacher", "target", "options", "error", "says"),
    [
        (Z, torch.zeros(2, 9), Y, {}, ValueError, r"\[2, 9\].*\[2, 10\]"),
        (Z, Z, None, {}, ValueError, "target must be given"),
        (Z, Z, Z, {}, ValueError, r"target must be hard labels \[2\] for this loss, got soft labels \[2, 10\]"),
        (Z, Z, Y, {"temperature": 0.0}, ValueError, "temperature.*0.0"),
        (Z, Z, Y, {"target_weight": -1.0}, ValueError, "target_weight must be a finite number >= 0, got -1.0"),
        (Z, Z, Y, {"non_target_weight": -2.0}, ValueError, "non_target_weight must be .* got -2.0"),
        (Z, Z, Y, {"reduction": "avg"}, ValueError, "'avg'"),
        (Z.long(), Z.long(), Y, {}, TypeError, "int64"),
    ],
)
def test_bad_input_is_named(student, teacher, target, options, error, says):
    with pytest.raises(error, match=says):
        nkd_loss(student, teacher, target, **options)
    if options:
        with pytest.raises(error, match=says):
            NKDLoss(**options)


def test_the_module_says_that_it_needs_hard_labels():
    assert NKDLoss.needs == Needs(labels=True, soft_labels=False)
