"""What a run is made of: any change of a tensor or a module changes its fingerprint, and the sentence says which."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from pcdistill.engine.fingerprint import (
    KEPT,
    START,
    settle,
    structure_fingerprint,
    student_contents,
    weights_fingerprint,
    words,
)
from pcdistill.errors import InputError


def net(stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_any_changed_bit_of_any_tensor_changes_the_fingerprint(data):
    model = net()
    before = weights_fingerprint(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = data.draw(st.sampled_from(sorted(state)))
    raw = state[key].reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_fingerprint(state) != before


def test_names_shapes_and_dtypes_count_and_the_order_does_not():
    value = torch.arange(6, dtype=torch.float32)
    first = weights_fingerprint({"a": value, "b": value + 1})
    assert weights_fingerprint({"b": value + 1, "a": value}) == first
    changed = [
        {"a": value, "c": value + 1},
        {"a": value + 1, "b": value},
        {"a": value.view(2, 3), "b": value + 1},
        {"a": value.view(torch.int32), "b": value + 1},
        {"a": value},
    ]
    assert len({first, *map(weights_fingerprint, changed)}) == len(changed) + 1
    channels_last = torch.randn(2, 3, 4, 4)
    assert weights_fingerprint({"w": channels_last}) == weights_fingerprint(
        {"w": channels_last.to(memory_format=torch.channels_last)}
    )


def test_the_structure_is_what_has_no_weights():
    assert structure_fingerprint(net()) == structure_fingerprint(net())
    others = [net(2), nn.Sequential(*net()[:2]), nn.Sequential(*net()[:2], nn.GELU())]
    assert len({structure_fingerprint(net()), *map(structure_fingerprint, others)}) == 4
    assert weights_fingerprint(net().state_dict()) == weights_fingerprint(net(2).state_dict())

    class Shown(nn.Module):
        """Prints where it lies."""

        def extra_repr(self):
            return f"at {hex(id(self))}"

    kept = [Shown(), Shown()]
    assert structure_fingerprint(kept[0]) == structure_fingerprint(kept[1])


def test_every_key_has_words():
    assert words("teacher.weights") == "the teacher's weights"
    assert words("teacher-2.weights") == "teacher 2's weights"
    assert words("teacher.input") == "the teacher's class order, normalisation or resolution"
    assert words("student.structure") == "the student's structure"
    assert words(START) == "the student's start weights"
    assert words("data.classes") == "the classes of the data"
    assert words("data.train.labels") == "the labels of train"


def test_a_mismatch_says_all_that_changed():
    old = {"teacher.weights": "1", START: "2", "data.train.labels": "3", "data.train.images": "4"}
    settle("x", dict(old), old)
    settle("x", {**old, "data.new": "5"}, old)  # of a newer version, about which the old one says nothing
    for nothing in (None, [], "x"):
        settle("x", dict(old), nothing)
    with pytest.raises(InputError, match=r"^x was made of other contents: the labels of train changed; name another"):
        settle("x", {**old, "data.train.labels": "0", "data.train.images": "0"}, old)
    with pytest.raises(InputError, match="the teacher's weights and the images of train changed"):
        settle("x", {**old, "teacher.weights": "0", "data.train.images": "0"}, old)


def test_the_runs_own_student_trained_further_is_no_other():
    model = net()
    old = student_contents(model)
    with torch.no_grad():
        model[0].bias += 1
    found = student_contents(model)
    with pytest.raises(InputError, match=r"the student's start weights changed \(a student that was trained since"):
        settle("x", dict(found), old)
    settle("x", found, old, [weights_fingerprint(model.state_dict())])
    assert found == old
    assert KEPT != START
