"""What the feature losses share: the pairing of stages, pooling to one size, safe unit vectors."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    call_frozen,
    full_precision,
    match_size,
    nothing,
    pair_stages,
    pick_stage,
    pre_activations,
    unit,
)
from tests.losses.feature_checks import make_features, randn


def maps(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 2, size, size) for size in sizes]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((32, 16, 8), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),
        ((32, 16, 8), (8, 8, 8), [(0, 0), (1, 1), (2, 2)]),  # equal numbers: in order, whatever the sizes
        ((32, 16, 8), (64, 32, 16, 8), [(0, 1), (1, 2), (2, 3)]),
        ((16, 8, 4, 2), (32, 16, 8), [(1, 0), (2, 1), (3, 2)]),  # relative to the deepest
        ((16, 8, 4, 4), (32, 16, 8), [(0, 0), (1, 1), (3, 2)]),
        ((7,), (14, 14, 7, 7), [(0, 3)]),
        ((14, 14, 14), tuple([14] * 12), [(0, 3), (1, 7), (2, 11)]),  # all alike: evenly spaced
        ((28, 14, 7), (56, 28, 28, 14, 14, 14, 7), [(0, 1), (1, 4), (2, 6)]),
    ],
)
def test_stages_are_paired_by_relative_resolution(student, teacher, expected):
    assert pair_stages(maps(*student), maps(*teacher)) == expected
    assert pair_stages(maps(*teacher), maps(*student)) == [(j, i) for i, j in expected]


def test_no_stages_cannot_be_paired():
    with pytest.raises(ValueError, match="got 0 of the student and 1 of the teacher"):
        pair_stages([], maps(4))


def test_pick_stage_counts_from_both_ends():
    pairs = [(0, 1), (1, 2), (2, 3)]
    assert pick_stage(pairs, 0) == (0, 1)
    assert pick_stage(pairs, -1) == pick_stage(pairs, 2) == (2, 3)
    assert pick_stage(pairs, -3) == (0, 1)
    for stage in (3, -4):
        with pytest.raises(ValueError, match=rf"stage must be in \[-3, 2\].*got {stage}"):
            pick_stage(pairs, stage)


@pytest.mark.parametrize(
    ("a", "b", "size"), [((4, 4), (2, 2), (2, 2)), ((3, 6), (6, 3), (3, 3)), ((5, 5), (5, 5), (5, 5))]
)
def test_the_larger_map_is_pooled_to_the_smaller(a, b, size):
    x, y = randn(2, 3, *a), randn(2, 4, *b, seed=1)
    small_x, small_y = match_size(x, y)
    assert torch.equal(small_x, F.adaptive_avg_pool2d(x, size))
    assert torch.equal(small_y, F.adaptive_avg_pool2d(y, size))
    if a == size:
        assert small_x is x


def test_unit_has_length_one_and_zero_stays_zero_without_a_gradient():
    x = randn(4, 5)
    torch.testing.assert_close(unit(x, 1), F.normalize(x, dim=1))
    x[2] = 0
    x.requires_grad_()
    direction = unit(x, 1)
    (direction * randn(4, 5, seed=1)).sum().backward()
    assert direction[2].eq(0).all()
    assert x.grad[2].eq(0).all()
    assert x.grad[1].ne(0).all()
    assert torch.autograd.gradcheck(lambda z: unit(z, 1), randn(3, 4).requires_grad_())


def test_nothing_is_zero_with_a_graph():
    features = make_features(n=0)
    features = features._replace(maps=[x.requires_grad_() for x in features.maps])
    value = nothing(features)
    value.backward()
    assert value == 0
    assert all(x.grad is not None for x in features.maps)


def test_missing_pre_activations_are_named():
    features = make_features()
    assert pre_activations(features, "student") is features.pre_activations
    for wrong in (None, features.pre_activations[:1]):
        with pytest.raises(ValueError, match="the teacher's pre_activations must be given"):
            pre_activations(features._replace(pre_activations=wrong), "teacher")


def test_full_precision_turns_autocast_off_and_allows_devices_without_it():
    x = randn(3, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
    with full_precision(x.to("meta")):
        pass


def test_features_can_be_replaced_in_part():
    features = make_features()
    moved = features._replace(logits=features.logits + 1)
    assert isinstance(moved, Features)
    assert moved.maps is features.maps


def test_adapter_norm_takes_one_value_per_channel():
    norm, right = AdapterNorm(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    torch.testing.assert_close(norm(x), right.eval()(x))
    norm(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    right.train()
    for y in (torch.randn(2, 3, 1, 1), torch.randn(1, 3, 1, 2), torch.randn(1, 3, 2, 1)):
        torch.testing.assert_close(norm(y), right(y))
    torch.testing.assert_close(norm.running_var, right.running_var)


def test_call_frozen_gives_gradients_to_the_input_alone():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    out = call_frozen(layer, x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, copy.deepcopy(layer).double()(x))
    out.sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.parameters())
