"""CTKD against loops, plain KD, the derivative by the temperature in closed form, and the curriculum."""

import math

import pytest
import torch
from hypothesis import given

from pcdistill.losses.ctkd import CTKDLoss, ctkd_loss
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.lskd import StandardizedLoss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import ctkd as references


def at(temperature: float):
    """The function as a loss of three tensors, with a fixed temperature of the logits' precision."""

    def loss(student, teacher, target, **options):
        tau = torch.tensor(temperature, dtype=torch.float64, device=student.device)
        return ctkd_loss(student, teacher, target, temperature=tau, **options)

    return loss


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 15.6])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_value(
        lambda s, t, y: at(temperature)(s, t, y, reduction="none"),
        lambda s, t, _: references.ctkd(s, t, temperature),
        n,
        c,
        dtype,
    )


@checks.DTYPES
def test_one_temperature_for_each_sample(dtype):
    each = [1.0, 2.0, 4.0, 8.0, 16.0]
    checks.check_value(
        lambda s, t, y: ctkd_loss(s, t, y, temperature=torch.tensor(each), reduction="none"),
        lambda s, t, _: references.ctkd(s, t, each),
        5,
        10,
        dtype,
    )


@checks.GRAD_DTYPES
@checks.SIZES
def test_the_students_gradient_is_kds(dtype, n, c):
    checks.check_gradient(
        lambda s, t, y: at(4.0)(s, t, y, reduction="none"),
        lambda s, t, _: references.ctkd_gradient(s, t, 4.0),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(at(2.0))
    student, teacher, _ = checks.random_input(3, 5, torch.float64)
    tau = torch.tensor([1.5, 3.0, 7.0], dtype=torch.float64, requires_grad=True)

    def unturned(z, t):  # with reversal -1 the gradient is the true one, so that it can be checked by differences
        return ctkd_loss(z, teacher, temperature=t, reversal=-1.0)

    assert torch.autograd.gradcheck(unturned, (student, tau))


@pytest.mark.parametrize("reversal", [0.0, 0.3, 1.0])
def test_the_temperatures_gradient_is_turned_round(reversal):
    student, teacher, _ = golden_pair()
    module = CTKDLoss(initial_theta=0.4).double()
    module.reversal.fill_(reversal)
    module(student, teacher).backward()
    expected = references.theta_gradient(
        student.tolist(), teacher.tolist(), module.theta.item(), module.reversal.item()
    )
    assert float(module.theta.grad) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_step_of_descent_raises_the_loss_through_the_temperature():
    student, teacher, _ = golden_pair()
    module = CTKDLoss(min_temperature=1.0, max_temperature=5.0, initial_theta=0.0).double()
    before = module(student, teacher)
    before.backward()
    with torch.no_grad():
        module.theta -= 0.1 * module.theta.grad
    assert module(student, teacher) > before


def test_golden_values():
    student, teacher, _ = golden_pair()
    for temperature, expected in [(1.0, 0.457956), (2.0, 0.651232), (4.0, 0.759671)]:
        assert float(at(temperature)(student, teacher, None)) == pytest.approx(expected, abs=1e-6)


def test_the_temperature_starts_as_in_the_released_code():
    assert CTKDLoss().temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-6)  # 15.6
    assert CTKDLoss(initial_theta=-50.0).temperature.item() == pytest.approx(1.0)
    assert CTKDLoss(initial_theta=50.0, max_temperature=9.0).temperature.item() == pytest.approx(9.0)


@pytest.mark.parametrize("length", [10.0, 5.0])
def test_the_curriculum_rises_from_nothing_to_the_whole(length):
    module = CTKDLoss(curriculum_epochs=length)
    assert float(module.reversal) == 1.0  # whoever has no curriculum has the whole
    for epoch in (0.0, 0.25, 1.0, length / 2, length - 0.5, length, 3 * length):
        module.set_progress(progress=epoch / 240, epoch=epoch)
        assert float(module.reversal) == pytest.approx(references.reversal(epoch, length), abs=1e-7)
    module.set_progress(progress=0.0, epoch=0.0)
    assert float(module.reversal) == 0.0
    module.set_progress(progress=0.0, epoch=length / 2)
    assert float(module.reversal) == pytest.approx(0.5)
    flat = CTKDLoss(curriculum_epochs=0.0)
    flat.set_progress(progress=0.0, epoch=0.0)
    assert float(flat.reversal) == 1.0


