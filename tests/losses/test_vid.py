"""VID against loops over the equation and its regressor, a peer, gradcheck, properties, the mistakes people make."""

import math

import pytest
import torch

from pcdistill.losses.vid import VariationalRegressor, VIDLoss, vid_loss
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
from tests.references import vid as reference


@DTYPES
def test_value_and_gradient_match_the_loop(dtype):
    mean, variance, teacher = randn(3, 2, 3, 2), randn(2, seed=2).exp(), randn(3, 2, 3, 2, seed=1)
    check_against_loop(
        lambda s, t: vid_loss(s[0], s[1], t[0], reduction="none"),
        lambda s, t: reference.vid(s[0], s[1], t[0]),
        [mean, variance],
        [teacher],
        dtype,
    )


def test_regressor_matches_the_loop():
    torch.manual_seed(0)
    regressor = VariationalRegressor(2, 3, initial_variance=2.0, eps=0.1).double()
    student = randn(2, 2, 2, 3)
    mean, variance = regressor(student)
    weights = [layer.weight.tolist() for layer in regressor.mean if hasattr(layer, "weight")]
    assert len(weights) == 3
    right = torch.tensor(reference.predict(student.tolist(), weights), dtype=torch.float64)
    torch.testing.assert_close(mean, right)
    right = torch.tensor(reference.variance(regressor.raw.tolist(), 0.1), dtype=torch.float64)
    torch.testing.assert_close(variance, right)


@pytest.mark.parametrize(("initial", "eps"), [(5.0, 1e-5), (0.5, 0.1), (1.0, 0.0)])
def test_the_variance_starts_where_asked_and_stays_above_eps(initial, eps):
    regressor = VariationalRegressor(2, 3, initial_variance=initial, eps=eps)
    variance = regressor(torch.zeros(1, 2, 1, 1))[1]
    torch.testing.assert_close(variance, torch.full((3,), initial))
    torch.nn.init.constant_(regressor.raw, -200.0)
    torch.testing.assert_close(regressor(torch.zeros(1, 2, 1, 1))[1], torch.full((3,), eps))


def test_torchdistill_agrees_on_loss_and_regressor():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    from torchdistill.models.wrapper import Regressor4VID

    theirs = Regressor4VID(4, 5, 5, eps=1e-5, init_pred_var=5.0).double()
    ours = VariationalRegressor(4, 5).double()
    convolutions = [m for m in theirs.modules() if isinstance(m, torch.nn.Conv2d)]
    own = [m for m in ours.modules() if isinstance(m, torch.nn.Conv2d)]
    for a, b in zip(own, convolutions, strict=True):
        a.weight.data.copy_(b.weight.data)
        assert a.bias is b.bias is None
    student, teacher = randn(3, 4, 2, 2), randn(3, 5, 2, 2, seed=1)
    prediction = theirs(student)
    pairs = {"p": {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}}
    right = mid_level.VIDLoss(pairs)({"s": {"output": prediction}}, {"t": {"output": teacher}})
    torch.testing.assert_close(vid_loss(*ours(student), teacher), right, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    teacher = randn(2, 2, 2, 2, seed=1)
    inputs = (randn(2, 2, 2, 2).requires_grad_(), randn(2, seed=2).exp().requires_grad_())
    assert torch.autograd.gradcheck(lambda m, v: vid_loss(m, v, teacher), inputs)


def test_least_where_mean_and_variance_are_the_teachers():
    teacher = randn(4, 2, 3, 3)
    variance = (teacher - teacher.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3)).requires_grad_()
    mean = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher).contiguous()
    vid_loss(mean, variance, teacher).backward()
    torch.testing.assert_close(variance.grad, torch.zeros(2, dtype=torch.float64))
    exact = vid_loss(teacher, variance, teacher)
    torch.testing.assert_close(exact, variance.log().mean() / 2)
    assert vid_loss(teacher + 0.1, variance, teacher) > exact


