"""The released variant of PCD: its golden value and closed form, and that it stays a stranger to the paper's."""

import pytest
import torch

from pcdistill.losses.pcd_released import PCDReleasedLoss, pcd_released_loss
from tests.helpers import extreme_pair, golden_pair, make_pair
from tests.references import log_softmax
from tests.references.kd import kd


def test_golden_value():
    student, teacher, target = golden_pair()
    assert pcd_released_loss(student, teacher, target).item() == pytest.approx(8.355066, abs=6e-7)


@pytest.mark.parametrize(("n", "c", "stages"), [(1, 2, 1), (5, 12, 4)])
def test_value_matches_loop(n, c, stages):
    student, teacher = make_pair(n, c, torch.float64)
    kl = sum(kd(student.tolist(), teacher.tolist(), 2.0)) / n  # times T^2
    expected = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        log_q, p = log_softmax(z_s, 2.0), torch.tensor(log_softmax(z_t, 2.0), dtype=torch.float64).exp().tolist()
        dot = sum(a * b for a, b in zip(p, log_q, strict=True))
        cosine = dot / (sum(a * a for a in p) * sum(b * b for b in log_q)) ** 0.5
        expected.append(2 * stages * kl * (1 - cosine))
    actual = pcd_released_loss(student, teacher, temperature=2.0, stages=stages, reduction="none")
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_gradcheck():
    student, teacher = make_pair(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda z: pcd_released_loss(z, teacher), student)


def test_reductions_module_and_empty_batch_agree():
    student, teacher = make_pair(6, 10, torch.float32)
    per_sample = pcd_released_loss(student, teacher, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(PCDReleasedLoss()(student, teacher), per_sample.mean())
    torch.testing.assert_close(PCDReleasedLoss(reduction="sum")(student, teacher), per_sample.sum())
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = pcd_released_loss(empty, empty.detach())
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    student, teacher, target = extreme_pair(6, 9, dtype)
    loss = pcd_released_loss(student, teacher, target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher = make_pair(2, 4, torch.float32)
    teacher.requires_grad_()
    pcd_released_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("options", "says"),
    [({"stages": 0}, "stages.*0"), ({"temperature": 0.0}, "temperature.*0.0"), ({"reduction": "avg"}, "'avg'")],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        pcd_released_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        PCDReleasedLoss(**options)
