"""RC against loops over both of its teachers, the golden value, KD as a special case, and what the correction does."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.rc import RCLoss, rc_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import rc as references


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_value(
        lambda s, t, y: rc_loss(s, t, y, temperature=temperature, reduction="none"),
        lambda s, t, y: references.rc(s, t, y, temperature),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@checks.SIZES
@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.0, 1.0), (0.5, 2.0)])
def test_gradient_matches_closed_form(dtype, n, c, weights):
    checks.check_gradient(
        lambda s, t, y: rc_loss(s, t, y, teacher_weight=weights[0], self_weight=weights[1], reduction="none"),
        lambda s, t, y: references.rc_gradient(s, t, y, 4.0, *weights),
        n,
        c,
        dtype,
    )


def test_gradcheck_with_the_corrected_logits_held_still():
    # the correction is a constant of the student, which differences cannot see: check the teacher's part alone
    checks.check_gradcheck(lambda s, t, y: rc_loss(s, t, y, temperature=2.0, self_weight=0.0))


def test_golden_values():
    student, teacher, target = golden_pair()
    own = rc_loss(student, teacher, target, teacher_weight=0.0, self_weight=1.0)
    assert float(own) == pytest.approx(0.178459, abs=1e-6)
    assert float(rc_loss(student, teacher, target)) == pytest.approx(0.759671 + 0.1 * 0.178459, abs=2e-6)


def test_without_the_self_part_it_is_kd():
    student, teacher, target = golden_pair()
    torch.testing.assert_close(
        rc_loss(student, teacher, target, self_weight=0.0), kd_loss(student, teacher), rtol=1e-12, atol=1e-12
    )


def test_the_self_part_raises_the_true_class_alone():
    student = torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    rc_loss(student, torch.zeros(1, 3), torch.tensor([2]), teacher_weight=0.0, self_weight=1.0).backward()
    assert student.grad[0, 2] < 0
    assert student.grad[0, :2].gt(0).all()


def test_a_student_whose_largest_logit_is_zero_has_nothing_to_correct():
    student, teacher, target = checks.random_input(5, 8, torch.float64)
    student = student.detach() - student.detach().amax(dim=1, keepdim=True)
    own = rc_loss(student, teacher, target, teacher_weight=0.0, self_weight=1.0, reduction="none")
    assert own.abs().le(1e-12).all()


@given(logit_pairs())
def test_never_negative_and_blind_to_an_order_of_classes_and_to_the_teachers_shift(pair):
    student, teacher = pair
    target = torch.arange(len(teacher)) % teacher.shape[1]
    value = rc_loss(student, teacher, target, reduction="none")
    assert value.ge(-1e-10).all()
    order = torch.arange(student.shape[1] - 1, -1, -1)
    turned = rc_loss(student[:, order], teacher[:, order] - 7.0, order[target], reduction="none")
    torch.testing.assert_close(turned, value, rtol=1e-9, atol=1e-9)


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(rc_loss, dtype, c)


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(rc_loss)
    checks.check_batch(rc_loss)
    checks.check_reads_no_value(rc_loss)


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(RCLoss()(student, teacher, target), rc_loss(student, teacher, target), rtol=0, atol=0)
    options = {"temperature": 2.0, "teacher_weight": 0.5, "self_weight": 0.7, "reduction": "sum"}
    module = RCLoss(**options)
    expected = rc_loss(student, teacher, target, **options)
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)
    assert module.needs == Needs(labels=True, soft_labels=False)
    assert "self_weight=0.7" in repr(module)


def test_agrees_with_torchdistill_given_the_same_two_teachers():
    # torchdistill has no RC, but each of its two parts is a KD, which torchdistill has
    student, teacher, target = golden_pair()
    corrected = torch.tensor(
        [references.corrected(z, y) for z, y in zip(student.tolist(), target.tolist(), strict=True)],
        dtype=torch.float64,
    )
    expected = checks.torchdistill_kd(student, teacher, 4.0) + 0.1 * checks.torchdistill_kd(student, corrected, 4.0)
    torch.testing.assert_close(rc_loss(student, teacher, target), expected, rtol=1e-5, atol=1e-5)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        rc_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.full((2, 10), 0.1))


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        rc_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        rc_loss(torch.zeros(2, 10), torch.zeros(2, 10), target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"teacher_weight": -1.0}, "teacher_weight.*-1"),
        ({"self_weight": float("nan")}, "self_weight.*nan"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        rc_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        RCLoss(**options)
