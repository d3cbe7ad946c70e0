"""MGD against a loop, its mask, and what every loss on pyramids must stand."""

import pytest
import torch

from pcdistill.losses.mgd import MGDLoss
from tests.losses import pyramid_checks as checks
from tests.references import mgd as reference
from tests.references import pyramid


def expected(loss, student, teacher):
    torch.manual_seed(3)
    masks = [(torch.rand(len(x), 1, *x.shape[2:]) >= loss.mask_ratio)[:, 0].double().tolist() for x in student.levels]
    blocks = [checks.generator_of(block) for block in loss.generators]
    return reference.mgd(checks.plain(student), checks.plain(teacher), masks, blocks)


@checks.DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    checks.check_dtypes(MGDLoss, expected, dtype)


def test_gradcheck():
    checks.check_gradient(MGDLoss)


def test_every_parameter_learns():
    checks.check_parameters_learn(MGDLoss)


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(MGDLoss)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(MGDLoss, dtype, 5e-7)


def test_one_image_of_one_cell():
    checks.check_one_image(MGDLoss)


def test_matching_of_levels():
    checks.check_matching(MGDLoss)
    checks.check_strides_option(MGDLoss)


def test_mask_ratio_is_the_share_of_masked_places():
    student = checks.make_pyramid(1, sizes=((100, 100),), strides=(8,), dtype=torch.float32)
    loss = MGDLoss(student, student, mask_ratio=0.65)
    seen = []
    loss.generators[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss(student, student)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.65, abs=0.02)


def test_the_mask_covers_all_channels_of_a_place_and_differs_between_images():
    student = checks.make_pyramid(4, dtype=torch.float32)
    loss = MGDLoss(student, student, mask_ratio=0.5)
    seen = []
    loss.generators[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss(student, student)
    zero = seen[0] == 0
    assert (zero.all(dim=1) == zero.any(dim=1)).all()
    assert not torch.equal(zero[0], zero[1])


def test_nothing_masked_is_the_generator_and_all_masked_is_its_bias():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    loss = checks.shake(MGDLoss(student, teacher, mask_ratio=0.0)).double()
    made = [block(x) for block, x in zip(loss.generators, student.levels, strict=True)]
    wanted = sum((a - b).square().sum() / 2 for a, b in zip(made, teacher.levels, strict=True))
    torch.testing.assert_close(loss(student, teacher), wanted)
    loss.mask_ratio = 1.0
    other = checks.make_pyramid(seed=9)
    torch.testing.assert_close(loss(student, teacher), loss(other, teacher))


def test_mean_is_batch_over_channels_and_places():
    student = checks.make_pyramid(sizes=((4, 6),), strides=(8,))
    teacher = checks.make_pyramid(sizes=((4, 6),), strides=(8,), seed=1)
    losses = [checks.shake(MGDLoss(student, teacher, reduction=r)).double() for r in ("batch", "mean")]
    values = []
    for loss in losses:
        torch.manual_seed(0)
        values.append(loss(student, teacher))
    torch.testing.assert_close(values[0], values[1] * pyramid.count([student.levels[0][0].tolist()]))


def test_bad_options_are_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match=r"mask_ratio must be between 0 and 1, got 1\.5"):
        MGDLoss(student, student, mask_ratio=1.5)
    with pytest.raises(ValueError, match="reduction must be 'batch' or 'mean', got 'sum'"):
        MGDLoss(student, student, reduction="sum")


def test_the_default_ratio_is_the_papers_for_two_stage_students():
    student = checks.make_pyramid()
    assert MGDLoss(student, student).mask_ratio == 0.45
