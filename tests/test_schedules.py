"""Schedules against their definitions at the points that matter."""

import math

import pytest

from pcdistill.schedules import learning_rate_factor, moved, warmup_factor


def test_warm_up_counts_epochs_from_one():
    assert [warmup_factor(e, 4) for e in (0, 0.9, 1, 3, 4, 100)] == [0.25, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


def test_multistep_first_decays_in_the_epoch_after_the_milestone():
    def factor(epoch):
        return learning_rate_factor(
            epoch * 10, steps_per_epoch=10, epochs=240, schedule="multistep", milestones=[150, 180, 210]
        )

    # Epochs counted from 1: the 150th is index 149.
    assert [factor(e) for e in (0, 149, 150, 180, 210, 239)] == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])


def test_cosine_falls_from_one_to_zero_and_warm_up_rises_linearly():
    def factor(step):
        return learning_rate_factor(step, steps_per_epoch=10, epochs=10, warmup_epochs=1)

    assert [factor(s) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    values = [factor(s) for s in range(10, 100)]
    assert values == sorted(values, reverse=True)


def test_constant_and_unknown():
    assert learning_rate_factor(7, steps_per_epoch=3, epochs=4, schedule="constant") == 1.0
    with pytest.raises(ValueError, match="'step'"):
        learning_rate_factor(0, steps_per_epoch=1, epochs=1, schedule="step")


def test_a_value_moves_in_equal_steps_from_the_first_epoch_to_the_last():
    def at(epoch, epochs=5):
        return moved(8.0, 2.0, epoch=epoch, total_epochs=epochs)

    assert [at(e) for e in (0, 1, 1.9, 2, 3, 4, 4.9)] == pytest.approx([8, 6.5, 6.5, 5, 3.5, 2, 2])
    assert moved(8.0, 2.0, epoch=0.5, total_epochs=1) == 8.0  # one epoch only


def test_a_milestone_within_an_epoch_is_a_step():
    def factor(step):
        return learning_rate_factor(step, steps_per_epoch=10, epochs=3, schedule="multistep", milestones=[2, 2.75])

    assert [factor(s) for s in (19, 20, 27, 28, 29)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
