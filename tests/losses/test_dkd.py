"""DKD against a loop over its equations, its golden values, the identity it is built on, and common mistakes."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.dkd import DKDLoss, dkd_loss, split_target
from pcdistill.losses.kd import kd_loss
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, logit_pairs, make_pair
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


@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 100), (2, 1003)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    student, teacher = make_pair(n, c, dtype)
    target = torch.arange(n) * 5 % c
    expected = dkd(student.tolist(), teacher.tolist(), target.tolist(), temperature, 1.0, 2.0)
    actual = dkd_loss(student, teacher, target, temperature=temperature, non_target_weight=2.0, reduction="none")
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


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
    student, teacher = make_pair(3, 5, torch.float64)
    target = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, teacher, target, temperature=2.0), student)


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


def test_reductions_module_and_empty_batch_agree():
    student, teacher = make_pair(6, 10, torch.float32)
    target = torch.arange(6)
    per_sample = dkd_loss(student, teacher, target, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(DKDLoss()(student, teacher, target), per_sample.mean())
    options = {"temperature": 2.0, "target_weight": 3.0, "non_target_weight": 0.5, "reduction": "sum"}
    torch.testing.assert_close(
        DKDLoss(**options)(student, teacher, target), dkd_loss(student, teacher, target, **options)
    )
    torch.testing.assert_close(dkd_loss(student, teacher, target, reduction="sum"), per_sample.sum())
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = dkd_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    student, teacher, target = extreme_pair(6, c, dtype)
    loss = dkd_loss(student, teacher, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher = make_pair(2, 4, torch.float32)
    teacher.requires_grad_()
    dkd_loss(student, teacher, torch.tensor([0, 1])).backward()
    assert teacher.grad is None


Z = torch.zeros(2, 10)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("student", "teacher", "target", "options", "error", "says"),
    [
        (Z, torch.zeros(2, 9), Y, {}, ValueError, r"\[2, 9\].*\[2, 10\]"),
        (Z, Z, None, {}, ValueError, "target must be given"),
        (Z, Z, Z, {}, ValueError, r"target must be hard labels \[2\] for this loss, got soft labels \[2, 10\]"),
        (Z, Z, torch.tensor([0, 1, 2]), {}, ValueError, r"target must be \[2\] class indices, got \[3\]"),
        (Z, Z, Y, {"temperature": 0.0}, ValueError, "temperature.*0.0"),
        (Z, Z, Y, {"target_weight": -1.0}, ValueError, "target_weight must be a finite number >= 0, got -1.0"),
        (Z, Z, Y, {"non_target_weight": -2.0}, ValueError, "non_target_weight must be .* got -2.0"),
        (Z, Z, Y, {"reduction": "avg"}, ValueError, "'avg'"),
        (Z.long(), Z.long(), Y, {}, TypeError, "int64"),
    ],
)
def test_bad_input_is_named(student, teacher, target, options, error, says):
    with pytest.raises(error, match=says):
        dkd_loss(student, teacher, target, **options)
    if options:
        with pytest.raises(error, match=says):
            DKDLoss(**options)


def test_the_module_says_that_it_needs_hard_labels():
    assert DKDLoss.needs == Needs(labels=True, soft_labels=False)