def test_properties():
    mean, variance, teacher = randn(4, 3, 2, 2), randn(3, seed=2).exp(), randn(4, 3, 2, 2, seed=1)
    value = vid_loss(mean, variance, teacher, reduction="none")
    assert value.shape == (4,)
    torch.testing.assert_close(vid_loss(mean, variance, teacher), value.mean())
    torch.testing.assert_close(vid_loss(mean, variance, teacher, reduction="sum"), value.sum())
    torch.testing.assert_close(vid_loss(mean.flip(0), variance, teacher.flip(0), reduction="none"), value.flip(0))
    torch.testing.assert_close(vid_loss(mean.flip(1), variance.flip(0), teacher.flip(1), reduction="none"), value)
    scaled = vid_loss(3 * mean, 9 * variance, 3 * teacher, reduction="none")
    torch.testing.assert_close(scaled, value + math.log(3))  # a change of unit shifts it


def test_module_is_the_sum_over_all_stages():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), sizes=(8, 4, 2), seed=2)
    loss = VIDLoss(student, teacher)
    parts = [
        vid_loss(*regressor(s), t) for regressor, s, t in zip(loss.regressors, student.maps, teacher.maps, strict=True)
    ]
    torch.testing.assert_close(loss(student, teacher), sum(parts))
    assert len(parts) == 3
    assert "(2, 2)" in repr(loss)


def test_a_larger_map_is_pooled():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), sizes=(16, 4, 1), seed=2)
    loss = VIDLoss(student, teacher)
    s = [student.maps[0], student.maps[1], student.maps[2].mean((2, 3), keepdim=True)]
    t = [torch.nn.functional.avg_pool2d(teacher.maps[0], 2), teacher.maps[1], teacher.maps[2]]
    parts = [vid_loss(*regressor(a), b) for regressor, a, b in zip(loss.regressors, s, t, strict=True)]
    torch.testing.assert_close(loss(student, teacher), sum(parts))


def test_the_module_keeps_the_rules():
    module = check_module(VIDLoss)
    assert not module.state_dict().keys() - {
        f"regressors.{i}.{name}" for i in range(3) for name in ("raw", *(f"mean.{k}.weight" for k in (0, 2, 4)))
    }
    check_module(VIDLoss, sizes=(16, 8, 4))
    check_counts(VIDLoss)


def test_options_reach_the_regressors():
    features = make_features()
    loss = VIDLoss(features, features, initial_variance=2.0, eps=0.5)
    for regressor, x in zip(loss.regressors, features.maps, strict=True):
        torch.testing.assert_close(regressor(x)[1], torch.full_like(regressor.raw, 2.0))
        assert regressor.eps == 0.5


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    assert VIDLoss(student, teacher)(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(VIDLoss, dtype)


@pytest.mark.parametrize(
    ("mean", "variance", "teacher", "error", "says"),
    [
        (torch.zeros(2, 3, 4, 4), torch.ones(3), torch.zeros(2, 5, 4, 4), ValueError, "one shape"),
        (torch.zeros(2, 3, 4, 4), torch.ones(4), torch.zeros(2, 3, 4, 4), ValueError, r"must be \[3\].*got \[4\]"),
        (torch.zeros(2, 3), torch.ones(3), torch.zeros(2, 3), ValueError, r"got \[2, 3\]"),
        (torch.zeros(2, 3, 4, 4).int(), torch.ones(3), torch.zeros(2, 3, 4, 4), TypeError, "int32"),
    ],
)
def test_bad_input_is_named(mean, variance, teacher, error, says):
    with pytest.raises(error, match=says):
        vid_loss(mean, variance, teacher)


def test_bad_options_are_named():
    features = make_features()
    with pytest.raises(ValueError, match="initial_variance must be .* > eps = 1e-05, got 0.0"):
        VIDLoss(features, features, initial_variance=0.0)
    with pytest.raises(ValueError, match="eps must be .* >= 0, got -1"):
        VIDLoss(features, features, eps=-1)
    with pytest.raises(ValueError, match="'avg'"):
        vid_loss(torch.zeros(2, 3, 1, 1), torch.ones(3), torch.zeros(2, 3, 1, 1), reduction="avg")
