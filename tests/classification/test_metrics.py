"""What counts as near chance: the stop on a collapse, and the teacher gate, for few and for many classes."""

import pytest

from pcdistill.classification.metrics import Collapse, near_chance
from pcdistill.classification.task import weakness


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 100, 1000])
def test_a_collapse_is_seen_whatever_the_number_of_classes(classes):
    chance = 100 / classes
    stop = Collapse(chance, 0.1)
    high, low = 99.0, chance

    def of(*values):
        return stop([{"val/top1": value} for value in values])

    assert "top1 has collapsed to" in of(high, low, low)
    assert of(high, low) is None  # one bad epoch is none
    assert of(low, low, low) is None  # it never rose
    assert of(high, near_chance(chance) + 0.1, near_chance(chance) + 0.1) is None


def test_one_class_cannot_collapse():
    assert Collapse(100.0, 0.1)([{"val/top1": 100.0}] * 3) is None


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_near_chance_lies_between_chance_and_all(classes):
    chance = 100 / classes
    assert chance < near_chance(chance) <= 1.5 * chance
    assert near_chance(chance) < 60


@pytest.mark.parametrize(
    ("classes", "top1", "samples", "says"),
    [
        (2, 72.0, 10000, None),
        (2, 54.0, 10000, "near chance (50.0 %)"),
        (2, 90.0, 10, "but they are 10, too few to tell it from chance (50.0 %)"),
        (10, 14.0, 10000, "near chance (10.0 %)"),
        (10, 16.0, 10000, None),
        (10, 20.0, 20, "but they are 20, too few"),
    ],
)
def test_a_weak_teacher_is_told_from_a_small_split(classes, top1, samples, says):
    found = weakness({"top1": top1, "samples": samples}, classes)
    assert found is None if says is None else says in found
