"""Cross-entropy with hard and soft labels, against a loop, and what it refuses."""

import pytest
import torch

from pcdistill.losses.base import Needs
from pcdistill.losses.ce import CELoss, ce_loss
from tests.helpers import GRAD, VALUE, golden_pair, make_pair
from tests.losses import logit_checks as checks
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
    checks.check_gradcheck(ce_loss)


def test_reductions_and_module_agree():
    checks.check_reductions(ce_loss)
    student, _, target = checks.random_input(6, 10, torch.float32)
    torch.testing.assert_close(CELoss()(student, None, target), ce_loss(student, None, target))
    options = {"label_smoothing": 0.2, "reduction": "sum"}
    torch.testing.assert_close(CELoss(**options)(student, None, target), ce_loss(student, None, target, **options))
    assert CELoss.needs == Needs(teacher=False, labels=True)


def test_empty_batch_autocast_and_no_teacher():
    checks.check_batch(ce_loss)
    checks.check_reads_no_value(ce_loss)


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(ce_loss, dtype, c)


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        ce_loss(torch.zeros(2, 10), None, target)


@pytest.mark.parametrize(
    ("student", "error", "says"),
    [(torch.zeros(2, 10, 3), ValueError, r"\[N, C\].*\[2, 10, 3\]"), (torch.zeros(2, 10).long(), TypeError, "int64")],
)
def test_bad_logits_are_named(student, error, says):
    with pytest.raises(error, match=says):
        ce_loss(student, None, torch.zeros(2).long())


def test_soft_labels_of_another_number_of_classes_are_named():
    with pytest.raises(ValueError, match=r"\[2, 9\]"):
        ce_loss(torch.zeros(2, 10), None, torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("options", "says"), [({"label_smoothing": 1.0}, "label_smoothing.*1.0"), ({"reduction": "avg"}, "'avg'")]
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        ce_loss(torch.zeros(2, 10), None, torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        CELoss(**options)
