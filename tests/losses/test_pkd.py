"""PKD against a loop, its meaning as a correlation, and what every loss on pyramids must stand."""

import pytest
import torch

from pcdistill.losses._pyramid import Pyramid
from pcdistill.losses.pkd import PKDLoss, pkd_loss
from tests.losses import pyramid_checks as checks
from tests.references import pkd as reference


def expected(loss, student, teacher):
    return reference.pkd(checks.plain(student), checks.plain(teacher))


@checks.DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    checks.check_dtypes(PKDLoss, expected, dtype)


def test_gradcheck():
    checks.check_gradient(PKDLoss)


def test_every_parameter_learns():
    checks.check_parameters_learn(PKDLoss)


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(PKDLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(PKDLoss, dtype, 6.0)


def test_one_image_of_one_cell_is_zero():
    checks.check_one_image(PKDLoss)
    x = torch.ones(1, 3, 1, 1)
    assert pkd_loss(x, 2 * x) == 0


def test_matching_of_levels():
    checks.check_matching(PKDLoss)
    checks.check_strides_option(PKDLoss)


def test_is_one_minus_the_correlation():
    student, teacher = (
        checks.make_pyramid(sizes=((8, 9),), strides=(8,)),
        checks.make_pyramid(sizes=((8, 9),), strides=(8,), seed=1),
    )
    values = 2 * 8 * 9
    r = reference.pearson(student.levels[0].tolist(), teacher.levels[0].tolist())
    actual = pkd_loss(student.levels[0], teacher.levels[0])
    assert actual.item() == pytest.approx((1 - r) * (values - 1) / values, rel=1e-5)


def test_scale_and_offset_of_a_channel_do_not_count():
    x = checks.make_pyramid().levels[0]
    scale, offset = torch.tensor([2.0, 0.5, 7.0]), torch.tensor([-1.0, 3.0, 0.0])
    changed = x * scale[:, None, None] + offset[:, None, None]
    assert pkd_loss(x, changed) < 1e-10
    assert pkd_loss(x, x) == 0
    torch.testing.assert_close(pkd_loss(x, -x), torch.tensor(2.0 * 47 / 48, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_function_itself_computes_in_float32(dtype):
    x, y = (checks.make_pyramid(seed=s).levels[0].to(dtype) for s in (0, 1))
    torch.testing.assert_close(pkd_loss(x, y), pkd_loss(x.float(), y.float()))


def test_autocast_does_not_reach_the_adapters():
    student, teacher = checks.make_pyramid(2, dtype=torch.float32), checks.make_pyramid(3, dtype=torch.float32, seed=1)
    loss = PKDLoss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    assert torch.equal(inside, loss(student, teacher))


def test_equal_widths_need_no_parameters():
    student = checks.make_pyramid()
    assert not list(PKDLoss(student, student).parameters())


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \[1, 2, 3, 3\] and \[1, 2, 3, 4\]"):
        pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"got \[2, 3, 3\] and \[2, 3, 3\]"):
        pkd_loss(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3))


def test_a_constant_channel_has_a_finite_gradient():
    x = torch.randn(2, 2, 3, 3)
    x[:, 1] = 4
    x.requires_grad_()
    pkd_loss(x, torch.randn(2, 2, 3, 3)).backward()
    assert torch.isfinite(x.grad).all()


def test_levels_are_summed():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    parts = [pkd_loss(a, b) for a, b in zip(student.levels, teacher.levels, strict=True)]
    torch.testing.assert_close(PKDLoss(student, teacher)(student, teacher), parts[0] + parts[1])
    swapped = Pyramid(teacher.levels[::-1], teacher.strides[::-1], teacher.image_size)
    torch.testing.assert_close(PKDLoss(student, swapped)(student, swapped), parts[0] + parts[1])
