"""ReviewKD against loops over loss and fusion, a peer, gradcheck, properties, and the mistakes people make."""

import pytest
import torch
from torch.nn import functional as F

from pcdistill.losses.reviewkd import Fusion, ReviewKDLoss, reviewkd_loss
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
from tests.references import reviewkd as reference


@DTYPES
@pytest.mark.parametrize("levels", [(4, 2, 1), (3,), ()], ids=str)
def test_value_and_gradient_match_the_loop(dtype, levels):
    shapes = [(3, 2, 5, 6), (3, 2, 4, 3), (3, 3, 1, 1)]
    check_against_loop(
        lambda s, t: reviewkd_loss(s, t, levels=levels, reduction="none"),
        lambda s, t: reference.hcl(s, t, levels),
        [randn(*shape, seed=i) for i, shape in enumerate(shapes)],
        [randn(*shape, seed=9 + i) for i, shape in enumerate(shapes)],
        dtype,
    )


def weights(fusion):
    attention = fusion.attention
    found = None if attention is None else (attention.weight.tolist(), attention.bias.tolist())
    return fusion.enter[0].weight.tolist(), fusion.leave[0].weight.tolist(), found


@pytest.mark.parametrize(("size", "teacher_size"), [((2, 2), (2, 2)), ((4, 3), (2, 2)), ((2, 2), (3, 4))], ids=str)
def test_fusion_matches_the_loop(size, teacher_size):
    torch.manual_seed(0)
    fusion = Fusion(2, 3, 4, fuse=True).double()
    student, residual = randn(2, 2, *size), randn(2, 3, 1, 1, seed=1)
    out, left = fusion(student, residual, teacher_size)
    right = reference.fuse(student.tolist(), residual.tolist(), teacher_size, *weights(fusion))
    for ours, theirs in zip((out, left), right, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64))


def test_the_whole_module_matches_the_loops():
    student = make_features(3, widths=(2, 3), sizes=(4, 2), dtype=torch.float64, seed=1)
    teacher = make_features(3, widths=(3, 2), sizes=(4, 2), dtype=torch.float64, seed=2)
    loss = ReviewKDLoss(student, teacher).double()
    s = [student.pooled[:, :, None, None], student.maps[1], student.maps[0]]
    t = [teacher.pooled[:, :, None, None], teacher.pre_activations[1], teacher.pre_activations[0]]
    residual, fused = None, []
    for fusion, a, b in zip(loss.fusions, s, t, strict=True):
        out, residual = reference.fuse(a.tolist(), residual, tuple(b.shape[2:]), *weights(fusion))
        fused.append(out)
    right = reference.hcl(fused, [b.tolist() for b in t], (4, 2, 1))
    torch.testing.assert_close(loss(student, teacher), torch.tensor(sum(right) / 3, dtype=torch.float64))


