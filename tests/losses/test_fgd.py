"""FGD against a loop, its masks by hand, and what every loss on pyramids must stand."""

import pytest
import torch

from pcdistill.losses.fgd import FGDLoss, GlobalContext, foreground_and_background
from tests.losses import pyramid_checks as checks
from tests.references import fgd as reference

WEIGHTS = {"foreground_weight": 0.7, "background_weight": 0.4, "attention_weight": 0.2, "relation_weight": 0.1}


def block_of(context):
    first, norm, _, last = context.transform
    numbers = {
        "score": context.score.weight[0, :, 0, 0],
        "w1": first.weight[:, :, 0, 0],
        "b1": first.bias,
        "gain": norm.weight[:, 0, 0],
        "shift": norm.bias[:, 0, 0],
        "w2": last.weight[:, :, 0, 0],
        "b2": last.bias,
    }
    plain = {key: value.detach().double().tolist() for key, value in numbers.items()}
    return {**plain, "score_bias": context.score.bias.item()}


def expected(loss, student, teacher):
    contexts = [(block_of(a), block_of(b)) for a, b in zip(loss.student_context, loss.teacher_context, strict=True)]
    return reference.fgd(
        checks.plain(student),
        checks.plain(teacher),
        checks.BOXES,
        checks.IMAGE_SIZE,
        loss.temperature,
        loss.weights,
        contexts,
    )


def build(student, teacher):
    return FGDLoss(student, teacher, **WEIGHTS)


@checks.DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    checks.check_dtypes(build, expected, dtype)


@pytest.mark.parametrize("part", ["foreground", "background", "attention", "relation"])
def test_each_part_matches_the_loop_alone(part):
    student, teacher = checks.make_pyramid(4), checks.make_pyramid(4, seed=1)
    weights = {name: float(name == f"{part}_weight") for name in WEIGHTS}
    loss = checks.shake(FGDLoss(student, teacher, temperature=0.8, **weights)).double()
    value = loss(student, teacher, checks.make_targets())
    torch.testing.assert_close(value.item(), expected(loss, student, teacher))
    assert value > 0


def test_gradcheck():
    checks.check_gradient(build)


def test_every_parameter_learns():
    student, teacher = checks.make_pyramid(2, leaf=True), checks.make_pyramid(12, seed=1)
    loss = checks.shake(build(student, teacher)).double()
    loss(student, teacher, checks.make_targets()).backward()
    # A bias on a softmax's scores has no effect, by shift; everything else learns.
    still = {name for name, p in loss.named_parameters() if p.grad.abs().max() < 1e-12}
    assert still == {f"{side}_context.{k}.score.bias" for side in ("student", "teacher") for k in (0, 1)}


def test_no_gradient_into_the_teacher():
    checks.check_teacher_is_constant(build)


@checks.HALF
def test_finite_in_half_precision(dtype):
    checks.check_half(FGDLoss, dtype, 1.0)


def test_one_image_of_one_cell():
    checks.check_one_image(FGDLoss)


def test_matching_of_levels():
    checks.check_matching(build)
    checks.check_strides_option(FGDLoss)


def test_zero_at_equality_before_the_context_blocks_differ():
    student = checks.make_pyramid(dtype=torch.float32)
    loss = FGDLoss(student, student)
    assert loss(student, student, checks.make_targets()) == 0


def test_context_block_starts_as_identity():
    x = checks.make_pyramid(4, dtype=torch.float32).levels[0]
    assert torch.equal(GlobalContext(4)(x), x)


def test_masks_worked_out_by_hand():
    """A 4 x 4 level of a 32 x 32 image, 8 pixels a cell.

    Box A, (8, 8)-(16, 16): columns floor(1) to ceil(2), rows the same, 2 x 2 = 4 cells, 1/4 each.
    Box B, (20, 0)-(32, 30): columns floor(2.5) to ceil(4) = 2..4 of which the map has 2..3, rows 0..4: 3 x 5 = 15
    cells before the edge cuts them, 1/15 each. Where both lie the larger share counts.
    """
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 16.0, 16.0], [20.0, 0.0, 32.0, 30.0]])}, {"boxes": torch.zeros(0, 4)}]
    foreground, background = foreground_and_background(targets, (4, 4), (32, 32))
    a, b = 1 / 4, 1 / 15
    expected_foreground = [[0, 0, b, b], [0, a, a, b], [0, a, a, b], [0, 0, b, b]]
    torch.testing.assert_close(foreground[0], torch.tensor(expected_foreground))
    free = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]) / 6
    torch.testing.assert_close(background[0], free)
    assert not foreground[1].any()
    torch.testing.assert_close(background[1], torch.full((4, 4), 1 / 16))


def test_a_box_over_the_whole_image_leaves_no_background():
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 32.0, 32.0]])}]
    foreground, background = foreground_and_background(targets, (4, 4), (32, 32))
    assert (foreground > 0).all()
    assert not background.any()


def test_targets_are_needed():
    student = checks.make_pyramid(dtype=torch.float32)
    checks.check_needs_targets(FGDLoss(student, student), student, student)


def test_bad_options_are_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match="relation_weight must be a finite number >= 0, got -1"):
        FGDLoss(student, student, relation_weight=-1)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        FGDLoss(student, student, temperature=0)


def test_the_context_block_has_a_bottleneck_of_half_its_width():
    assert [GlobalContext(width).transform[0].out_channels for width in (1, 5, 8)] == [1, 2, 4]


def test_default_weights_are_those_published_for_two_stages():
    student = checks.make_pyramid()
    weights = FGDLoss(student, checks.make_pyramid(seed=1)).weights
    assert weights == {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7}
