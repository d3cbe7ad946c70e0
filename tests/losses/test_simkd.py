"""SimKD against loops over loss, projector and head, gradcheck, properties, and the mistakes people make.

torchdistill has no SimKD. That a run ships the student with its new head is tested in tests/engine/test_features.py.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pcdistill.losses.simkd import Projector, SimKDHead, SimKDLoss, simkd_loss
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
from tests.references import simkd as reference


@DTYPES
@pytest.mark.parametrize(("student_size", "teacher_size"), [((3, 2), (3, 2)), ((6, 4), (3, 4)), ((2, 3), (5, 3))])
def test_value_and_gradient_match_the_loop(dtype, student_size, teacher_size):
    check_against_loop(
        lambda s, t: simkd_loss(s[0], t[0], reduction="none"),
        lambda s, t: reference.simkd(s[0], t[0]),
        [randn(3, 2, *student_size)],
        [randn(3, 2, *teacher_size, seed=1)],
        dtype,
    )


def test_is_torchs_mean_squared_error():
    student, teacher = randn(3, 2, 3, 2), randn(3, 2, 3, 2, seed=1)
    torch.testing.assert_close(simkd_loss(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(simkd_loss(student, teacher, reduction="sum"), 3 * F.mse_loss(student, teacher))


def test_gradcheck():
    teacher = randn(2, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: simkd_loss(x, teacher), randn(2, 2, 2, 2).requires_grad_())


def test_zero_at_equality_and_blind_to_the_order_of_samples_and_channels():
    student, teacher = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    assert simkd_loss(teacher, teacher) == 0
    value = simkd_loss(student, teacher)
    assert value > 0
    torch.testing.assert_close(simkd_loss(student.flip(0), teacher.flip(0)), value)
    torch.testing.assert_close(simkd_loss(student.flip(1), teacher.flip(1)), value)


@pytest.mark.parametrize(("size", "teacher_size"), [((2, 2), (2, 2)), ((4, 3), (2, 2)), ((2, 2), (4, 4))], ids=str)
def test_module_and_head_match_the_loops(size, teacher_size):
    student = make_features(3, widths=(2,), sizes=(1,), dtype=torch.float64, seed=1)
    student = student._replace(maps=[randn(3, 2, *size, seed=5)])
    teacher = make_features(3, widths=(4,), sizes=(teacher_size[0],), dtype=torch.float64, seed=2)
    loss = SimKDLoss(student, teacher).double()
    weights = [layer.weight.tolist() for layer in loss.projector.layers if isinstance(layer, nn.Conv2d)]
    assert [(len(w), len(w[0]), len(w[0][0])) for w in weights] == [(2, 2, 1), (2, 2, 3), (4, 2, 1)]
    smaller = tuple(min(a, b) for a, b in zip(size, teacher_size, strict=True))
    projected = reference.project(student.maps[0].tolist(), weights, smaller)
    right = reference.simkd(projected, teacher.maps[0].tolist())
    torch.testing.assert_close(loss(student, teacher), torch.tensor(sum(right) / 3, dtype=torch.float64))
    head = loss.student_head().double()
    right = reference.classify(projected, teacher.classifier.weight.tolist(), teacher.classifier.bias.tolist())
    torch.testing.assert_close(head(student.maps[0]), torch.tensor(right, dtype=torch.float64))


def test_the_head_shares_the_projector_and_owns_a_frozen_copy_of_the_classifier():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    loss = SimKDLoss(student, teacher)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"projector"}
    head = loss.student_head()
    assert head.projector is loss.projector
    torch.testing.assert_close(head.classifier.weight.data, teacher.classifier.weight.data)
    assert head.classifier.weight is not teacher.classifier.weight
    assert not any(p.requires_grad for p in head.classifier.parameters())
    assert all(p.requires_grad for p in head.projector.parameters())
    bare = teacher._replace(classifier=nn.Linear(8, 5, bias=False))
    assert SimKDLoss(student, bare).student_head().classifier.bias is None


def test_a_student_that_has_the_teachers_features_has_its_logits():
    teacher = make_features(widths=(5, 6, 8), seed=2)
    head = SimKDLoss(make_features(seed=1), teacher).student_head()
    head.projector = nn.Identity()
    torch.testing.assert_close(head(teacher.maps[-1]), teacher.logits)


def test_a_head_is_built_again_from_its_config():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), sizes=(8, 4, 1), seed=2)
    for factor in (2, 3):
        head = SimKDLoss(student, teacher, factor=factor).student_head()
        twin = SimKDHead(**head.config())
        twin.load_state_dict(head.state_dict())
        torch.testing.assert_close(twin.eval()(student.maps[-1]), head.eval()(student.maps[-1]))
        assert head.projector.layers[0].out_channels == 8 // factor
    assert head.projector(student.maps[-1]).shape == (4, 8, 1, 1)
    bare = SimKDLoss(student, teacher._replace(classifier=nn.Linear(8, 5, bias=False))).student_head()
    assert SimKDHead(**bare.config()).classifier.bias is None


def test_other_image_sizes_than_the_observed_one():
    projector = Projector(3, 4, shrink=(0.5, 0.25))
    assert projector(randn(2, 3, 8, 8).float()).shape == (2, 4, 4, 2)
    assert projector(randn(2, 3, 5, 1).float()).shape == (2, 4, 2, 1)


def test_a_projected_map_is_not_projected_again():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    loss = SimKDLoss(student, teacher)
    projected = randn(4, 8, 2, 2, seed=5).float()
    state = {name: x.clone() for name, x in loss.state_dict().items()}
    value = loss(student._replace(projected=projected), teacher)
    torch.testing.assert_close(value, simkd_loss(projected, teacher.maps[-1]))
    assert all(torch.equal(x, state[name]) for name, x in loss.state_dict().items())


def test_only_the_deepest_map_gets_a_gradient():
    student, teacher = require_grad(make_features(seed=1)), make_features(widths=(5, 6, 8), seed=2)
    SimKDLoss(student, teacher)(student, teacher).backward()
    assert [x.grad is not None for x in student.maps] == [False, False, True]


def test_the_module_keeps_the_rules():
    check_module(SimKDLoss)
    check_module(SimKDLoss, sizes=(16, 8, 4))
    check_module(SimKDLoss, sizes=(4, 2, 1))
    check_counts(SimKDLoss)


def test_one_sample():
    student, teacher = make_features(1, sizes=(4, 2, 1), seed=1), make_features(1, sizes=(4, 2, 1), seed=2)
    assert SimKDLoss(student, teacher)(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(SimKDLoss, dtype)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), ValueError, r"one number of channels.*projector"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4), ValueError, "one N"),
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, r"maps \[N, D, H, W\], got \[2, 3\]"),
        (torch.zeros(2, 3, 4, 4).int(), torch.zeros(2, 3, 4, 4), TypeError, "int32"),
    ],
)
def test_bad_input_is_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        simkd_loss(student, teacher)


def test_bad_options_are_named():
    features = make_features()
    with pytest.raises(ValueError, match="factor must be > 0, got 0"):
        SimKDLoss(features, features, factor=0)
    with pytest.raises(ValueError, match="'avg'"):
        simkd_loss(features.maps[0], features.maps[0], reduction="avg")
    with pytest.raises(ValueError, match="SimKD needs the teacher's classifier"):
        SimKDLoss(features, features._replace(classifier=None))
    with pytest.raises(ValueError, match="linear classifier of the teacher, got Sequential"):
        SimKDLoss(features, features._replace(classifier=nn.Sequential()))
    assert "factor=3" in repr(SimKDLoss(features, features, factor=3))


def test_a_last_map_that_the_classifier_does_not_read_is_refused():
    features = make_features()
    for pooled in (features.pooled[:, :5], features.pooled * 1.1):
        with pytest.raises(ValueError, match="must be what its classifier reads after averaging.*teacher.features"):
            SimKDLoss(features, features._replace(pooled=pooled))
