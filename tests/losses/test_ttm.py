"""TTM and WTTM against loops over powers of probabilities, the golden values, and KD with one-sided temperature."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from pcdistill.losses.kd import kd_loss
from pcdistill.losses.ttm import TTMLoss, WTTMLoss, ttm_loss, wttm_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import ttm as references

BOTH = pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
POWERS = pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0])


@BOTH
@checks.DTYPES
@checks.SIZES
@POWERS
def test_value_matches_loop(loss, dtype, n, c, power):
    checks.check_value(
        lambda s, t, y: loss(s, t, y, power=power, reduction="none"),
        lambda s, t, _: references.ttm(s, t, power, weighted=loss is wttm_loss),
        n,
        c,
        dtype,
    )


@BOTH
@checks.GRAD_DTYPES
@checks.SIZES
def test_gradient_matches_closed_form(loss, dtype, n, c):
    checks.check_gradient(
        lambda s, t, y: loss(s, t, y, power=0.3, reduction="none"),
        lambda s, t, _: references.ttm_gradient(s, t, 0.3, weighted=loss is wttm_loss),
        n,
        c,
        dtype,
    )


@BOTH
def test_gradcheck(loss):
    checks.check_gradcheck(lambda s, t, y: loss(s, t, y, power=0.3))


def test_golden_values():
    student, teacher, _ = golden_pair()
    assert float(ttm_loss(student, teacher, power=0.1)) == pytest.approx(0.619105, abs=1e-6)
    assert float(wttm_loss(student, teacher, power=0.1)) == pytest.approx(4.308826, abs=1e-6)


def test_the_power_is_a_temperature_on_the_teacher_alone():
    student, teacher, _ = golden_pair()
    tempered = (teacher / 10).softmax(dim=1)
    expected = F.kl_div(student.log_softmax(dim=1), tempered, reduction="batchmean")
    torch.testing.assert_close(ttm_loss(student, teacher, power=0.1), expected)


@BOTH
def test_power_one_is_kd_at_temperature_one(loss):
    student, teacher, _ = golden_pair()
    torch.testing.assert_close(loss(student, teacher, power=1.0), kd_loss(student, teacher, temperature=1.0))


def test_wttm_weighs_unsure_teachers_more():
    c, power = 10, 0.2
    student = torch.arange(10.0).repeat(2, 1)
    teacher = torch.zeros(2, c)
    teacher[1, 0] = 1e3
    ratio = wttm_loss(student, teacher, power=power, reduction="none") / ttm_loss(
        student, teacher, power=power, reduction="none"
    )
    torch.testing.assert_close(ratio, torch.tensor([c ** (1 - power), 1.0]))


@BOTH
@given(pair=logit_pairs())
def test_never_negative_zero_at_its_goal_and_blind_to_a_shift(loss, pair):
    student, teacher = pair
    value = loss(student, teacher, reduction="none", power=0.3)
    assert value.ge(-1e-11).all()
    assert loss(0.3 * teacher, teacher, reduction="none", power=0.3).abs().le(1e-11).all()
    shifted = loss(student + torch.arange(len(student))[:, None], teacher - 7.0, reduction="none", power=0.3)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-9)
    order = torch.arange(student.shape[1] - 1, -1, -1)
    torch.testing.assert_close(loss(student[:, order], teacher[:, order], reduction="none", power=0.3), value)


@BOTH
@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(loss, dtype, c):
    checks.check_finite_in_half(loss, dtype, c)


@BOTH
def test_reductions_empty_batch_and_constant_teacher(loss):
    checks.check_reductions(loss)
    checks.check_batch(loss)
    checks.check_reads_no_value(loss)


@pytest.mark.parametrize(("module", "loss"), [(TTMLoss, ttm_loss), (WTTMLoss, wttm_loss)])
def test_module_equals_function(module, loss):
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(module()(student, teacher, target), loss(student, teacher), rtol=0, atol=0)
    other = module(power=0.7, reduction="sum")
    expected = loss(student, teacher, power=0.7, reduction="sum")
    torch.testing.assert_close(other(student, teacher), expected, rtol=0, atol=0)
    assert "power=0.7" in repr(other)


@BOTH
def test_soft_labels_change_nothing(loss):
    student, teacher, _ = checks.random_input(4, 10, torch.float64)
    assert torch.equal(loss(student, teacher, torch.full((4, 10), 0.1)), loss(student, teacher))


def test_agrees_with_torchdistill_at_power_one():
    # torchdistill has no TTM; at power 1 it is KD at temperature 1, which torchdistill has
    student, teacher, _ = golden_pair()
    expected = checks.torchdistill_kd(student, teacher, temperature=1.0)
    torch.testing.assert_close(ttm_loss(student, teacher, power=1.0), expected, rtol=1e-5, atol=1e-5)


@BOTH
@checks.BAD_LOGITS
def test_bad_logits_are_named(loss, student, teacher, error, says):
    with pytest.raises(error, match=says):
        loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"), [({"power": 0.0}, "power.*0.0"), ({"power": -1.0}, "power"), ({"reduction": "avg"}, "'avg'")]
)
@pytest.mark.parametrize(("module", "loss"), [(TTMLoss, ttm_loss), (WTTMLoss, wttm_loss)])
def test_bad_options_are_named_by_function_and_module(module, loss, options, says):
    with pytest.raises(ValueError, match=says):
        loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        module(**options)


def test_the_default_powers_are_the_published_ones():
    student, teacher, _ = golden_pair()
    torch.testing.assert_close(ttm_loss(student, teacher), ttm_loss(student, teacher, power=0.1))
    torch.testing.assert_close(wttm_loss(student, teacher), wttm_loss(student, teacher, power=0.2))
    assert (TTMLoss().power, WTTMLoss().power) == (0.1, 0.2)
