"""DFMSD against a loop, each part switched alone, its stages, and what every loss on pyramids must stand."""

import itertools

import pytest
import torch

from pcdistill.losses._pyramid import Pyramid
from pcdistill.losses.dfmsd import DFMSDLoss
from pcdistill.losses.dmkd import DMKDLoss
from pcdistill.losses.pkd import PKDLoss
from tests.losses import pyramid_checks as checks
from tests.references import dfmsd as reference


def at(loss, progress):
    loss.set_progress(progress=progress, epoch=0.0)
    return loss


def expected(loss, student, teacher):
    masked = loss.masked[loss.teacher_index]
    return reference.dfmsd(
        checks.plain(student),
        checks.plain(teacher),
        None if loss.masking == "none" else [checks.masking_of(part) for part in masked],
        checks.BOXES,
        checks.IMAGE_SIZE,
        progress=loss.progress,
        enhancement=loss.enhancement,
        adapting=loss.stages and len(loss.align) == 1 and loss.progress < 1 / 3,
        alignment=loss.alignment,
    )


@checks.DTYPES
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.9])
def test_value_and_gradient_match_the_loop(dtype, progress):
    checks.check_dtypes(lambda s, t: at(DFMSDLoss(s, t), progress), expected, dtype)


@pytest.mark.parametrize("masking", ["both", "spatial", "channel", "none"])
@pytest.mark.parametrize(
    ("enhancement", "stages", "alignment"), list(itertools.product([True, False], repeat=3)), ids=str
)
def test_every_combination_of_parts_matches_the_loop(masking, enhancement, stages, alignment):
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    options = {"masking": masking, "enhancement": enhancement, "stages": stages, "alignment": alignment}
    loss = checks.shake(DFMSDLoss(student, teacher, **options)).double()
    for progress in (0.3, 0.8):
        at(loss, progress)
        value = loss(student, teacher, checks.make_targets())
        torch.testing.assert_close(value.item(), expected(loss, student, teacher))


def test_every_part_has_an_effect():
    sizes = {"sizes": ((16, 24), (8, 12))}
    student, teacher = checks.make_pyramid(4, **sizes), checks.make_pyramid(4, seed=1, **sizes)
    values = {}
    for off in ("nothing", "enhancement", "stages", "alignment", "spatial", "channel"):
        options = {"masking": {"spatial": "channel", "channel": "spatial"}.get(off, "both")}
        options.update({off: False} if off in ("enhancement", "stages", "alignment") else {})
        torch.manual_seed(0)
        loss = at(DFMSDLoss(student, teacher, **options).double(), 0.32)
        values[off] = round(loss(student, teacher, checks.make_targets()).item(), 6)
    assert len(set(values.values())) == 6, values


@pytest.mark.parametrize("alignment", [True, False])
def test_gradcheck(alignment):
    # After the first stage: before, the target holds the student as a constant, which differences cannot see.
    checks.check_gradient(lambda s, t: at(DFMSDLoss(s, t, alignment=alignment), 0.5))


def test_every_parameter_learns():
    checks.check_parameters_learn(lambda s, t: DFMSDLoss(s, t, channel_ratio=0.4))


def test_no_gradient_into_the_teacher_nor_into_the_student_as_a_target():
    checks.check_teacher_is_constant(DFMSDLoss)
    student, teacher = checks.make_pyramid(leaf=True), checks.make_pyramid(seed=1)
    loss = checks.shake(DFMSDLoss(student, teacher, alignment=False, spatial_ratio=1.0, channel_ratio=1.0)).double()
    loss(student, teacher, checks.make_targets()).backward()  # all masked: the student is in the target only
    assert not any(x.grad.any() for x in student.levels)


@checks.HALF
@pytest.mark.parametrize("alignment", [True, False])
def test_finite_in_half_precision(dtype, alignment):
    checks.check_half(lambda s, t: DFMSDLoss(s, t, alignment=alignment), dtype, 6.0 if alignment else 1e-3)


def test_one_image_of_one_cell():
    checks.check_one_image(DFMSDLoss)


def test_matching_of_levels():
    checks.check_matching(DFMSDLoss)
    checks.check_strides_option(DFMSDLoss)


def test_without_masking_and_stages_it_is_twice_pkd():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    loss = DFMSDLoss(student, teacher, masking="none", stages=False)
    torch.testing.assert_close(loss(student, teacher), 2 * PKDLoss(student, teacher)(student, teacher))


def test_with_dual_masking_alone_it_is_dmkd_by_the_mean():
    student, teacher = checks.make_pyramid(2), checks.make_pyramid(3, seed=1)
    off = {"enhancement": False, "stages": False, "alignment": False}
    ours = checks.shake(DFMSDLoss(student, teacher, **off)).double()
    theirs = DMKDLoss(student, teacher, reduction="mean").double()
    names = {"align.0.": "align.", "masked.0.": "masking."}
    state = {}
    for key, value in ours.state_dict().items():
        prefix = next(p for p in names if key.startswith(p))
        state[names[prefix] + key.removeprefix(prefix)] = value
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(student, teacher), theirs(student, teacher))