def test_theta_alone_is_learned_and_saved():
    module = CTKDLoss()
    assert [name for name, _ in module.named_parameters()] == ["theta"]
    assert list(module.state_dict()) == ["theta"]


def test_it_runs_behind_standardisation_with_its_curriculum():
    wrapped = StandardizedLoss(CTKDLoss())
    wrapped.set_progress(progress=0.0, epoch=5.0)
    student, teacher, target = checks.random_input(4, 10, torch.float32)
    wrapped(student, teacher, target).backward()
    assert wrapped.loss.theta.grad.abs() > 0
    assert float(wrapped.loss.reversal) == pytest.approx(0.5)


@given(logit_pairs())
def test_never_negative_zero_at_equality_and_equal_to_kd(pair):
    student, teacher = pair
    value = at(3.0)(student, teacher, None, reduction="none")
    assert value.ge(-1e-11).all()
    torch.testing.assert_close(value, kd_loss(student, teacher, temperature=3.0, reduction="none"))
    assert at(3.0)(teacher, teacher, None, reduction="none").abs().le(1e-11).all()


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
@pytest.mark.parametrize("theta", [-20.0, 1.0, 20.0])
def test_loss_and_both_gradients_are_finite_in_half_precision(dtype, c, theta):
    module = CTKDLoss(initial_theta=theta)
    checks.check_finite_in_half(module, dtype, c)
    assert module.theta.grad.isfinite()


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(at(4.0))
    module = CTKDLoss()
    checks.check_batch(module)
    checks.check_reads_no_value(CTKDLoss().to("meta"))
    empty = CTKDLoss()
    empty(torch.zeros(0, 10), torch.zeros(0, 10)).backward()
    assert empty.theta.grad == 0


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    module = CTKDLoss(min_temperature=2.0, max_temperature=6.0, initial_theta=0.0, reduction="sum").double()
    expected = ctkd_loss(student, teacher, temperature=torch.tensor(4.0), reduction="sum")
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=1e-12, atol=1e-12)
    assert "max_temperature=6" in repr(module)


def test_soft_labels_change_nothing():
    student, teacher, _ = checks.random_input(4, 10, torch.float64)
    soft = torch.full((4, 10), 0.1)
    assert torch.equal(at(4.0)(student, teacher, soft), at(4.0)(student, teacher, None))


def test_agrees_with_torchdistill_at_a_fixed_temperature():
    # torchdistill has no learned temperature; at any fixed one CTKD is KD
    student, teacher, _ = golden_pair()
    expected = checks.torchdistill_kd(student, teacher, temperature=4.0)
    torch.testing.assert_close(at(4.0)(student, teacher, None), expected, rtol=1e-5, atol=1e-5)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        CTKDLoss()(student, teacher)


@pytest.mark.parametrize(
    ("temperature", "error", "says"),
    [
        (4.0, TypeError, "temperature must be a floating-point tensor, got float; .*kd_loss"),
        (torch.tensor(4), TypeError, "got torch.int64"),
        (torch.ones(3), ValueError, r"temperature must be \[\] or \[N\] = \[2\], got \[3\]"),
    ],
    ids=["number", "integer", "another N"],
)
def test_a_bad_temperature_is_named(temperature, error, says):
    with pytest.raises(error, match=says):
        ctkd_loss(torch.zeros(2, 10), torch.zeros(2, 10), temperature=temperature)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_temperature": 0.0}, "min_temperature.*0.0"),
        ({"max_temperature": float("inf")}, "max_temperature.*inf"),
        ({"max_temperature": 1.0}, "max_temperature must be above min_temperature = 1, got 1"),
        ({"initial_theta": float("nan")}, "initial_theta.*nan"),
        ({"curriculum_epochs": -1.0}, "curriculum_epochs.*-1"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        CTKDLoss(**options)


def test_after_the_curriculum_the_whole_reversal_stays():
    module = CTKDLoss(curriculum_epochs=4.0)
    for epoch in (4.0, 6.0, 8.0, 100.0):
        module.set_progress(progress=0.5, epoch=epoch)
        assert float(module.reversal) == 1.0


def test_the_function_reverses_the_whole_gradient_by_default():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    slopes = []
    for options in ({}, {"reversal": 1.0}):
        temperature = torch.tensor(2.0, requires_grad=True)
        loss = ctkd_loss(student, teacher, temperature=temperature, **options)
        slopes.append(torch.autograd.grad(loss, temperature)[0])
    torch.testing.assert_close(*slopes)
    assert slopes[0] != 0
