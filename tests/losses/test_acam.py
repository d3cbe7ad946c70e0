"""ACAM-KD against a loop, its golden value, its masks, and what every loss on pyramids must stand."""

import pytest
import torch

from pcdistill.losses.acam import ACAMLoss, CooperativeMasks, dice_overlap, masked_error
from tests.losses import pyramid_checks as checks
from tests.references.acam import acam


def parts_of(level):
    convolutions = {name: getattr(level, name).weight for name in ("query", "key", "value")}
    units = {"channels": level.channel_units, "places": level.place_units}
    plain = {name: value.detach().double().tolist() for name, value in {**convolutions, **units}.items()}
    for name in convolutions:
        plain[name] = [[d[0][0] for d in row] for row in plain[name]]
    return plain


def expected(loss, student, teacher):
    levels = [parts_of(level) for level in loss.levels]
    return acam(checks.plain(student), checks.plain(teacher), levels, loss.diversity)


@checks.DTYPES
@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_value_and_gradient_match_the_loop(dtype, diversity):
    checks.check_dtypes(lambda s, t: ACAMLoss(s, t, masks=3, diversity=diversity), expected, dtype)


def test_golden_value():
    """Units of 0 make every mask one half: L_c + L_s = mean e / 2 each, and each of M (M - 1) pairs overlaps wholly."""
    student, teacher = (checks.make_pyramid(sizes=((2, 2),), strides=(8,)) for _ in range(2))
    teacher.levels[0] += 2.0  # a squared error of 4 everywhere
    loss = ACAMLoss(student, teacher).double()
    for level in loss.levels:
        torch.nn.init.zeros_(level.channel_units)
        torch.nn.init.zeros_(level.place_units)
    assert loss(student, teacher).item() == pytest.approx(2 * 4 / 2 + 2 * 6 * 5)


def test_gradcheck():
    checks.check_gradient(ACAMLoss)


def test_every_parameter_learns():
    checks.check_parameters_learn(ACAMLoss)


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(ACAMLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(ACAMLoss, dtype, 1e-3)


def test_one_image_of_one_cell():
    checks.check_one_image(ACAMLoss)


def test_matching_of_levels():
    checks.check_matching(ACAMLoss)
    checks.check_strides_option(ACAMLoss)


def test_at_equality_the_overlap_alone_is_left():
    student = checks.make_pyramid()
    assert ACAMLoss(student, student, diversity=0.0).double()(student, student) == 0
    assert ACAMLoss(student, student).double()(student, student) > 0


def test_masks_follow_from_both_detectors():
    masks = checks.shake(CooperativeMasks(3, 4)).double()
    x, y = checks.make_pyramid().levels[0], checks.make_pyramid(seed=1).levels[0]
    channels, places = masks(x, y)
    assert channels.shape == (2, 4, 3)
    assert places.shape == (2, 4, 24)
    assert ((channels > 0) & (channels < 1)).all()
    for other in (masks(x, 2 * y), masks(2 * x, y)):
        assert not torch.allclose(other[0], channels)
        assert not torch.allclose(other[1], places)


def test_a_mask_weighs_what_it_shows():
    """Masks of one value c have the error c e; a mask on some of the errors has theirs, however few they are."""
    error = torch.tensor([[1.0, 3.0]])
    for share in (0.2, 1.0):
        assert masked_error(error, torch.full((1, 2, 2), share)).item() == pytest.approx(2 * share)
    assert masked_error(error, torch.tensor([[[1.0, 0.0]]])).item() == pytest.approx(1.0)


def test_overlap_worked_out_by_hand():
    masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])  # 0, 2/3 and 2/3, each pair twice
    assert dice_overlap(masks).item() == pytest.approx(8 / 3)
    assert dice_overlap(masks[:, :1]).item() == 0


def test_bad_options_are_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match="masks must be at least 1, got 0"):
        ACAMLoss(student, student, masks=0)
    with pytest.raises(ValueError, match="diversity must be .* got -1"):
        ACAMLoss(student, student, diversity=-1.0)
