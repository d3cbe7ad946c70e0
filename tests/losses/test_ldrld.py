"""LDRLD against loops over its groups, the golden values, and what its ranking must and must not see."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.kd import kd_loss
from pcdistill.losses.ldrld import LDRLDLoss, ldrld_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import ldrld as references

SIZES = pytest.mark.parametrize(("n", "c", "d"), [(1, 3, 2), (3, 8, 7), (7, 100, 7), (2, 1003, 5)])


@checks.DTYPES
@SIZES
@pytest.mark.parametrize("averaged", [True, False])
def test_value_matches_loop(dtype, n, c, d, averaged):
    checks.check_value(
        lambda s, t, y: ldrld_loss(s, t, y, top_classes=d, average_groups=averaged, reduction="none"),
        lambda s, t, _: references.ldrld(s, t, d=d, averaged=averaged),
        n,
        c,
        dtype,
    )


@checks.DTYPES
def test_value_matches_loop_for_other_options(dtype):
    options = {"local_weight": 2.0, "rest_weight": 0.5, "pair_scale": 3.0, "pair_offset": 0.7, "pair_decay": 0.2}
    checks.check_value(
        lambda s, t, y: ldrld_loss(s, t, y, temperature=1.5, top_classes=4, reduction="none", **options),
        lambda s, t, _: references.ldrld(s, t, t=1.5, d=4, local=2.0, rest=0.5, weights=(3.0, 0.7, 0.2)),
        5,
        12,
        dtype,
    )


@checks.GRAD_DTYPES
@SIZES
def test_gradient_matches_closed_form(dtype, n, c, d):
    checks.check_gradient(
        lambda s, t, y: ldrld_loss(s, t, y, top_classes=d, reduction="none"),
        lambda s, t, _: references.ldrld_gradient(s, t, d=d),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: ldrld_loss(s, t, y, temperature=2.0, top_classes=4))


def test_golden_values():
    student, teacher, _ = golden_pair()
    local = ldrld_loss(student, teacher, local_weight=1.0, rest_weight=0.0)
    rest = ldrld_loss(student, teacher, local_weight=0.0, rest_weight=1.0)
    assert float(local) == pytest.approx(0.166863, abs=1e-6)
    assert float(rest) == pytest.approx(0.062078, abs=1e-6)
    whole = ldrld_loss(student, teacher)
    assert float(whole) == pytest.approx(10.5 * float(local) + 7.0 * float(rest), rel=1e-12)
    weights = [references.pair_weight(i, j) for i in range(1, 8) for j in range(i + 1, 8)]
    assert sum(weights) == pytest.approx(7.723674, abs=1e-6)
    assert len(weights) == 21


def test_the_plain_sum_is_the_number_of_groups_times_the_average():
    student, teacher, _ = golden_pair()
    averaged = ldrld_loss(student, teacher, rest_weight=0.0)
    summed = ldrld_loss(student, teacher, rest_weight=0.0, average_groups=False)
    torch.testing.assert_close(summed, 22 * averaged)


def test_without_pairs_and_with_one_class_left_out_it_is_kd_on_the_other_classes():
    student, teacher, _ = golden_pair()
    actual = ldrld_loss(student, teacher, top_classes=9, pair_scale=0.0, local_weight=1.0, average_groups=False)
    order = student.argsort(dim=1, descending=True)[:, :9]
    torch.testing.assert_close(actual, kd_loss(student.gather(1, order), teacher.gather(1, order)))


def test_the_students_order_decides_not_the_teachers():
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, 5.0, 9.0]])  # differs from the student's best two only outside of them
    student[0, 1] = 3.0
    assert ldrld_loss(student, teacher, top_classes=2, rest_weight=0.0) == 0
    assert ldrld_loss(teacher, student, top_classes=2, rest_weight=0.0) > 0


def test_equal_logits_are_ranked_by_class_index():
    student = torch.zeros(1, 6)
    teacher = torch.tensor([[4.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    # ranks 1 and 2 are the classes 0 and 1, so that the rest, classes 2..5, agrees
    assert ldrld_loss(student, teacher, top_classes=2, local_weight=0.0) == 0
    assert ldrld_loss(student, teacher.flip(1), top_classes=2, local_weight=0.0) > 0


@given(logit_pairs(max_c=12))
def test_never_negative_zero_at_equality_and_blind_to_a_shift(pair):
    student, teacher = pair
    if student.shape[1] < 3:
        return
    value = ldrld_loss(student, teacher, top_classes=2, reduction="none")
    assert value.ge(-1e-10).all()
    assert ldrld_loss(student, student, top_classes=2, reduction="none").abs().le(1e-10).all()
    shifted = ldrld_loss(student, teacher - 7.0, top_classes=2, reduction="none")
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-9)


def test_an_order_of_classes_changes_nothing():
    student, teacher, _ = checks.random_input(5, 20, torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ldrld_loss(student[:, order], teacher[:, order]), ldrld_loss(student, teacher))


@checks.HALF
@pytest.mark.parametrize(("c", "d"), [(3, 2), (10, 7)])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c, d):
    checks.check_finite_in_half(lambda s, t, y: ldrld_loss(s, t, y, top_classes=d), dtype, c)


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(ldrld_loss)
    checks.check_batch(ldrld_loss)
    checks.check_reads_no_value(ldrld_loss)


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(LDRLDLoss()(student, teacher, target), ldrld_loss(student, teacher))
    options = {
        "temperature": 2.0,
        "top_classes": 4,
        "local_weight": 3.0,
        "rest_weight": 0.3,
        "pair_scale": 1.2,
        "pair_offset": 0.4,
        "pair_decay": 0.1,
        "average_groups": False,
        "reduction": "sum",
    }
    module = LDRLDLoss(**options)
    torch.testing.assert_close(module(student, teacher), ldrld_loss(student, teacher, **options))
    assert "top_classes=4" in repr(module)


def test_soft_labels_change_nothing():
    student, teacher, _ = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(
        ldrld_loss(student, teacher, torch.full((4, 10), 0.1)), ldrld_loss(student, teacher), rtol=0, atol=0
    )


def test_agrees_with_torchdistill_on_the_rest():
    # torchdistill has no LDRLD, but its last part is a KD on the classes that are not among the best
    student, teacher, _ = golden_pair()
    rest = student.argsort(dim=1, descending=True)[:, 7:]
    expected = checks.torchdistill_kd(student.gather(1, rest), teacher.gather(1, rest), temperature=4.0)
    actual = ldrld_loss(student, teacher, local_weight=0.0, rest_weight=1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        ldrld_loss(student, teacher)


def test_too_many_top_classes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="at most C - 1 = 6, got 7; set a smaller one"):
        ldrld_loss(torch.zeros(2, 7), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="at most C - 1 = 1, got 2; LDRLD needs at least three classes"):
        ldrld_loss(torch.zeros(2, 2), torch.zeros(2, 2), top_classes=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"top_classes": 1}, "top_classes must be a whole number >= 2, got 1"),
        ({"top_classes": 2.5}, "top_classes.*2.5"),
        ({"local_weight": -1.0}, "local_weight.*-1"),
        ({"rest_weight": float("nan")}, "rest_weight.*nan"),
        ({"pair_scale": -1.0}, "pair_scale"),
        ({"pair_offset": 0.0}, "pair_offset"),
        ({"pair_decay": -0.1}, "pair_decay"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        ldrld_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        LDRLDLoss(**options)


def test_d_is_cut_to_few_classes_where_nobody_set_it():
    assert LDRLDLoss().top_classes == LDRLDLoss(num_classes=100).top_classes == 7
    few = LDRLDLoss(num_classes=4)
    assert (few.top_classes, few.note) == (3, "d is 3, not 7: logits of 4 classes allow no more")
    assert LDRLDLoss(num_classes=4, top_classes=7).top_classes == 7  # what was asked for is refused on such logits
