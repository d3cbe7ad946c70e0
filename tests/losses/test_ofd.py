"""OFD against loops over its equations, margins against integration, gradcheck, properties, and mistakes people make.

torchdistill has no OFD.
"""

import pytest
import torch
from torch import nn

from pcdistill.losses.ofd import OFDLoss, normal_margin, ofd_loss, stage_margin
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_counts,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
)
from tests.references import ofd as reference


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    students = [randn(3, 2, 4, 3), randn(3, 3, 2, 2, seed=1), randn(3, 2, 1, 2, seed=6)]
    teachers = [randn(3, 2, 4, 3, seed=2), randn(3, 3, 2, 2, seed=3), randn(3, 2, 1, 2, seed=7)]
    margins = [-randn(d, seed=4 + d).abs().to(dtype) for d in (2, 3, 2)]
    check_against_loop(
        lambda s, t: ofd_loss(s, t, margins, reduction="none"),
        lambda s, t: reference.ofd(s, t, [m.double().tolist() for m in margins]),
        students,
        teachers,
        dtype,
    )


@pytest.mark.parametrize(("student_size", "teacher_size"), [((6, 4), (3, 4)), ((2, 3), (5, 3)), ((4, 2), (2, 4))])
def test_the_larger_map_is_pooled(student_size, teacher_size):
    students, teachers, margins = [randn(2, 2, *student_size)], [randn(2, 2, *teacher_size, seed=1)], [-torch.ones(2)]
    check_against_loop(
        lambda s, t: ofd_loss(s, t, margins, reduction="none"),
        lambda s, t: reference.ofd(s, t, [[-1.0, -1.0]]),
        students,
        teachers,
        torch.float64,
    )


@pytest.mark.parametrize(
    ("mean", "deviation"),
    [(0.0, 1.0), (0.5, 1.0), (-2.0, 0.3), (3.0, 1.0), (3.2, 1.0), (30.0, 2.0), (-5.0, 0.5), (-1.0, 0.0), (1.0, 0.0)],
)
def test_margin_is_the_mean_of_the_negative_part(mean, deviation):
    ours = normal_margin(torch.tensor([mean]).double(), torch.tensor([deviation]).double())
    right = torch.tensor([reference.margin(mean, deviation)], dtype=torch.float64)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "value"),
    [
        (-0.1, -2.0, 0.9**2),  # the teacher is inactive: down to the margin -1
        (-1.5, -2.0, 0.0),  # below the margin already
        (-0.3, -0.5, 0.2**2),  # above the margin: down to the teacher
        (-0.7, -0.5, 0.0),
        (-3.0, 0.5, 3.5**2),  # the teacher is active: exactly
        (2.0, 0.5, 1.5**2),
    ],
)
def test_by_hand(student, teacher, value):
    cell = torch.ones(1, 1, 1, 1)
    ours = ofd_loss([student * cell], [teacher * cell], [torch.tensor([-1.0])])
    torch.testing.assert_close(ours, torch.tensor(value))


def test_gradcheck():
    teachers, margins = [randn(2, 3, 2, 2, seed=1)], [-torch.ones(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x: ofd_loss([x], teachers, margins), randn(2, 3, 2, 2).requires_grad_())


def test_properties():
    student, teacher, margin = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1), -torch.ones(3, dtype=torch.float64)
    value = ofd_loss([student], [teacher], [margin], reduction="none")
    assert value.gt(0).all()
    assert ofd_loss([teacher.clamp(min=-1)], [teacher], [margin]) == 0
    torch.testing.assert_close(
        ofd_loss([student.flip(0)], [teacher.flip(0)], [margin], reduction="none"), value.flip(0)
    )
    torch.testing.assert_close(ofd_loss([student.flip(1)], [teacher.flip(1)], [margin], reduction="none"), value)
    torch.testing.assert_close(ofd_loss([3 * student], [3 * teacher], [3 * margin], reduction="none"), 9 * value)
    three = ofd_loss([student] * 3, [teacher] * 3, [margin] * 3, reduction="none")
    torch.testing.assert_close(three, 1.75 * value)
    torch.testing.assert_close(ofd_loss([student], [teacher], [margin]), value.mean())
    torch.testing.assert_close(ofd_loss([student], [teacher], [margin], reduction="sum"), value.sum())