def test_torchdistill_agrees_on_loss_and_fusion():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    from torchdistill.models.wrapper import AttentionBasedFusion

    student, teacher = randn(3, 2, 7, 7), randn(3, 2, 7, 7, seed=1)
    peer = mid_level.HierarchicalContextLoss("s", "output", "t", "output")
    right = peer({"s": {"output": (student.clone(), None)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(reviewkd_loss([student], [teacher]), right, rtol=1e-5, atol=1e-6)

    theirs = AttentionBasedFusion(2, 3, 4, uses_attention=True).double()
    ours = Fusion(2, 3, 4, fuse=True).double()
    ours.load_state_dict(
        dict(zip(ours.state_dict(), [*theirs.conv1.state_dict().values(), *theirs.conv2.state_dict().values(),
                                     *theirs.attention_conv.state_dict().values()], strict=True))
    )  # fmt: skip
    residual = randn(3, 3, 2, 2, seed=2)
    for a, b in zip(ours(student, residual, (7, 7)), theirs(student, residual, 7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    teachers = [randn(2, 2, 3, 3, seed=1)]
    assert torch.autograd.gradcheck(lambda x: reviewkd_loss([x], teachers), randn(2, 2, 3, 3).requires_grad_())


def test_by_hand():
    """A difference of +1 and -1 in a 2 x 1 map: the grid of one cell sees 0."""
    student = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1).expand(1, 1, 2, 2)
    value = reviewkd_loss([student], [torch.zeros(1, 1, 2, 2)])
    torch.testing.assert_close(value, torch.tensor(1 / 1.5))


def test_properties():
    student, teacher = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    value = reviewkd_loss([student], [teacher], reduction="none")
    assert value.gt(0).all()
    assert reviewkd_loss([teacher], [teacher]) == 0
    torch.testing.assert_close(reviewkd_loss([student], [teacher]), value.mean())
    torch.testing.assert_close(reviewkd_loss([student], [teacher], reduction="sum"), value.sum())
    torch.testing.assert_close(reviewkd_loss([3 * student], [3 * teacher], reduction="none"), 9 * value)
    torch.testing.assert_close(reviewkd_loss([student.flip(1)], [teacher.flip(1)], reduction="none"), value)
    torch.testing.assert_close(reviewkd_loss([student.flip(0)], [teacher.flip(0)], reduction="none"), value.flip(0))
    torch.testing.assert_close(reviewkd_loss([student] * 3, [teacher] * 3, reduction="none"), 3 * value)
    torch.testing.assert_close(reviewkd_loss([student + 1], [student]), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(reviewkd_loss([student], [teacher], levels=()), F.mse_loss(student, teacher))


def test_shallow_goals_teach_the_deeper_stages():
    student, teacher = require_grad(make_features(seed=1)), make_features(widths=(5, 6, 8), seed=2)
    loss = ReviewKDLoss(student, teacher)
    features = [student.pooled[:, :, None, None], *student.maps[::-1]]
    residual = None
    for fusion, x, goal in zip(loss.fusions, features, [teacher.pooled[:, :, None, None], *teacher.maps[::-1]],
                               strict=True):  # fmt: skip
        out, residual = fusion(x, residual, tuple(goal.shape[2:]))
    out.square().sum().backward()  # the shallowest stage alone
    assert all(x.grad is not None for x in (student.pooled, *student.maps))


def test_middle_width():
    student, teacher = make_features(seed=1), make_features(seed=2)
    assert {f.enter[0].out_channels for f in ReviewKDLoss(student, teacher).fusions} == {6}
    assert {f.enter[0].out_channels for f in ReviewKDLoss(student, teacher, middle_width=3).fusions} == {3}
    wide = make_features(widths=(3, 600), sizes=(4, 2))
    assert {f.enter[0].out_channels for f in ReviewKDLoss(wide, wide).fusions} == {512}


def test_levels_reach_the_loss():
    student, teacher = make_features(seed=1), make_features(seed=2)
    values = []
    for levels in ((4, 2, 1), ()):
        torch.manual_seed(0)
        values.append(ReviewKDLoss(student, teacher, levels=levels)(student, teacher))
    assert values[0] != values[1]


def test_the_module_keeps_the_rules():
    module = check_module(ReviewKDLoss)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"fusions"}
    check_module(ReviewKDLoss, sizes=(16, 8, 4))
    check_module(ReviewKDLoss, sizes=(4, 2, 1))
    check_counts(ReviewKDLoss)


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    loss = ReviewKDLoss(student, teacher)
    assert loss(student, teacher).isfinite()
    loss.eval()
    assert loss(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(ReviewKDLoss, dtype)


@pytest.mark.parametrize(
    ("students", "teachers", "options", "error", "says"),
    [
        ([torch.zeros(2, 3, 4, 4)], [], {}, ValueError, "one length > 0, got 1 and 0"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 2, 2)], {}, ValueError, "one shape"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1).long()], {}, TypeError, "int64"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1)], {"levels": (2, 0)}, ValueError, r"levels.*\(2, 0\)"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1)], {"reduction": "avg"}, ValueError, "'avg'"),
    ],
)
def test_bad_input_is_named(students, teachers, options, error, says):
    with pytest.raises(error, match=says):
        reviewkd_loss(students, teachers, **options)


def test_bad_options_are_named():
    features = make_features()
    with pytest.raises(ValueError, match=r"levels must be whole numbers.*\(1.5,\)"):
        ReviewKDLoss(features, features, levels=[1.5])
    with pytest.raises(ValueError, match="middle_width must be > 0, got 0"):
        ReviewKDLoss(features, features, middle_width=0)
    with pytest.raises(ValueError, match="teacher's pre_activations must be given"):
        ReviewKDLoss(features, features._replace(pre_activations=None))
    loss = ReviewKDLoss(features, features)
    with pytest.raises(ValueError, match="student shows 2 maps now, 3"):
        loss(features._replace(maps=features.maps[:2]), features)
    assert "levels=(4, 2, 1)" in repr(loss)
