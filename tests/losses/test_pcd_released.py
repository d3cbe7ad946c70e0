"""The released variant of PCD: its golden value and closed form, and that it stays a stranger to the paper's."""

import math

import pytest
import torch

from pcdistill.losses.pcd_released import PCDReleasedLoss, pcd_released_loss
from tests.helpers import golden_pair, make_pair
from tests.losses import logit_checks as checks
from tests.references import log_softmax
from tests.references.kd import kd


def test_golden_value():
    student, teacher, target = golden_pair()
    assert pcd_released_loss(student, teacher, target).item() == pytest.approx(8.355066, abs=6e-7)


def loop(student, teacher, stages):
    kl = sum(kd(student, teacher, 2.0)) / len(student)  # times T^2
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        log_q, p = log_softmax(z_s, 2.0), [math.exp(v) for v in log_softmax(z_t, 2.0)]
        dot = sum(a * b for a, b in zip(p, log_q, strict=True))
        cosine = dot / (sum(a * a for a in p) * sum(b * b for b in log_q)) ** 0.5
        values.append(2 * stages * kl * (1 - cosine))
    return values


@checks.DTYPES
@pytest.mark.parametrize(("n", "c", "stages"), [(1, 2, 1), (5, 12, 4)])
def test_value_matches_loop(dtype, n, c, stages):
    checks.check_value(
        lambda s, t, y: pcd_released_loss(s, t, y, temperature=2.0, stages=stages, reduction="none"),
        lambda s, t, y: loop(s, t, stages),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(pcd_released_loss)


def test_reductions_and_module_agree():
    checks.check_reductions(pcd_released_loss)
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(PCDReleasedLoss()(student, teacher), pcd_released_loss(student, teacher))
    options = {"temperature": 2.0, "stages": 2, "reduction": "sum"}
    expected = pcd_released_loss(student, teacher, **options)
    torch.testing.assert_close(PCDReleasedLoss(**options)(student, teacher), expected)


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(pcd_released_loss, dtype, c)


def test_empty_batch_autocast_and_constant_teacher():
    checks.check_batch(pcd_released_loss)
    checks.check_reads_no_value(pcd_released_loss)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        pcd_released_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"stages": 0}, "stages.*0"), ({"temperature": 0.0}, "temperature.*0.0"), ({"reduction": "avg"}, "'avg'")],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        pcd_released_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        PCDReleasedLoss(**options)
