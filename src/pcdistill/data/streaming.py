"""Loaders that have no length, as batches from a stream: they are given one."""

from collections.abc import Iterable, Iterator
from typing import Any

from pcdistill.errors import InputError


def has_length(loader: Any) -> bool:
    """Whether a loader tells how many batches it has; a DataLoader of an iterable data set may have `len` and fail."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


class Stepped:
    """A stream of batches as a loader of so many batches an epoch.

    If the stream, its sampler or its data set has `set_epoch`, every epoch is the beginning of a new pass. Otherwise
    the stream runs on: an epoch takes the next batches, and a pass that ends is followed by another. A run that is
    resumed goes over the batches of earlier epochs again without using them; it is exact if the stream draws no random
    numbers, or has `set_epoch`.

    Args:
        loader: can be iterated; endless or not.
        steps: batches of an epoch, for this process.

    Raises:
        InputError: fewer than one step.
    """

    def __init__(self, loader: Iterable[Any], steps: int) -> None:
        if steps < 1:
            raise InputError(f"steps_per_epoch must be 1 or more, got {steps}")
        self.loader, self.steps = loader, steps
        self.batch_size, self.generator = (getattr(loader, name, None) for name in ("batch_size", "generator"))
        parts = (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None))
        self._told: list[Any] = [part for part in parts if hasattr(part, "set_epoch")]
        self._epoch = 0
        self._stream: Iterator[Any] | None = None  # where the next epoch goes on
        self._next = 0  # the epoch that begins there

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is iterated next, from 0."""
        self._epoch = epoch
        for part in self._told:
            part.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, stream = self._epoch, self._stream
        if self._told or stream is None or self._next != epoch:
            stream = self._passes()
            for _ in range(0 if self._told else epoch * self.steps):
                next(stream)
        self._stream = None  # an iterator that is left half-way leaves the stream nowhere: the next one starts again
        for number in range(self.steps):
            batch = next(stream)
            if number + 1 == self.steps:  # before the last batch is given: nobody may ask for one after it
                self._stream, self._next = stream, epoch + 1
            yield batch

    def _passes(self) -> Iterator[Any]:
        """One pass after another, without an end."""
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise InputError("the stream of training batches is empty, or can be gone through only once")


class Counted:
    """Held-out batches without a length, counted in one pass.

    Raises:
        InputError: there is no second pass.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if iter(loader) is loader:
            raise InputError(f"a held-out loader, {type(loader).__name__}, can be gone through only once; give a list")
        self.loader = loader
        self.batch_size = getattr(loader, "batch_size", None)
        self._length = sum(1 for _ in loader)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def with_lengths(
    train: Iterable[Any], val: Iterable[Any], test: Iterable[Any] | None, steps_per_epoch: int | None
) -> tuple[Any, Any, Any]:
    """The three loaders with lengths: that of training is told, the others are counted.

    Args:
        train: of batches to learn from.
        val: of held-out batches.
        test: of further ones, or None.
        steps_per_epoch: batches of an epoch; None takes the loader's own length.

    Raises:
        InputError: a training loader that has no length and was given none.
    """
    if steps_per_epoch is not None:
        train = Stepped(train, steps_per_epoch)
    elif not has_length(train):
        raise InputError("the training loader has no length (batches per epoch); give steps_per_epoch")
    held_out, last = (one if one is None or has_length(one) else Counted(one) for one in (val, test))
    return train, held_out, last
