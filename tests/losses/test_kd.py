"""KD against a loop over the equation, gradcheck, the properties that define it, and the mistakes people make."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.ce import ce_loss
from pcdistill.losses.kd import KDLoss, kd_loss
from tests.helpers import GRAD, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.kd import kd


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_value(
        lambda s, t, y: kd_loss(s, t, y, temperature=temperature, reduction="none"),
        lambda s, t, y: kd(s, t, temperature),
        n,
        c,
        dtype,
    )


@pytest.mark.parametrize("dtype", GRAD, ids=str)
def test_gradient_matches_closed_form(dtype):
    student, teacher = make_pair(7, 100, dtype)
    kd_loss(student, teacher, temperature=4.0).backward()
    q, p = (student.detach().double() / 4).softmax(1), (teacher.double() / 4).softmax(1)
    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(student.grad.double(), 4.0 * (q - p) / 7, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.457956), (2.0, 0.651232), (4.0, 0.759671)])
def test_golden_values(temperature, expected):
    student, teacher, target = golden_pair()
    assert kd_loss(student, teacher, target, temperature=temperature).item() == pytest.approx(expected, abs=6e-7)


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = make_pair(8, 100, torch.float64)
    target = torch.arange(8)
    peer = mid_level.KDLoss("s", "out", "t", "out", temperature=4.0, alpha=0.1)
    theirs = peer({"s": {"out": student}}, {"t": {"out": teacher}}, target)
    ours = 0.1 * ce_loss(student, None, target) + 0.9 * kd_loss(student, teacher)
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: kd_loss(s, t, y, temperature=2.0))


@given(logit_pairs())
def test_never_negative_and_zero_at_equality(pair):
    student, teacher = pair
    assert kd_loss(student, teacher, reduction="none").ge(-1e-12).all()
    assert kd_loss(teacher, teacher, reduction="none").abs().le(1e-12).all()


@given(logit_pairs())
def test_a_shift_per_sample_and_an_order_of_classes_change_nothing(pair):
    student, teacher = pair
    expected = kd_loss(student, teacher, reduction="none")
    shifted = kd_loss(student + torch.arange(len(student))[:, None], teacher - 7.0, reduction="none")
    order = torch.arange(student.shape[1] - 1, -1, -1)
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        kd_loss(student[:, order], teacher[:, order], reduction="none"), expected, rtol=1e-9, atol=1e-9
    )


def test_reductions_and_module_agree():
    checks.check_reductions(kd_loss)
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(KDLoss()(student, teacher), kd_loss(student, teacher))
    options = {"temperature": 2.0, "reduction": "sum"}
    torch.testing.assert_close(KDLoss(**options)(student, teacher), kd_loss(student, teacher, **options))


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(kd_loss, dtype, c)


def test_empty_batch_autocast_and_constant_teacher():
    checks.check_batch(kd_loss)
    checks.check_reads_no_value(kd_loss)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        kd_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"temperature": -1.0}, "temperature.*-1.0"),
        ({"reduction": "avg"}, "'avg'"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        kd_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        KDLoss(**options)
