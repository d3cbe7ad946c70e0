"""FitNet on pyramid levels against a loop, and what every loss on pyramids must stand."""

import torch

from pcdistill.losses._pyramid import Pyramid
from pcdistill.losses.fpn_fitnet import FPNFitNetLoss
from tests.losses import pyramid_checks as checks
from tests.references import fpn_fitnet as reference
from tests.references import pyramid


def expected(loss, student, teacher):
    return reference.fpn_fitnet(checks.plain(student), checks.plain(teacher))


@checks.DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    checks.check_dtypes(FPNFitNetLoss, expected, dtype)


def test_regressor_matches_the_loop():
    student, teacher = checks.make_pyramid(2), checks.make_pyramid(3, seed=1)
    loss = checks.shake(FPNFitNetLoss(student, teacher)).double()
    mapped = []
    for level, adapter in zip(checks.plain(student), loss.align.adapters, strict=True):
        weight, bias = adapter.weight.tolist(), adapter.bias.tolist()
        mapped.append([pyramid.conv2d(x, weight, bias) for x in level])
    wanted = reference.fpn_fitnet(mapped, checks.plain(teacher))
    torch.testing.assert_close(loss(student, teacher).item(), wanted)


def test_gradcheck():
    checks.check_gradient(FPNFitNetLoss)


def test_every_parameter_learns():
    checks.check_parameters_learn(FPNFitNetLoss)


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(FPNFitNetLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(FPNFitNetLoss, dtype, 1e-3)


def test_one_image_of_one_cell():
    checks.check_one_image(FPNFitNetLoss)


def test_matching_of_levels():
    checks.check_matching(FPNFitNetLoss)
    checks.check_strides_option(FPNFitNetLoss)


def test_zero_at_equality_and_quadratic():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    loss = FPNFitNetLoss(student, teacher)
    assert loss(student, student) == 0
    doubled = Pyramid([b + 2 * (a - b) for a, b in zip(student.levels, teacher.levels, strict=True)], *student[1:])
    torch.testing.assert_close(loss(doubled, teacher), 4 * loss(student, teacher))
