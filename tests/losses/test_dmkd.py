"""DMKD against a loop, its masks, and what every loss on pyramids must stand."""

import pytest
import torch

from pcdistill.losses._pyramid import DualMasking, channel_attention, keep_mask, spatial_attention
from pcdistill.losses.dmkd import DMKDLoss
from tests.losses import pyramid_checks as checks
from tests.references import dmkd as reference
from tests.references import pyramid


def expected(loss, student, teacher):
    parts = [checks.masking_of(part) for part in loss.masking]
    return reference.dmkd(checks.plain(student), checks.plain(teacher), parts, 0.5, 0.3, 0.5)


@checks.DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    checks.check_dtypes(DMKDLoss, expected, dtype)


@pytest.mark.parametrize(("spatial", "channel", "temperature"), [(0.0, 0.0, 1.0), (0.9, 0.4, 0.1), (1.0, 1.0, 2.0)])
def test_options_match_the_loop(spatial, channel, temperature):
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    options = {"spatial_ratio": spatial, "channel_ratio": channel, "temperature": temperature}
    loss = checks.shake(DMKDLoss(student, teacher, **options)).double()
    parts = [checks.masking_of(part) for part in loss.masking]
    wanted = reference.dmkd(checks.plain(student), checks.plain(teacher), parts, spatial, channel, temperature)
    torch.testing.assert_close(loss(student, teacher).item(), wanted)


def test_gradcheck():
    checks.check_gradient(DMKDLoss)


def test_every_parameter_learns():
    checks.check_parameters_learn(DMKDLoss)


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(DMKDLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(DMKDLoss, dtype, 5e-7)


def test_one_image_of_one_cell():
    checks.check_one_image(DMKDLoss)


def test_matching_of_levels():
    checks.check_matching(DMKDLoss)
    checks.check_strides_option(DMKDLoss)


def test_attention_matches_the_loop_and_has_mean_one():
    x = checks.make_pyramid().levels[0]
    places, channels = spatial_attention(x, 0.5), channel_attention(x, 0.5)
    for n, image in enumerate(x.tolist()):
        torch.testing.assert_close(places[n].tolist(), pyramid.spatial_attention(image, 0.5))
        torch.testing.assert_close(channels[n].tolist(), pyramid.channel_attention(image, 0.5))
    torch.testing.assert_close(places.mean(dim=(1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(channels.mean(dim=1), torch.ones(2, dtype=torch.float64))


def test_masks_take_out_what_is_attended_to_most():
    attention = torch.tensor([[0.1, 3.0, 0.2, 2.0, 0.3], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert keep_mask(attention, 0.5).tolist() == [[1, 0, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert keep_mask(attention, 0.0).all()
    assert not keep_mask(attention, 1.0).any()


def test_masked_places_and_channels_cannot_be_seen():
    part = checks.shake(DualMasking(3, spatial_ratio=0.5, channel_ratio=0.4)).double()
    x = checks.make_pyramid().levels[0]
    places, channels = spatial_attention(x, 0.5), channel_attention(x, 0.5)
    keep_places, keep_channels = part.masks(places, channels)
    assert (keep_places == 0).sum(dim=(1, 2)).tolist() == [12, 12]
    assert (keep_channels == 0).sum(dim=1).tolist() == [1, 1]
    hidden = (1 - keep_places)[:, None] * (1 - keep_channels)[:, :, None, None]
    torch.testing.assert_close(part(x + 9 * hidden, places, channels), part(x, places, channels))


def test_fusion_starts_at_the_mean_and_can_choose_one_side():
    part = DualMasking(3, spatial_ratio=0.5, channel_ratio=0.5).double()
    x = checks.make_pyramid().levels[0]
    attention = spatial_attention(x, 0.5), channel_attention(x, 0.5)
    keep_places, keep_channels = part.masks(*attention)
    one = part.spatial(x * keep_places[:, None])
    other = part.channel(x * keep_channels[:, :, None, None])
    torch.testing.assert_close(part(x, *attention), (one + other) / 2)
    with torch.no_grad():
        part.fusion.copy_(torch.tensor([50.0, -50.0]))
    torch.testing.assert_close(part(x, *attention), one)


def test_bad_options_are_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match=r"spatial_ratio must be between 0 and 1, got -0\.1"):
        DMKDLoss(student, student, spatial_ratio=-0.1)
    with pytest.raises(ValueError, match="channel_ratio must be between 0 and 1, got 2"):
        DMKDLoss(student, student, channel_ratio=2)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        DMKDLoss(student, student, temperature=0)
    with pytest.raises(ValueError, match="reduction must be"):
        DMKDLoss(student, student, reduction="none")
