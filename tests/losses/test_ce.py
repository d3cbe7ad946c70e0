"""Cross-entropy with hard and soft labels, against a loop, and what it refuses."""

import pytest
import torch

from pcdistill.losses.base import Needs
from pcdistill.losses.ce import CELoss, ce_loss
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, make_pair
from tests.references import log_softmax


def test_golden_value():
    student, teacher, target = golden_pair()
    assert ce_loss(student, teacher, target).item() == pytest.approx(2.293837, abs=6e-7)


@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradient_match_loop(dtype, smoothing, soft):
    n, c = 5, 7
    student, teacher = make_pair(n, c, dtype)
    hard = torch.arange(n) % c
    target = teacher.double().softmax(1).to(dtype) if soft else hard
    labels = target.double() if soft else torch.nn.functional.one_hot(hard, c).double()
    labels = (1 - smoothing) * labels + smoothing / c
    expected = [
        -sum(y * log_q for y, log_q in zip(row, log_softmax(z), strict=True))
        for row, z in zip(labels.tolist(), student.tolist(), strict=True)
    ]
    actual = ce_loss(student, None, target, label_smoothing=smoothing, reduction="none")
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)
    actual.sum().backward()
    q = student.detach().double().softmax(1)
    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(
        student.grad.double(), labels.sum(1, keepdim=True) * q - labels, rtol=rtol, atol=max(atol, 1e-7)
    )


def test_gradcheck():
    student, _ = make_pair(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda z: ce_loss(z, None, torch.tensor([0, 4, 2])), student)


def test_reductions_module_and_empty_batch_agree():
    student, _ = make_pair(6, 10, torch.float32)
    target = torch.arange(6)
    per_sample = ce_loss(student, None, target, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(CELoss()(student, None, target), per_sample.mean())
    torch.testing.assert_close(CELoss(reduction="sum")(student, None, target), per_sample.sum())
    smoothed = ce_loss(student, None, target, label_smoothing=0.2)
    torch.testing.assert_close(CELoss(label_smoothing=0.2)(student, None, target), smoothed)
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = ce_loss(empty, None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert CELoss.needs == Needs(teacher=False, labels=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    student, teacher, target = extreme_pair(6, 9, dtype)
    loss = ce_loss(student, teacher, target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (None, {}, "target must be given"),
        (torch.zeros(3).long(), {}, r"\[2\].*\[3\]"),
        (torch.zeros(2, 9), {}, r"\[2, 9\]"),
        (torch.zeros(2).long(), {"label_smoothing": 1.0}, "label_smoothing.*1.0"),
        (torch.zeros(2).long(), {"reduction": "avg"}, "'avg'"),
    ],
)
def test_bad_input_is_named(target, options, says):
    with pytest.raises(ValueError, match=says):
        ce_loss(torch.zeros(2, 10), None, target, **options)