def test_margins_come_from_the_batch_normalisation():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    norms = [nn.BatchNorm2d(5), None, nn.BatchNorm2d(8, affine=False)]
    norms[0].weight.data.copy_(-torch.rand(5) - 0.1)
    norms[0].bias.data.copy_(torch.randn(5))
    loss = OFDLoss(student, teacher._replace(norms=norms))
    torch.testing.assert_close(loss.margins[0], normal_margin(norms[0].bias, norms[0].weight.abs()).detach())
    for margin, before in zip(loss.margins[1:], teacher.pre_activations[1:], strict=True):
        negative = [channel[channel < 0].mean() for channel in before.transpose(0, 1)]
        torch.testing.assert_close(margin, torch.stack(negative))
    assert all(not margin.requires_grad for margin in loss.margins)
    assert {"margin_0", "margin_1", "margin_2"} < loss.state_dict().keys()


def test_a_channel_that_is_never_negative_has_the_margin_zero():
    before = torch.ones(2, 3, 2, 2)
    assert stage_margin(None, before).eq(0).all()


def test_the_whole_module_matches_the_loops():
    student = make_features(3, dtype=torch.float64, sizes=(4, 2, 1), seed=1)
    teacher = make_features(3, widths=(5, 6, 8), sizes=(4, 2, 1), dtype=torch.float64, seed=2)
    loss = OFDLoss(student, teacher).double()
    connected = [
        reference.connect(x.tolist(), connector[0].weight.tolist())
        for x, connector in zip(student.pre_activations, loss.connectors, strict=True)
    ]
    right = reference.ofd(connected, [t.tolist() for t in teacher.pre_activations], [m.tolist() for m in loss.margins])
    torch.testing.assert_close(loss(student, teacher), torch.tensor(sum(right) / 3, dtype=torch.float64))


def test_the_module_keeps_the_rules():
    module = check_module(OFDLoss)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"connectors"}
    check_module(OFDLoss, sizes=(16, 8, 4))
    check_module(OFDLoss, sizes=(4, 2, 1))
    check_counts(OFDLoss)


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    assert OFDLoss(student, teacher)(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(OFDLoss, dtype)


def test_an_infinite_feature_that_does_not_count_adds_nothing():
    student, teacher = torch.full((1, 1, 1, 1), -torch.inf), torch.full((1, 1, 1, 1), -1.0)
    assert ofd_loss([student], [teacher], [torch.tensor([-0.5])]) == 0


@pytest.mark.parametrize(
    ("students", "teachers", "margins", "error", "says"),
    [
        ([torch.zeros(2, 3, 4, 4)], [], [], ValueError, "one length > 0, got 1 and 0"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], [], ValueError, "margins must be .* 1 stages, got 0"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 4, 4, 4)], [torch.zeros(3)], ValueError, r"got 3, 4 and \[3\]"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], [torch.zeros(4)], ValueError, r"got 3, 3 and \[4\]"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1).long()], [torch.zeros(3)], TypeError, "int64"),
    ],
)
def test_bad_input_is_named(students, teachers, margins, error, says):
    with pytest.raises(error, match=says):
        ofd_loss(students, teachers, margins)


def test_missing_pre_activations_are_named():
    features = make_features()
    with pytest.raises(ValueError, match="student's pre_activations must be given"):
        OFDLoss(features._replace(pre_activations=None), features)
    with pytest.raises(ValueError, match="teacher's pre_activations must be given"):
        OFDLoss(features, features._replace(pre_activations=None))
    loss = OFDLoss(features, features)
    fewer = features._replace(maps=features.maps[:2], pre_activations=features.pre_activations[:2])
    with pytest.raises(ValueError, match="teacher shows 2 maps now, 3"):
        loss(features, fewer)
    with pytest.raises(ValueError, match="student shows 2 maps now, 3"):
        loss(fewer, features)
    assert "(2, 2)" in repr(loss)
