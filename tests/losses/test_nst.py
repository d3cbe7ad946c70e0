"""NST against a loop over the equation, gradcheck, properties, the mistakes people make. torchdistill has no NST."""

import pytest
import torch

from pcdistill.losses.nst import NSTLoss, nst_loss
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
from tests.references.nst import nst


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    students = [randn(3, 2, 4, 3), randn(3, 3, 2, 2, seed=1)]
    teachers = [randn(3, 4, 4, 3, seed=2), randn(3, 1, 2, 2, seed=3)]
    check_against_loop(lambda s, t: nst_loss(s, t, reduction="none"), nst, students, teachers, dtype)


@pytest.mark.parametrize(("student_size", "teacher_size"), [((6, 4), (3, 4)), ((2, 3), (5, 3)), ((4, 2), (2, 4))])
def test_the_larger_map_is_pooled(student_size, teacher_size):
    students, teachers = [randn(2, 2, *student_size)], [randn(2, 3, *teacher_size, seed=1)]
    check_against_loop(lambda s, t: nst_loss(s, t, reduction="none"), nst, students, teachers, torch.float64)


def test_gradcheck():
    teachers = [randn(2, 3, 2, 2, seed=1)]
    assert torch.autograd.gradcheck(lambda x: nst_loss([x], teachers), randn(2, 2, 2, 2).requires_grad_())


def test_one_channel_each_by_hand():
    """k(f, f) = 1 for both, and the angle between [1, 0] and [1, 1] is 45 degrees: 1 + 1 - 2 / 2."""
    student = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    teacher = torch.tensor([3.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
    torch.testing.assert_close(nst_loss([student], [teacher]), torch.tensor(1.0, dtype=torch.float64))


def test_properties():
    student, teacher = randn(4, 3, 2, 2), randn(4, 5, 2, 2, seed=1)
    value = nst_loss([student], [teacher], reduction="none")
    assert value.gt(0).all()
    torch.testing.assert_close(nst_loss([teacher.flip(1)], [teacher]), torch.zeros((), dtype=torch.float64))
    scales = torch.tensor([2.0, -3.0, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(nst_loss([scales * student], [teacher], reduction="none"), value)  # scale and sign
    torch.testing.assert_close(nst_loss([student.flip(1)], [teacher.flip(1)], reduction="none"), value)  # channels
    torch.testing.assert_close(nst_loss([student.flip(0)], [teacher.flip(0)], reduction="none"), value.flip(0))
    torch.testing.assert_close(nst_loss([student.flip(2)], [teacher.flip(2)], reduction="none"), value)  # mirrored both
    torch.testing.assert_close(nst_loss([student] * 3, [teacher] * 3, reduction="none"), 3 * value)  # a sum over stages
    torch.testing.assert_close(nst_loss([torch.cat([student] * 2, 1)], [teacher], reduction="none"), value)  # a mean


def test_reductions():
    students, teachers = [randn(4, 3, 2, 2)], [randn(4, 5, 2, 2, seed=1)]
    value = nst_loss(students, teachers, reduction="none")
    assert value.shape == (4,)
    torch.testing.assert_close(nst_loss(students, teachers), value.mean())
    torch.testing.assert_close(nst_loss(students, teachers, reduction="sum"), value.sum())


def test_a_dead_map_has_no_pattern_and_no_gradient():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    nst_loss([student], [randn(2, 3, 2, 2).float()]).backward()
    assert student.grad.eq(0).all()


def test_module_is_the_function_over_all_stages():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), sizes=(16, 8, 4), seed=2)
    torch.testing.assert_close(NSTLoss(student, teacher)(student, teacher), nst_loss(student.maps, teacher.maps))
    assert "(2, 2)" in repr(NSTLoss(student, teacher))


def test_the_module_keeps_the_rules():
    check_module(NSTLoss)
    check_module(NSTLoss, sizes=(4, 2, 1))
    check_counts(NSTLoss)


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    assert NSTLoss(student, teacher)(student, teacher) > 0


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(NSTLoss, dtype)


@pytest.mark.parametrize(
    ("students", "teachers", "options", "error", "says"),
    [
        ([torch.zeros(2, 3, 4, 4)], [], {}, ValueError, "one length > 0, got 1 and 0"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], {}, ValueError, r"got \[2, 3\]"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(3, 3, 1, 1)], {}, ValueError, "one N"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1).long()], {}, TypeError, "int64"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1)], {"reduction": "avg"}, ValueError, "'avg'"),
    ],
)
def test_bad_input_is_named(students, teachers, options, error, says):
    with pytest.raises(error, match=says):
        nst_loss(students, teachers, **options)


def test_a_stage_that_went_missing_is_named():
    features = make_features()
    with pytest.raises(ValueError, match="teacher shows 2 maps now, 3"):
        NSTLoss(features, features)(features, features._replace(maps=features.maps[:2]))
