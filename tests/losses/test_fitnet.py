"""FitNet against loops over the equation and over its regressor, and the mistakes people make."""

import pytest
import torch
from torch.nn import functional as F

from pcdistill.losses.fitnet import FitNetLoss, Regressor, fitnet_loss
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_counts,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
    require_grad,
)
from tests.references import fitnet as reference


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    student, teacher = randn(3, 2, 3, 2), randn(3, 2, 3, 2, seed=1)
    check_against_loop(
        lambda s, t: fitnet_loss(s[0], t[0], reduction="none"),
        lambda s, t: reference.fitnet(s[0], t[0]),
        [student],
        [teacher],
        dtype,
    )


def test_is_torchs_mean_squared_error():
    student, teacher = randn(3, 2, 3, 2), randn(3, 2, 3, 2, seed=1)
    torch.testing.assert_close(fitnet_loss(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(fitnet_loss(student, teacher, reduction="sum"), 3 * F.mse_loss(student, teacher))


def test_gradcheck():
    teacher = randn(2, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: fitnet_loss(x, teacher), randn(2, 2, 2, 2).requires_grad_())


def test_zero_at_equality_and_blind_to_the_order_of_samples_and_channels():
    student, teacher = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    assert fitnet_loss(teacher, teacher) == 0
    value = fitnet_loss(student, teacher)
    assert value > 0
    torch.testing.assert_close(fitnet_loss(student.flip(0), teacher.flip(0)), value)
    torch.testing.assert_close(fitnet_loss(student.flip(1), teacher.flip(1)), value)


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "kernel", "stride", "padding"),
    [(4, 4, (1, 1), 1, 0), (4, 2, (3, 3), 2, 1), (5, 3, (3, 3), 1, 0)],
    ids=["same", "twice", "a bit larger"],
)
def test_regressor_matches_the_loop(student_size, teacher_size, kernel, stride, padding):
    student, teacher = randn(2, 2, student_size, student_size), randn(2, 3, teacher_size, teacher_size, seed=1)
    regressor = Regressor(student, teacher).double()
    assert regressor.conv.kernel_size == kernel
    weight, bias = regressor.conv.weight.tolist(), regressor.conv.bias.tolist()
    expected = reference.regress(student.tolist(), weight, bias, stride=stride, padding=padding)
    torch.testing.assert_close(regressor(student, teacher.shape[2:]), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("student_size", "teacher_size"), [(2, 4), (3, 10), (16, 4), (20, 3), (7, 7), (7, 4)])
def test_regressor_reaches_any_size_also_another_than_the_observed(student_size, teacher_size):
    student, teacher = randn(2, 2, student_size, student_size), randn(2, 3, teacher_size, teacher_size)
    regressor = Regressor(student, teacher).double()
    assert regressor(student, teacher.shape[2:]).shape == teacher.shape
    larger = randn(2, 2, student_size + 3, student_size + 2)
    assert regressor(larger, (teacher_size + 1, teacher_size)).shape[2:] == (teacher_size + 1, teacher_size)
    assert max(regressor.conv.kernel_size) <= 7


def test_a_small_map_is_upsampled_by_a_transposed_convolution():
    assert isinstance(Regressor(randn(1, 2, 2, 2), randn(1, 3, 4, 4)).conv, torch.nn.ConvTranspose2d)


def test_relu_can_be_left_out():
    student, teacher = make_features(seed=1), make_features(seed=2)
    for relu in (True, False):
        loss = FitNetLoss(student, teacher, relu=relu)
        adapted = loss.regressor(student.maps[1], (4, 4))
        assert bool(adapted.lt(0).any()) is not relu


def test_module_is_the_function_after_the_regressor_at_the_stage():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    for stage, i in ((0, 0), (1, 1), (-1, 2)):
        torch.manual_seed(0)
        loss = FitNetLoss(student, teacher, stage=stage)
        adapted = loss.regressor(student.maps[i], tuple(teacher.maps[i].shape[2:]))
        torch.testing.assert_close(loss(student, teacher), fitnet_loss(adapted, teacher.maps[i]))
    assert FitNetLoss(student, teacher).pair == (1, 1)
    assert repr(FitNetLoss(student, teacher, stage=-1)).count("stage 2") == 2


def test_only_the_chosen_stage_gets_a_gradient():
    student, teacher = require_grad(make_features(seed=1)), make_features(seed=2)
    FitNetLoss(student, teacher, stage=2)(student, teacher).backward()
    assert [x.grad is not None for x in student.maps] == [False, False, True]


def test_the_module_keeps_the_rules():
    check_module(FitNetLoss)
    check_module(FitNetLoss, sizes=(16, 8, 4))
    check_counts(FitNetLoss)


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(FitNetLoss, dtype)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), ValueError, r"\[2, 3, 4, 4\].*\[2, 5, 4, 4\].*adapter"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4), ValueError, "one N"),
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, r"maps \[N, D, H, W\], got \[2, 3\]"),
        (torch.zeros(2, 0, 1, 1), torch.zeros(2, 0, 1, 1), ValueError, r"got \[2, 0, 1, 1\]"),
        (torch.zeros(2, 3, 4, 4).int(), torch.zeros(2, 3, 4, 4), TypeError, "int32"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "meta"),
    ],
)
def test_bad_input_is_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        fitnet_loss(student, teacher)


def test_bad_options_are_named():
    features = make_features()
    with pytest.raises(ValueError, match=r"stage must be in \[-3, 2\].*got 3"):
        FitNetLoss(features, features, stage=3)
    with pytest.raises(ValueError, match="'avg'"):
        fitnet_loss(features.maps[0], features.maps[0], reduction="avg")
    loss = FitNetLoss(features, features, stage=2)
    with pytest.raises(ValueError, match="student shows 2 maps now, 3"):
        loss(features._replace(maps=features.maps[:2]), features)
    with pytest.raises(ValueError, match="one map or more, got 0"):
        FitNetLoss(features._replace(maps=[]), features)
