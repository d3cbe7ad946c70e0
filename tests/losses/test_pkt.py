"""PKT against a loop over the equation, gradcheck, its invariances, a peer, and the mistakes people make."""

import pytest
import torch

from pcdistill.losses.pkt import PKTLoss, pkt_loss
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
)
from tests.references.pkt import pkt


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    check_against_loop(
        lambda s, t: pkt_loss(s[0], t[0]), lambda s, t: pkt(s[0], t[0]), [randn(5, 4)], [randn(5, 3, seed=1)], dtype
    )


def test_the_weights_size_is_right_too():
    """The loss is small (its weight is 30000): an absolute tolerance alone would see little of it."""
    student, teacher = randn(5, 4), randn(5, 3, seed=1)
    expected = pkt(student.tolist(), teacher.tolist())
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert pkt_loss(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-4)


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = randn(8, 6), randn(8, 9, seed=1)
    peer = mid_level.PKTLoss("fc", "input", "fc", "input")
    theirs = peer({"fc": {"input": student.clone()}}, {"fc": {"input": teacher.clone()}})
    torch.testing.assert_close(pkt_loss(student, teacher), theirs, rtol=1e-9, atol=0)


def test_gradcheck():
    teacher = randn(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: pkt_loss(x, teacher), randn(4, 3).requires_grad_())


def test_a_rotation_and_the_lengths_change_nothing():
    student, teacher = randn(6, 4), randn(6, 4, seed=1)
    value = pkt_loss(student, teacher)
    assert value > 0
    rotation = torch.linalg.qr(randn(4, 4, seed=2)).Q
    lengths = torch.arange(1.0, 7)[:, None]
    torch.testing.assert_close(pkt_loss(lengths * student @ rotation, teacher), value, rtol=1e-5, atol=0)  # up to 1e-7
    torch.testing.assert_close(pkt_loss(student.flip(0), teacher.flip(0)), value)
    assert pkt_loss(teacher, teacher) == 0


def test_a_dead_sample_gets_a_finite_gradient():
    student = randn(4, 3).float()
    student[1] = 0
    student.requires_grad_()
    value = pkt_loss(student, randn(4, 3, seed=1).float())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad[0].abs().max() > 0


def test_no_samples_give_zero():
    empty = torch.zeros(0, 3, requires_grad=True)
    value = pkt_loss(empty, torch.zeros(0, 4))
    value.backward()
    assert value == 0


def test_module_is_the_function_of_what_the_classifiers_read():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    torch.testing.assert_close(PKTLoss()(student, teacher), pkt_loss(student.pooled, teacher.pooled))


def test_the_module_keeps_the_rules():
    check_module(PKTLoss)


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(PKTLoss, dtype)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), ValueError, "one N"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 1, 1), ValueError, "teacher features must be vectors"),
        (torch.zeros(2, 3), torch.zeros(2, 3).bool(), TypeError, "bool"),
    ],
)
def test_bad_input_is_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        pkt_loss(student, teacher)
