"""EA-KD's weights against a loop over entropies, their golden value, their ends, and the wrapper around any loss."""

import math

import pytest
import torch
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.ce import CELoss
from pcdistill.losses.dist import DISTLoss
from pcdistill.losses.dkd import DKDLoss, dkd_loss
from pcdistill.losses.eakd import EAKDLoss, EntropyWeightedLoss, eakd_loss, entropy_weights
from pcdistill.losses.kd import KDLoss, kd_loss
from pcdistill.losses.ldrld import LDRLDLoss
from pcdistill.losses.lskd import LSKDLoss, StandardizedLoss, lskd_loss
from pcdistill.losses.nkd import NKDLoss
from pcdistill.losses.pcd import PCDLoss, pcd_loss
from pcdistill.losses.pld import PLDLoss
from pcdistill.losses.rld import RLDLoss
from pcdistill.losses.ttm import WTTMLoss
from tests.helpers import VALUE, extreme_pair, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references import eakd as references
from tests.references.kd import kd

PER_SAMPLE = [KDLoss, LSKDLoss, DKDLoss, NKDLoss, PCDLoss, LDRLDLoss, RLDLoss, WTTMLoss, PLDLoss]


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_weights_match_loop(dtype, n, c, temperature):
    student, teacher = make_pair(n, c, dtype)
    actual = entropy_weights(student, teacher, entropy_temperature=temperature)
    expected = references.weights(student.tolist(), teacher.tolist(), temperature)
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)
    assert not actual.requires_grad


@checks.DTYPES
@checks.SIZES
def test_value_matches_loop(dtype, n, c):
    def reference(student, teacher, _):
        weights = references.weights(student, teacher, 3.0)
        return [w * v for w, v in zip(weights, kd(student, teacher, 4.0), strict=True)]

    checks.check_value(lambda s, t, y: eakd_loss(s, t, y, reduction="none"), reference, n, c, dtype)


def test_golden_values():
    student, teacher, target = golden_pair()
    assert float(eakd_loss(student, teacher, target)) == pytest.approx(1.554643, abs=6e-7)
    released = eakd_loss(student, teacher, max_entropy=100.0)  # what the released code of KD divides by
    assert float(released) == pytest.approx(0.813391, abs=6e-7)


def test_torchs_entropy_agrees():
    # torchdistill has no EA-KD; torch has the entropy of a categorical distribution
    student, teacher = make_pair(6, 10, torch.float64)
    of_student, of_teacher = (torch.distributions.Categorical(logits=z / 2).entropy() for z in (student, teacher))
    expected = of_teacher * (1 + of_student / math.log(10)) / 2
    torch.testing.assert_close(entropy_weights(student, teacher, entropy_temperature=2.0), expected.detach())


def test_the_gradient_is_the_losses_times_the_weights_held_constant():
    student, teacher = make_pair(5, 8, torch.float64)
    (actual,) = torch.autograd.grad(eakd_loss(student, teacher), student)
    weights = entropy_weights(student, teacher)
    (expected,) = torch.autograd.grad((weights * kd_loss(student, teacher, reduction="none")).mean(), student)
    torch.testing.assert_close(actual, expected)


def test_gradcheck():
    # Numerical differences would see the weights move: they are taken from logits that stay.
    student, teacher, _ = checks.random_input(3, 9, torch.float64)
    weights = entropy_weights(student, teacher)

    def held(z):
        return (weights * kd_loss(z, teacher, reduction="none")).mean()

    assert torch.autograd.gradcheck(held, student)
    torch.testing.assert_close(held(student), eakd_loss(student, teacher))


