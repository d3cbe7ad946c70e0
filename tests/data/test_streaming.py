"""Streams as loaders: they run on from epoch to epoch, or begin anew where they are told the epoch."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import pcdistill
from pcdistill.data.passed import LoaderBatches
from pcdistill.data.streaming import Counted, Stepped, has_length, with_lengths
from pcdistill.errors import InputError


class Numbers(IterableDataset):
    """Images whose every pixel is the sample's number, and labels 0 and 1 in turn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return ((torch.full((1, 2, 2), float(i)), i % 2) for i in range(self.count))


class Told(Numbers):
    """The same from another number in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return ((torch.full((1, 2, 2), 100.0 * self.epoch + i), i % 2) for i in range(self.count))


def numbers(batches: LoaderBatches, epoch: int, start: int = 0) -> list[int]:
    return [int(batch.images[0, 0, 0, 0]) for batch in batches.epoch(epoch, start)]


@pytest.mark.slow
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.data())
def test_an_epoch_takes_the_next_batches_of_the_stream_resumed_or_not(count, steps, epochs, data):
    expected = [[(epoch * steps + i) % count for i in range(steps)] for epoch in range(epochs + 1)]
    batches = LoaderBatches(Stepped(DataLoader(Numbers(count), 1), steps))
    assert [numbers(batches, epoch) for epoch in range(epochs + 1)] == expected
    start = data.draw(st.integers(0, steps - 1))
    resumed = LoaderBatches(Stepped(DataLoader(Numbers(count), 1), steps))
    if data.draw(st.booleans()):  # what looks at a batch before training changes nothing
        next(iter(resumed.epoch(0)))
    assert numbers(resumed, epochs, start) == expected[epochs][start:]


def test_a_stream_that_is_told_the_epoch_begins_anew():
    batches = LoaderBatches(Stepped(DataLoader(Told(10), 2), 3))
    assert [numbers(batches, epoch) for epoch in (0, 1, 5)] == [[0, 2, 4], [100, 102, 104], [500, 502, 504]]


def test_an_epoch_that_was_left_half_way_can_be_had_again():
    batches = LoaderBatches(Stepped(DataLoader(Numbers(100), 1), 4))
    numbers(batches, 0)
    left = batches.epoch(1)
    next(left)
    assert numbers(batches, 1) == [4, 5, 6, 7]


def test_lengths_are_told_counted_or_asked_for():
    stream, sized = DataLoader(Numbers(5), 2), [(torch.zeros(1), torch.zeros(1))]
    assert not has_length(stream)
    assert has_length(sized)
    train, val, test = with_lengths(stream, stream, None, 7)
    assert (len(train), len(val), test) == (7, 3, None)
    assert isinstance(val, Counted)
    assert with_lengths(sized, sized, sized, None) == (sized, sized, sized)
    with pytest.raises(InputError, match="the training loader has no length.*give steps_per_epoch"):
        with_lengths(stream, sized, None, None)
    with pytest.raises(InputError, match="steps_per_epoch must be 1 or more, got 0"):
        with_lengths(stream, sized, None, 0)


@pytest.mark.parametrize("stream", [DataLoader(Numbers(0), 1), (item for item in ())], ids=["empty", "once"])
def test_a_stream_without_batches_is_named(stream):
    with pytest.raises(InputError, match="the stream of training batches is empty"):
        next(iter(LoaderBatches(Stepped(stream, 2)).epoch(0)))


def test_a_student_is_distilled_on_a_stream():
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    student, history = pcdistill.distill(
        teacher=net(0),
        student=net(1),
        train=DataLoader(Numbers(9), 3),
        val=DataLoader(Numbers(6), 3),
        steps_per_epoch=4,
        epochs=2,
        lr=1e-3,
        method="kd",
        train_options={"device": "cpu"},
        allow=["weak-teacher"],
        verbose=False,
    )
    assert len(history) == 2
    assert all(p.isfinite().all() for p in student.parameters())
    with pytest.raises(InputError, match="give steps_per_epoch"):
        pcdistill.distill(teacher=net(0), student=net(1), train=DataLoader(Numbers(9)), val=DataLoader(Numbers(6)))
