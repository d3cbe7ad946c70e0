"""Strength against gradients worked out by hand, and what follows from its definition."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from pcdistill.distillation import strength as module
from pcdistill.distillation.strength import Strength
from pcdistill.losses import kd_loss, pcd_loss


def batch(seed: int = 0, n: int = 8, c: int = 6):
    g = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(n, c, generator=g)).requires_grad_()
    return student, 2 * torch.randn(n, c, generator=g), torch.randint(c, (n,), generator=g)


def test_one_measurement_gives_the_ratio_of_the_two_gradients():
    student, teacher, target = batch()
    strength = Strength(2.0)
    strength.measure(kd_loss(student, teacher), F.cross_entropy(student, target), [student])
    # the gradient of cross-entropy is (q - y) / N, that of KD T (q_T - p_T) / N
    q, y = student.softmax(1), F.one_hot(target, 6)
    difference = (student / 4).softmax(1) - (teacher / 4).softmax(1)
    expected = 2.0 * ((q - y).norm() / 8) / (4 * difference.norm() / 8)
    torch.testing.assert_close(strength.factor, expected.detach())


def test_the_term_then_pulls_so_many_times_as_hard_as_the_labels():
    student, teacher, target = batch()
    strength = Strength(3.0)
    term, labels = pcd_loss(student, teacher), F.cross_entropy(student, target)
    strength.measure(term, labels, [student])
    (pull,) = torch.autograd.grad(strength.factor * term, student, retain_graph=True)
    (own,) = torch.autograd.grad(labels, student)
    assert float(pull.norm() / own.norm()) == pytest.approx(3.0, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-3, 1e3))
def test_the_size_of_the_loss_does_not_matter(scale):
    student, teacher, target = batch()
    pulls = []
    for factor in (1.0, scale):
        strength = Strength(1.5)
        term = factor * kd_loss(student, teacher)
        strength.measure(term, F.cross_entropy(student, target), [student])
        pulls.append(torch.autograd.grad(strength.factor * term, student)[0])
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-4, atol=1e-7)


def test_measurements_are_averaged_as_logarithms():
    x = torch.ones(1, requires_grad=True)
    strength = Strength(1.0)
    for ratio in (2.0, 8.0):
        strength.measure((x).sum(), (ratio * x).sum(), [x])
    assert float(strength.factor) == pytest.approx(4.0)  # their geometric mean


def test_old_measurements_fade():
    x = torch.ones(1, requires_grad=True)
    strength = Strength(1.0)
    for ratio in [1.0] * 50 + [10.0] * 100:
        strength.measure(x.sum(), (ratio * x).sum(), [x])
    assert float(strength.factor) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("term", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("labels", [0.0, 1.0, math.nan])
def test_a_gradient_that_is_zero_or_not_finite_is_passed_over(term, labels):
    if term == 1.0 and labels == 1.0:
        return
    x = torch.ones(1, requires_grad=True)
    strength = Strength(1.0)
    strength.measure(x.sum(), (5 * x).sum(), [x])
    strength.measure((term * x).sum(), (labels * x).sum(), [x])
    assert float(strength.factor) == pytest.approx(5.0)
    assert float(strength.accepted) == 1


def test_the_factor_is_bounded():
    x = torch.ones(1, requires_grad=True)
    strength = Strength(1.0)
    strength.measure((1e-12 * x).sum(), x.sum(), [x])
    assert float(strength.factor) == pytest.approx(1e4)


def test_a_loss_that_does_not_reach_the_place_is_passed_over():
    x, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    strength = Strength(1.0)
    strength.measure(other.sum(), x.sum(), [x])
    strength.measure(torch.zeros(()), x.sum(), [x])
    assert float(strength.accepted) == 0
    assert float(strength.factor) == 1


def test_every_step_at_first_then_every_twentieth():
    strength = Strength(1.0)
    due = []
    for _ in range(200):
        due.append(strength.due)
        strength.steps += 1
    assert due[:20] == [True] * 20
    assert sum(due[20:]) == 9


def test_a_strength_that_is_not_followed_stays_after_its_first_steps():
    strength = Strength(1.0, follow=False)
    strength.steps = module.HOLD_AFTER
    assert not strength.due


def test_its_state_continues_where_it_was():
    student, teacher, target = batch()
    first, second = Strength(1.0), Strength(1.0)
    for _ in range(3):
        first.measure(kd_loss(student, teacher), F.cross_entropy(student, target), [student])
        first.steps += 1
    second.load_state_dict(first.state_dict())
    assert second.steps == 3
    assert torch.equal(second.factor, first.factor)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_strength_must_be_a_finite_number_above_0(target):
    with pytest.raises(ValueError, match="strength must be a finite number > 0"):
        Strength(target)


def test_the_steps_of_older_checkpoints_are_read():
    strength = Strength(2.0)
    strength.set_extra_state({"steps": 7})
    assert strength.steps == 7
    again = Strength(2.0)
    again.load_state_dict(strength.state_dict())
    assert again.steps == 7