def test_enhancement_masks_more_of_the_objects_as_training_goes_on():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    loss = DFMSDLoss(student, teacher)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 15.0, 15.0]])}] * 2
    masked = []
    for progress in (0.0, 0.5, 0.99):
        spatial, channel = at(loss, progress).masks(student, teacher, targets)[0]
        assert (spatial == 0).sum(dim=(1, 2)).tolist() == [12, 12]  # their number stays
        assert channel.shape == (2, 3)
        masked.append((spatial[:, 0:3, 0:3] == 0).sum().item())
    assert masked == sorted(masked)
    assert masked[-1] > masked[0]
    plain = DFMSDLoss(student, teacher, enhancement=False)
    assert (plain.masks(student, teacher)[0][0][:, 0:3, 0:3] == 0).sum().item() == masked[0]


def test_two_teachers_take_turns():
    student = checks.make_pyramid(2)
    first, second = checks.make_pyramid(3, seed=1), checks.make_pyramid(4, sizes=((2, 3),), strides=(16,), seed=2)
    loss = checks.shake(DFMSDLoss(student, [first, second])).double()
    targets = checks.make_targets()
    assert [at(loss, p).teacher_index for p in (0.0, 0.49, 0.5, 0.99)] == [0, 0, 1, 1]
    wanted = at(checks.shake(DFMSDLoss(student, [first, second], stages=False)).double(), 0.6)
    assert wanted.teacher_index == 1
    torch.testing.assert_close(at(loss, 0.6)(student, second, targets), wanted(student, second, targets))
    assert torch.isfinite(at(loss, 0.1)(student, first, targets))
    with pytest.raises(ValueError, match="built for strides"):
        at(loss, 0.1)(student, second, targets)
    with pytest.raises(ValueError, match="one pyramid or two, got 3"):
        DFMSDLoss(student, [first, second, first])


def test_of_two_teachers_none_is_mixed_with_the_student():
    """The teachers are the stages, where one teacher has a stage half way to it."""
    student = checks.make_pyramid()
    first, second = checks.make_pyramid(seed=1), checks.make_pyramid(seed=2)
    loss = at(checks.shake(DFMSDLoss(student, [first, second])).double(), 0.1)
    value = loss(student, first, checks.make_targets()).item()
    torch.testing.assert_close(value, expected(loss, student, first))
    alone = at(checks.shake(DFMSDLoss(student, first)).double(), 0.1)
    alone.load_state_dict({key: value for key, value in loss.state_dict().items() if key.split(".")[1] == "0"})
    assert alone(student, first, checks.make_targets()).item() != value


def test_temperature_decides_what_the_enhancement_can_turn():
    """Flat attention puts the objects first; sharp attention keeps its own order."""
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 15.0, 15.0]])}] * 2
    masked = {}
    for temperature in (0.01, 100.0):
        loss = at(DFMSDLoss(student, teacher, temperature=temperature), 0.99)
        masked[temperature] = (loss.masks(student, teacher, targets)[0][0][:, 0:3, 0:3] == 0).sum().item()
    assert masked[100.0] == 18
    assert masked[0.01] < 18


def test_stages_move_the_target_from_between_to_the_teacher():
    student, teacher = checks.make_pyramid(), checks.make_pyramid(seed=1)
    loss = DFMSDLoss(student, teacher, masking="none", alignment=False)
    whole = at(loss, 0.34)(student, teacher)
    torch.testing.assert_close(at(loss, 0.33)(student, teacher), whole / 4)  # half the way, a quarter of the square
    assert loss(student, student) == 0


def test_targets_are_needed_only_where_boxes_are_used():
    student = checks.make_pyramid(dtype=torch.float32)
    checks.check_needs_targets(DFMSDLoss(student, student), student, student)
    for masking in ("both", "spatial"):
        assert DFMSDLoss(student, student, masking=masking).needs.labels
    for options in ({"enhancement": False}, {"masking": "channel"}, {"masking": "none"}):
        loss = DFMSDLoss(student, student, **options)
        assert not loss.needs.labels
        assert torch.isfinite(loss(student, student))


def test_bad_options_are_refused():
    student = checks.make_pyramid()
    with pytest.raises(ValueError, match="masking must be 'both', 'spatial', 'channel' or 'none', got 'all'"):
        DFMSDLoss(student, student, masking="all")
    with pytest.raises(ValueError, match="spatial_ratio must be between 0 and 1"):
        DFMSDLoss(student, student, spatial_ratio=1.1)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        DFMSDLoss(student, student, temperature=-1)
    with pytest.raises(ValueError, match="there are no masks"):
        DFMSDLoss(student, student, masking="none").masks(student, student)


def test_boxes_follow_the_image_and_not_the_stride():
    """A padded batch: 30 x 44 pixels of image in 32 x 48; the level's cells cover the padded batch."""
    student = checks.make_pyramid()
    loss = at(DFMSDLoss(student, student), 0.99)
    inside = [{"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]])}] * 2
    wider = Pyramid(student.levels, student.strides, (64, 96))
    a = loss.masks(student, student, inside)[0][0]
    b = loss.masks(wider, wider, [{"boxes": 2 * t["boxes"]} for t in inside])[0][0]
    assert torch.equal(a, b)
