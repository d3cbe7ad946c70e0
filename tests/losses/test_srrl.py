"""SRRL against loops over its equations and connector, gradcheck, properties, and the mistakes people make.

torchdistill has no SRRL.
"""

import pytest
import torch
from torch import nn

from pcdistill.losses.srrl import SRRLLoss, srrl_loss
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
from tests.references import srrl as reference


@DTYPES
@pytest.mark.parametrize(("feature_weight", "regression_weight"), [(1.0, 1.0), (0.5, 3.0)])
def test_value_and_gradient_match_the_loop(dtype, feature_weight, regression_weight):
    weights = {"feature_weight": feature_weight, "regression_weight": regression_weight}
    check_against_loop(
        lambda s, t: srrl_loss(s[0], t[0], s[1], t[1], reduction="none", **weights),
        lambda s, t: reference.srrl(s[0], t[0], s[1], t[1], **weights),
        [randn(3, 4), randn(3, 5, seed=1)],
        [randn(3, 4, seed=2), randn(3, 5, seed=3)],
        dtype,
    )


def test_each_weight_alone():
    h_s, h_t, p, z = randn(3, 4), randn(3, 4, seed=1), randn(3, 5, seed=2), randn(3, 5, seed=3)
    mse = nn.functional.mse_loss
    torch.testing.assert_close(srrl_loss(h_s, h_t, p, z, regression_weight=0.0), mse(h_s, h_t))
    torch.testing.assert_close(srrl_loss(h_s, h_t, p, z, feature_weight=0.0), mse(p, z))
    torch.testing.assert_close(srrl_loss(h_s, h_t, p, z), mse(h_s, h_t) + mse(p, z))
    torch.testing.assert_close(srrl_loss(h_s, h_t, p, z, reduction="sum"), 3 * srrl_loss(h_s, h_t, p, z))


def test_gradcheck():
    h_t, z = randn(2, 3, seed=1), randn(2, 4, seed=3)
    inputs = (randn(2, 3).requires_grad_(), randn(2, 4, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda h, p: srrl_loss(h, h_t, p, z), inputs)


def test_zero_at_equality_and_blind_to_the_order_of_samples():
    h_s, h_t, p, z = randn(3, 4), randn(3, 4, seed=1), randn(3, 5, seed=2), randn(3, 5, seed=3)
    assert srrl_loss(h_t, h_t, z, z) == 0
    value = srrl_loss(h_s, h_t, p, z, reduction="none")
    torch.testing.assert_close(srrl_loss(h_s.flip(0), h_t.flip(0), p.flip(0), z.flip(0), reduction="none"),
                               value.flip(0))  # fmt: skip


@pytest.mark.parametrize("size", [2, 5])
def test_the_whole_module_matches_the_loops(size):
    student = make_features(3, sizes=(8, 4, size), dtype=torch.float64, seed=1)
    teacher = make_features(3, widths=(5, 6, 8), dtype=torch.float64, seed=2)
    loss = SRRLLoss(student, teacher, feature_weight=2.0, regression_weight=3.0).double()
    embedding = reference.connect(student.maps[-1].tolist(), loss.connector[0].weight.tolist())
    predicted = reference.classify(embedding, teacher.classifier.weight.tolist(), teacher.classifier.bias.tolist())
    right = reference.srrl(embedding, teacher.pooled.tolist(), predicted, teacher.logits.tolist(), 2.0, 3.0)
    torch.testing.assert_close(loss(student, teacher), torch.tensor(sum(right) / 3, dtype=torch.float64))


def test_the_teachers_classifier_is_used_as_it_is_and_not_kept():
    student, teacher = require_grad(make_features(seed=1)), make_features(widths=(5, 6, 8), seed=2)
    loss = SRRLLoss(student, teacher, feature_weight=0.0)
    assert not any("classifier" in name for name in loss.state_dict())
    value = loss(student, teacher)
    value.backward()
    assert student.maps[-1].grad.abs().max() > 0
    assert teacher.classifier.weight.grad is None
    teacher.classifier.weight.data.zero_()
    assert loss(student, teacher) != value


def test_the_module_weighs_both_parts_alike_by_default():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), seed=2)
    values = []
    for options in ({}, {"feature_weight": 1.0, "regression_weight": 1.0}):
        torch.manual_seed(0)
        values.append(SRRLLoss(student, teacher, **options)(student, teacher))
    assert values[0] == values[1]


def test_relu_can_be_left_out():
    student, teacher = make_features(seed=1), make_features(seed=2)
    for relu in (True, False):
        connected = SRRLLoss(student, teacher, relu=relu).connector(student.maps[-1])
        assert bool(connected.lt(0).any()) is not relu


def test_the_module_keeps_the_rules():
    module = check_module(SRRLLoss)
    assert {name for name, _ in module.named_parameters()} == {
        "connector.0.weight",
        "connector.1.weight",
        "connector.1.bias",
    }
    check_module(SRRLLoss, sizes=(16, 8, 4))
    check_counts(SRRLLoss)


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    assert SRRLLoss(student, teacher)(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(SRRLLoss, dtype)


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, 5)), ValueError, "one shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 6)), ValueError, r"\[2, 6\]"),
        ((torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(2, 5), torch.zeros(2, 5)), ValueError, r"\[N, D\]"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 5)), TypeError, "int32"),
    ],
)
def test_bad_input_is_named(tensors, error, says):
    with pytest.raises(error, match=says):
        srrl_loss(*tensors)


def test_bad_options_are_named():
    features = make_features()
    for name in ("feature_weight", "regression_weight"):
        with pytest.raises(ValueError, match=f"{name} must be .* >= 0, got -1"):
            SRRLLoss(features, features, **{name: -1})
        with pytest.raises(ValueError, match=f"{name} must be .* >= 0, got -1"):
            srrl_loss(features.pooled, features.pooled, features.logits, features.logits, **{name: -1})
    with pytest.raises(ValueError, match="SRRL needs the teacher's classifier.*shows none"):
        SRRLLoss(features, features._replace(classifier=None))
    with pytest.raises(ValueError, match=r"maps \[N, D, H, W\]"):
        SRRLLoss(features._replace(maps=[features.pooled]), features)
    assert "regression_weight=5" in repr(SRRLLoss(features, features, regression_weight=5.0))
