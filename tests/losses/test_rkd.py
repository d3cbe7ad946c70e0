"""RKD against loops over pairs and triplets, gradcheck, its invariances, a peer, and the mistakes people make."""

import pytest
import torch

from pcdistill.losses.rkd import RKDLoss, rkd_loss
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
)
from tests.references.rkd import rkd


@DTYPES
@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_value_and_gradient_match_the_loop(dtype, distance, angle):
    check_against_loop(
        lambda s, t: rkd_loss(s[0], t[0], distance_weight=distance, angle_weight=angle),
        lambda s, t: rkd(s[0], t[0], distance, angle),
        [randn(5, 4)],
        [randn(5, 3, seed=1)],
        dtype,
    )


def test_differences_beyond_one_count_linearly():
    student, teacher = randn(5, 4), randn(5, 3, seed=1)
    student[0] += 30  # an outlier: some normalised distances differ by more than 1
    check_against_loop(
        lambda s, t: rkd_loss(s[0], t[0]), lambda s, t: rkd(s[0], t[0], 25, 50), [student], [teacher], torch.float64
    )


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = randn(8, 6), randn(8, 9, seed=1)
    for distance, angle in ((25.0, 50.0), (1.0, 2.0)):
        peer = mid_level.RKDLoss("pool", "pool", distance, angle, "mean")
        theirs = peer({"pool": {"output": student}}, {"pool": {"output": teacher}})
        torch.testing.assert_close(rkd_loss(student, teacher, distance_weight=distance, angle_weight=angle), theirs)


def test_gradcheck():
    teacher = randn(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: rkd_loss(x, teacher), randn(4, 3).requires_grad_())


def test_a_rotation_a_shift_and_a_scale_change_nothing():
    student, teacher = randn(6, 4), randn(6, 4, seed=1)
    value = rkd_loss(student, teacher)
    assert value > 0
    rotation = torch.linalg.qr(randn(4, 4, seed=2)).Q
    torch.testing.assert_close(rkd_loss(3 * student @ rotation + 5, teacher @ rotation - 2), value)
    torch.testing.assert_close(rkd_loss(student.flip(0), teacher.flip(0)), value)
    assert rkd_loss(0.5 * teacher @ rotation + 1, teacher) < 1e-25
    wider = torch.cat([teacher, torch.zeros(6, 3)], dim=1)
    assert rkd_loss(wider, teacher) < 1e-25


def test_the_parts_add_up():
    student, teacher = randn(6, 4), randn(6, 4, seed=1)
    distance = rkd_loss(student, teacher, distance_weight=1, angle_weight=0)
    angle = rkd_loss(student, teacher, distance_weight=0, angle_weight=1)
    torch.testing.assert_close(rkd_loss(student, teacher), 25 * distance + 50 * angle)
    assert rkd_loss(student, teacher, distance_weight=0, angle_weight=0) == 0


def test_far_from_the_origin_float32_still_sees_the_distances():
    student, teacher = randn(6, 4), randn(6, 4, seed=1)
    shifted = (student + 300).float()
    expected = rkd_loss(shifted.double(), teacher)
    torch.testing.assert_close(rkd_loss(shifted, teacher.float()).double(), expected, rtol=1e-5, atol=0)


def test_equal_samples_give_a_finite_gradient_and_none_to_each_other():
    student = randn(5, 3).float()
    student[1] = student[0]
    student.requires_grad_()
    teacher = randn(5, 3, seed=1).float()
    rkd_loss(student, teacher).backward()
    assert student.grad.abs().max() < 1e3
    collapsed = torch.ones(4, 3, requires_grad=True)
    value = rkd_loss(collapsed, teacher[:4])
    value.backward()
    assert value.isfinite()
    assert collapsed.grad.eq(0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_relations(n):
    student = torch.ones(n, 3, requires_grad=True)
    value = rkd_loss(student, torch.ones(n, 3))
    value.backward()
    assert value == 0


def test_module_is_the_function_of_what_the_classifiers_read():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    torch.testing.assert_close(RKDLoss()(student, teacher), rkd_loss(student.pooled, teacher.pooled))
    loss = RKDLoss(student, teacher, distance_weight=1.5, angle_weight=0.5)
    torch.testing.assert_close(
        loss(student, teacher), rkd_loss(student.pooled, teacher.pooled, distance_weight=1.5, angle_weight=0.5)
    )
    assert "angle_weight=0.5" in repr(loss)


def test_the_module_keeps_the_rules():
    check_module(RKDLoss)


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(RKDLoss, dtype)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), {}, ValueError, "one N"),
        (
            torch.zeros(2, 3, 1, 1),
            torch.zeros(2, 3),
            {},
            ValueError,
            r"student features must be vectors.*\[2, 3, 1, 1\]",
        ),
        (torch.zeros(2, 0), torch.zeros(2, 0), {}, ValueError, r"\[2, 0\]"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), {}, TypeError, "int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"distance_weight": -1.0}, ValueError, "distance_weight.*-1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"angle_weight": float("nan")}, ValueError, "angle_weight.*nan"),
    ],
)
def test_bad_input_is_named(student, teacher, options, error, says):
    with pytest.raises(error, match=says):
        rkd_loss(student, teacher, **options)
    if options:
        with pytest.raises(error, match=says):
            RKDLoss(**options)
