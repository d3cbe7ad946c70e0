"""CWD against a loop, its golden value, its meaning for channels, and what every loss on pyramids must stand."""

import math

import pytest
import torch

from pcdistill.losses.cwd import CWDLoss, cwd_loss
from tests.losses import pyramid_checks as checks
from tests.references.cwd import cwd


def expected(loss, student, teacher):
    return cwd(checks.plain(student), checks.plain(teacher), loss.temperature)


@checks.DTYPES
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient_match_the_loop(dtype, temperature):
    checks.check_dtypes(lambda s, t: CWDLoss(s, t, temperature=temperature), expected, dtype)


def test_golden_value():
    """Two places, T = 2: student (1/2, 1/2), teacher (3/4, 1/4): 4 KL = 4 (log 3 * 3/4 - log 2)."""
    student = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    teacher = torch.tensor([[[[2 * math.log(3.0), 0.0]]]], dtype=torch.float64)
    value = cwd_loss(student, teacher, temperature=2.0)
    assert value.item() == pytest.approx(4 * (0.75 * math.log(3.0) - math.log(2.0)))
    assert value.item() == pytest.approx(0.5232481437645480)


def test_gradcheck():
    checks.check_gradient(CWDLoss)


def test_every_parameter_learns():
    """All but the bias of the 1x1 convolution, which is an offset of a channel."""
    student, teacher = checks.make_pyramid(2, leaf=True), checks.make_pyramid(3, seed=1)
    loss = checks.shake(CWDLoss(student, teacher)).double()
    loss(student, teacher).backward()
    for name, parameter in loss.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest < 1e-12 if name.endswith("bias") else largest > 1e-6


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(CWDLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(CWDLoss, dtype, 1.0)


def test_one_image_of_one_cell_is_zero():
    checks.check_one_image(CWDLoss)
    assert cwd_loss(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)) == 0


def test_matching_of_levels():
    checks.check_matching(CWDLoss)
    checks.check_strides_option(CWDLoss)


def test_an_offset_of_a_channel_does_not_count_and_its_scale_does():
    x = checks.make_pyramid().levels[0]
    offset = torch.tensor([-1.0, 3.0, 0.5])[:, None, None]
    assert cwd_loss(x, x + offset) < 1e-12
    assert cwd_loss(x, x) == 0
    assert cwd_loss(x, 2 * x) > 1e-3


def test_where_places_are_and_in_which_order_images_come_does_not_count():
    x, y = checks.make_pyramid().levels[0], checks.make_pyramid(seed=1).levels[0]
    torch.testing.assert_close(cwd_loss(x.flip(0, 1, 2, 3), y.flip(0, 1, 2, 3)), cwd_loss(x, y))


def test_at_a_high_temperature_it_is_half_the_variance_of_the_difference():
    x, y = checks.make_pyramid().levels[0], checks.make_pyramid(seed=1).levels[0]
    wanted = (y - x).flatten(2).var(dim=2, correction=0).mean() / 2
    torch.testing.assert_close(cwd_loss(x, y, temperature=1e4), wanted, rtol=1e-3, atol=0)


def test_bad_input_is_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        CWDLoss(student, student, temperature=0)
    with pytest.raises(ValueError, match=r"one shape, got \[1, 2, 3, 3\] and \[1, 2, 3, 4\]"):
        cwd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
