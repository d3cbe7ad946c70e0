"""RLD against loops over its two terms, the golden values, the empty set, and a teacher whose errors stay untaught."""

import math

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.rld import RLDLoss, rld_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import rld as references


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize(("temperature", "confidence_temperature"), [(4.0, 1.0), (1.0, 2.0)])
def test_value_matches_loop(dtype, n, c, temperature, confidence_temperature):
    options = {"temperature": temperature, "confidence_temperature": confidence_temperature}
    checks.check_value(
        lambda s, t, y: rld_loss(s, t, y, reduction="none", **options),
        lambda s, t, y: references.rld(s, t, y, t=temperature, tc=confidence_temperature),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@checks.SIZES
@pytest.mark.parametrize(("scd_weight", "mcd_weight"), [(1.0, 0.0), (0.0, 1.0), (1.0, 8.0)])
def test_gradient_matches_closed_form(dtype, n, c, scd_weight, mcd_weight):
    checks.check_gradient(
        lambda s, t, y: rld_loss(
            s, t, y, confidence_temperature=2.0, scd_weight=scd_weight, mcd_weight=mcd_weight, reduction="none"
        ),
        lambda s, t, y: references.rld_gradient(s, t, y, tc=2.0, scd_weight=scd_weight, mcd_weight=mcd_weight),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: rld_loss(s, t, y, temperature=2.0))


def test_golden_values():
    student, teacher, target = golden_pair()
    scd = rld_loss(student, teacher, target, mcd_weight=0.0)
    mcd = rld_loss(student, teacher, target, scd_weight=0.0, mcd_weight=1.0)
    assert float(scd) == pytest.approx(0.401968, abs=1e-6)
    assert float(mcd) == pytest.approx(0.434132, abs=1e-6)
    torch.testing.assert_close(rld_loss(student, teacher, target), scd + 8 * mcd)


def test_an_empty_set_gives_no_loss_and_no_gradient():
    student, teacher, _ = checks.random_input(4, 10, torch.float64)
    target = teacher.argmin(dim=1)
    value = rld_loss(student, teacher, target, scd_weight=0.0, reduction="none")
    value.sum().backward()
    assert value.eq(0).all()
    assert student.grad.eq(0).all()


def test_classes_as_high_as_the_true_one_are_left_out():
    student = torch.tensor([[5.0, -3.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0, 0.0, -1.0]])  # class 1 ties with the true class 0
    rld_loss(student, teacher, torch.tensor([0]), scd_weight=0.0).backward()
    assert student.grad[0, :2].eq(0).all()
    assert student.grad[0, 2:].ne(0).all()


def test_a_sure_and_wrong_teacher_asks_its_sureness_of_the_true_class():
    teacher = torch.tensor([[8.0, 0.0, -1.0, -2.0]])
    right = torch.tensor([[0.0, 8.0, -1.0, -2.0]])
    assert rld_loss(right, teacher, torch.tensor([1])) < 1e-2
    assert rld_loss(teacher, teacher, torch.tensor([1])) > 5


def test_with_two_classes_only_the_confidence_is_left():
    student, teacher, target = checks.random_input(6, 2, torch.float64)
    with_both = rld_loss(student, teacher, target, reduction="none")
    torch.testing.assert_close(with_both, rld_loss(student, teacher, target, mcd_weight=0.0, reduction="none"))
    correct = teacher.argmax(1) == target
    # where the teacher is right, the confidence term is KD between two classes
    kd = kd_loss(student, teacher, temperature=1.0, reduction="none")
    torch.testing.assert_close(with_both[correct], kd[correct])
    assert 0 < correct.sum() < 6


@given(logit_pairs())
def test_never_negative_zero_at_equality_and_blind_to_a_shift(pair):
    student, teacher = pair
    target = torch.arange(len(teacher)) % teacher.shape[1]
    value = rld_loss(student, teacher, target, reduction="none")
    assert value.ge(-1e-10).all()
    assert rld_loss(teacher, teacher, teacher.argmax(1), reduction="none").abs().le(1e-10).all()
    order = torch.arange(student.shape[1] - 1, -1, -1)
    torch.testing.assert_close(
        rld_loss(student[:, order], teacher[:, order], order[target], scd_weight=0.0, reduction="none"),
        rld_loss(student, teacher, target, scd_weight=0.0, reduction="none"),
    )
    shifted = rld_loss(student + torch.arange(len(student))[:, None], teacher, target, reduction="none")
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-9)


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(rld_loss, dtype, c)
    # the true class last for the teacher: nothing is below it
    checks.check_finite_in_half(lambda s, t, _: rld_loss(s, t, t.argmin(dim=1)), dtype, c)


def test_a_probability_that_rounds_to_one_keeps_its_distance():
    student, teacher = torch.tensor([[40.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    # 1 - q_y is exp(-40): written as 1 - q_y, float32 would make it 0 and the loss infinite
    p = 1 / (1 + math.exp(-1))
    expected = p * math.log(p) + (1 - p) * (math.log(1 - p) + 40)
    assert float(rld_loss(student, teacher, torch.tensor([0]))) == pytest.approx(expected, rel=1e-6)


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(rld_loss)
    checks.check_batch(rld_loss)
    checks.check_reads_no_value(rld_loss)


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(RLDLoss()(student, teacher, target), rld_loss(student, teacher, target), rtol=0, atol=0)
    options = {
        "temperature": 2.0,
        "confidence_temperature": 3.0,
        "scd_weight": 0.5,
        "mcd_weight": 2.0,
        "reduction": "sum",
    }
    module = RLDLoss(**options)
    expected = rld_loss(student, teacher, target, **options)
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)
    assert module.needs == Needs(labels=True, soft_labels=False)
    assert "mcd_weight=2" in repr(module)


def test_agrees_with_torchdistill_where_the_masked_set_is_all_other_classes():
    # torchdistill has no RLD; with a teacher that is right, MCD is KD on the other classes, which torchdistill has
    student, teacher, _ = golden_pair()
    target = teacher.argmax(dim=1)
    others = torch.ones_like(teacher, dtype=torch.bool).scatter(1, target[:, None], False)
    expected = checks.torchdistill_kd(student[others].view(4, 9), teacher[others].view(4, 9), temperature=4.0)
    actual = rld_loss(student, teacher, target, scd_weight=0.0, mcd_weight=1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        rld_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.full((2, 10), 0.1))


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        rld_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        rld_loss(torch.zeros(2, 10), torch.zeros(2, 10), target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "^temperature.*0.0"),
        ({"confidence_temperature": -1.0}, "^confidence_temperature.*-1"),
        ({"scd_weight": -1.0}, "scd_weight.*-1"),
        ({"mcd_weight": float("inf")}, "mcd_weight.*inf"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        rld_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        RLDLoss(**options)


def test_classes_left_out_stay_out_however_low_the_others_are():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.arange(6)
    torch.testing.assert_close(rld_loss(student - 5e3, teacher - 5e3, target), rld_loss(student, teacher, target))
