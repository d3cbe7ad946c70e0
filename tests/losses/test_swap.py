"""Label swap against a loop that exchanges two numbers, the golden value, and KD where the teacher is right."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.swap import SwapLoss, swap_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import swap as references


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_value(
        lambda s, t, y: swap_loss(s, t, y, temperature=temperature, reduction="none"),
        lambda s, t, y: references.swap(s, t, y, temperature),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@checks.SIZES
def test_gradient_matches_closed_form(dtype, n, c):
    checks.check_gradient(lambda s, t, y: swap_loss(s, t, y, reduction="none"), references.swap_gradient, n, c, dtype)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: swap_loss(s, t, y, temperature=2.0))


def test_golden_value():
    student, teacher, target = golden_pair()
    assert float(swap_loss(student, teacher, target)) == pytest.approx(1.140575, abs=1e-6)


def test_two_logits_change_places_and_no_other():
    teacher = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    put_right = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    student = torch.tensor([[0.5, 0.1, -0.3, 2.0]])
    torch.testing.assert_close(swap_loss(student, teacher, torch.tensor([3])), kd_loss(student, put_right))


def test_where_the_teacher_is_right_it_is_kd():
    student, teacher, _ = checks.random_input(6, 10, torch.float64)
    actual = swap_loss(student, teacher, teacher.argmax(dim=1), reduction="none")
    torch.testing.assert_close(actual, kd_loss(student, teacher, reduction="none"))


def test_a_tie_at_the_top_counts_as_right():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[4.0, 1.0, 4.0]])
    for label in (0, 2):
        torch.testing.assert_close(swap_loss(student, teacher, torch.tensor([label])), kd_loss(student, teacher))


@given(logit_pairs())
def test_never_negative_zero_at_the_corrected_teacher_and_blind_to_a_shift(pair):
    student, teacher = pair
    target = torch.arange(len(teacher)) % teacher.shape[1]
    value = swap_loss(student, teacher, target, reduction="none")
    assert value.ge(-1e-10).all()
    rows = [references.swapped(z, y) for z, y in zip(teacher.tolist(), target.tolist(), strict=True)]
    goal = torch.tensor(rows, dtype=torch.float64)
    assert swap_loss(goal, teacher, target, reduction="none").abs().le(1e-10).all()
    shifted = swap_loss(student + torch.arange(len(student))[:, None], teacher, target, reduction="none")
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-9)


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(swap_loss, dtype, c)


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(swap_loss)
    checks.check_batch(swap_loss)
    checks.check_reads_no_value(swap_loss)


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    module = SwapLoss(temperature=2.0, reduction="sum")
    expected = swap_loss(student, teacher, target, temperature=2.0, reduction="sum")
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        SwapLoss()(student, teacher, target), swap_loss(student, teacher, target), rtol=0, atol=0
    )
    assert module.needs == Needs(labels=True, soft_labels=False)
    assert "temperature=2" in repr(module)


def test_agrees_with_torchdistill_given_the_corrected_teacher():
    # torchdistill has no label swap; after the exchange it is KD, which torchdistill has
    student, teacher, target = golden_pair()
    rows = [references.swapped(z, y) for z, y in zip(teacher.tolist(), target.tolist(), strict=True)]
    expected = checks.torchdistill_kd(student, torch.tensor(rows, dtype=torch.float64), 4.0)
    torch.testing.assert_close(swap_loss(student, teacher, target), expected, rtol=1e-5, atol=1e-5)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        swap_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.full((2, 10), 0.1))


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        swap_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        swap_loss(torch.zeros(2, 10), torch.zeros(2, 10), target)


@pytest.mark.parametrize(
    ("options", "says"), [({"temperature": 0.0}, "temperature.*0.0"), ({"reduction": "avg"}, "'avg'")], ids=str
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        swap_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        SwapLoss(**options)
