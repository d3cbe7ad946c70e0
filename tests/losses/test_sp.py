"""SP against a loop over the equation, gradcheck, its invariances, a peer, and the mistakes people make."""

import pytest
import torch

from pcdistill.losses.sp import SPLoss, sp_loss
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_counts,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
)
from tests.references.sp import sp


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    check_against_loop(
        lambda s, t: sp_loss(s[0], t[0]), lambda s, t: sp(s[0], t[0]), [randn(5, 6)], [randn(5, 4, seed=1)], dtype
    )


def test_torchdistill_agrees_once_its_rows_have_euclidean_length_one():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = randn(6, 3, 2, 2), randn(6, 5, 2, 2, seed=1)
    peer = mid_level.SPKDLoss("layer", "layer", "batchmean")

    def theirs():
        return peer({"layer": {"output": student}}, {"layer": {"output": teacher}})

    # normalize(z, 1) passes 1 as p: its rows have absolute sum 1; the paper's eq. 2 has the Euclidean length
    assert not torch.isclose(theirs(), sp_loss(student, teacher))
    peer.matmul_and_normalize = lambda z: torch.nn.functional.normalize(z.flatten(1) @ z.flatten(1).T, p=2, dim=1)
    torch.testing.assert_close(sp_loss(student, teacher), theirs())


def test_gradcheck():
    teacher = randn(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: sp_loss(x, teacher), randn(4, 2, 2, 1).requires_grad_())


def test_a_rotation_a_scale_and_an_order_change_nothing():
    student, teacher = randn(6, 4), randn(6, 5, seed=1)
    value = sp_loss(student, teacher)
    assert 0 < value <= 4 / 6
    rotation = torch.linalg.qr(randn(4, 4, seed=2)).Q
    torch.testing.assert_close(sp_loss(3 * student @ rotation, 0.1 * teacher), value)
    torch.testing.assert_close(sp_loss(student.flip(0), teacher.flip(0)), value)
    torch.testing.assert_close(sp_loss(student.flip(1), teacher), value)
    assert sp_loss(teacher, teacher) == 0
    torch.testing.assert_close(sp_loss(student.reshape(6, 1, 2, 2), teacher), value)


def test_a_dead_sample_gets_a_finite_gradient():
    student = randn(4, 3).float()
    student[1] = 0
    student.requires_grad_()
    sp_loss(student, randn(4, 3, seed=1).float()).backward()
    assert student.grad.abs().max() < 1e3


def test_one_sample_is_always_like_itself_and_none_give_zero():
    assert sp_loss(randn(1, 3), randn(1, 4, seed=1)) < 1e-25
    empty = torch.zeros(0, 3, requires_grad=True)
    value = sp_loss(empty, torch.zeros(0, 4))
    value.backward()
    assert value == 0


def test_module_is_the_function_at_the_deepest_stage():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    torch.testing.assert_close(SPLoss(student, teacher)(student, teacher), sp_loss(student.maps[2], teacher.maps[2]))
    middle = SPLoss(student, teacher, stage=1)
    torch.testing.assert_close(middle(student, teacher), sp_loss(student.maps[1], teacher.maps[1]))
    assert "student stage 1, teacher stage 1" in repr(middle)


def test_the_module_keeps_the_rules():
    check_module(SPLoss)
    check_module(SPLoss, sizes=(4, 2, 1))
    check_counts(SPLoss)


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(SPLoss, dtype)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), ValueError, "one N"),
        (torch.zeros(2), torch.zeros(2, 3), ValueError, r"student features must be \[N, ...\], got \[2\]"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, "teacher features must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, "meta"),
    ],
)
def test_bad_input_is_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        sp_loss(student, teacher)


def test_bad_stage_is_named():
    with pytest.raises(ValueError, match="got -4"):
        SPLoss(make_features(), make_features(), stage=-4)