@given(logit_pairs())
def test_weights_lie_between_nothing_and_the_largest_entropy_and_rise_with_either(pair):
    student, teacher = pair
    c = student.shape[1]
    weights = entropy_weights(student, teacher)
    assert weights.ge(-1e-12).all()
    assert weights.le(math.log(c) + 1e-12).all()
    flat = torch.zeros_like(student)
    assert (entropy_weights(flat, teacher) >= weights - 1e-12).all()
    assert (entropy_weights(student, flat) >= weights - 1e-12).all()
    torch.testing.assert_close(entropy_weights(flat, flat), torch.full_like(weights, math.log(c)))
    shifted = entropy_weights(student - 3.0, teacher + torch.arange(len(teacher))[:, None])
    torch.testing.assert_close(shifted, weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(entropy_weights(student.flip(1), teacher.flip(1)), weights, rtol=1e-9, atol=1e-9)


def test_a_sure_teacher_gives_no_weight_and_a_sure_student_half():
    sure, flat = torch.tensor([[1e4, 0.0, 0.0]]), torch.zeros(1, 3)
    assert entropy_weights(flat, sure) == 0
    torch.testing.assert_close(entropy_weights(sure, flat), torch.tensor([math.log(3) / 2]))


@pytest.mark.parametrize("loss_class", PER_SAMPLE)
def test_the_wrapper_weighs_every_loss_that_has_a_value_for_every_sample(loss_class):
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    weights = entropy_weights(student, teacher)
    per_sample = loss_class(reduction="none")(student, teacher, target)
    wrapped = EntropyWeightedLoss(loss_class())
    torch.testing.assert_close(wrapped(student, teacher, target), (weights * per_sample).mean())
    summed = EntropyWeightedLoss(loss_class(reduction="sum"))
    torch.testing.assert_close(summed(student, teacher, target), (weights * per_sample).sum())


def test_under_standardisation_the_weights_see_the_logits_as_they_are():
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    expected = (entropy_weights(student, teacher) * lskd_loss(student, teacher, reduction="none")).mean()
    wrapped = EntropyWeightedLoss(StandardizedLoss(KDLoss(temperature=2.0)))
    torch.testing.assert_close(wrapped(student, teacher, target), expected)
    torch.testing.assert_close(EntropyWeightedLoss(LSKDLoss())(student, teacher, target), expected)


def test_the_wrapper_passes_needs_temperature_and_progress_on():
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    wrapped = EntropyWeightedLoss(DKDLoss())
    assert wrapped.needs == Needs(labels=True, soft_labels=False)
    wrapped.temperature = 2.0
    expected = entropy_weights(student, teacher) * dkd_loss(student, teacher, target, temperature=2.0, reduction="none")
    torch.testing.assert_close(wrapped(student, teacher, target), expected.mean())
    staged = EntropyWeightedLoss(PCDLoss(schedule="progressive"))
    staged.set_progress(progress=0.0, epoch=0.0)
    early = staged(student, teacher)
    staged.set_progress(progress=0.5, epoch=5.0)
    assert staged(student, teacher) != early


def test_the_default_weights_of_pcd():
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    expected = (entropy_weights(student, teacher) * pcd_loss(student, teacher, target, reduction="none")).mean()
    torch.testing.assert_close(EntropyWeightedLoss(PCDLoss())(student, teacher, target), expected)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (DISTLoss(), "value for every sample, and DISTLoss has one for the batch"),
        (CELoss(), "CELoss does not look at the teacher"),
    ],
    ids=["batch", "labels"],
)
def test_losses_without_a_value_for_every_sample_or_a_teacher_are_refused(loss, says):
    with pytest.raises(ValueError, match=says):
        EntropyWeightedLoss(loss)


@checks.HALF
def test_loss_and_gradient_are_finite_in_half_precision(dtype):
    # At the usual temperature such a teacher is sure of everything, and its samples weigh nothing.
    checks.check_finite_in_half(lambda s, t, y: eakd_loss(s, t, y, entropy_temperature=1e4), dtype)
    student, teacher, target = extreme_pair(8, 10, dtype)
    loss = eakd_loss(student, teacher, target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(eakd_loss)
    checks.check_batch(eakd_loss)
    checks.check_batch(EntropyWeightedLoss(DKDLoss()))
    checks.check_reads_no_value(eakd_loss)
    checks.check_reads_no_value(EntropyWeightedLoss(DKDLoss()))


def test_module_equals_function_and_wrapper():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    expected = eakd_loss(student, teacher, target)
    torch.testing.assert_close(EAKDLoss()(student, teacher, target), expected, rtol=0, atol=0)
    torch.testing.assert_close(EntropyWeightedLoss(KDLoss())(student, teacher, target), expected, rtol=0, atol=0)
    options = {"temperature": 2.0, "entropy_temperature": 1.0, "max_entropy": 100.0, "reduction": "sum"}
    expected = eakd_loss(student, teacher, target, **options)
    torch.testing.assert_close(EAKDLoss(**options)(student, teacher, target), expected, rtol=0, atol=0)
    assert EAKDLoss().needs == Needs()
    assert "entropy_temperature=3" in repr(EAKDLoss())


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        eakd_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"entropy_temperature": 0.0}, "^entropy_temperature.*0.0"),
        ({"max_entropy": -1.0}, "^max_entropy.*-1"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_module_and_wrapper(options, says):
    for build in (
        lambda: entropy_weights(torch.zeros(2, 10), torch.zeros(2, 10), **options),
        lambda: eakd_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options),
        lambda: EAKDLoss(**options),
        lambda: EntropyWeightedLoss(KDLoss(), **options),
    ):
        with pytest.raises(ValueError, match=says):
            build()
    with pytest.raises(ValueError, match="^temperature.*0.0"):
        EAKDLoss(temperature=0.0)
    with pytest.raises(ValueError, match="'avg'"):
        eakd_loss(torch.zeros(2, 10), torch.zeros(2, 10), reduction="avg")
