"""A user's own loader as Batches: its batches checked, converted where that is safe, and shared among processes."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pcdistill.data.finite import problem_of
from pcdistill.data.loader import (
    UNLABELLED,
    Batch,
    Batches,
    digest_of,
    labelled_rows,
    own_randomness,
    seed_of,
)
from pcdistill.data.sharing import ALONE, Share, shared
from pcdistill.errors import InputError

LOOKED_AT = 2  # batches of a loader whose every value is read before training
RAW = "raw-images"  # of `allow`: pixels from 0 to 255 are meant


class LoaderBatches(Batches):
    """Any loader of a user's as Batches.

    The loader yields (images, target), ((first view, second view), target), or a mapping with images and target; what
    follows in a longer tuple is left out. Its randomness (torch, NumPy and Python's, its samplers and its worker
    processes) is a function of (seed, epoch, batch) while it runs, and everybody else's is left as it was; so a run can
    be repeated, and resumed by passing over the batches that were already taken. Worker processes that persist between
    epochs keep their own state, and are outside this promise.

    Once :meth:`expect` has said how many classes there are, a batch that does not fit them is an InputError. Images in
    float16, bfloat16 and float64 become float32, labels of any integer type int64, integer one-hot rows labels.

    Args:
        loader: a DataLoader, or anything with a length that can be iterated once for each epoch.
        views: images of one sample that the loader gives, 1 or 2.
        seed: of the loader's randomness.
        name: what messages call it.
        share: this process's part, where several processes have the same loader (see :mod:`pcdistill.data.sharing`).
    """

    def __init__(
        self, loader: Iterable[Any], *, views: int = 1, seed: int = 0, name: str = "the loader", share: Share = ALONE
    ) -> None:
        if views not in (1, 2):
            raise InputError(f"views must be 1 or 2, got {views}")
        length = _length(loader, name)
        self.loader, self._length = shared(loader, length, share, name)
        self.views, self.seed, self.name = views, seed, name
        self._rank = (share.rank,) if share.rank and self.loader is not loader else ()  # other images, other noise
        self.num_classes: int | None = None
        self.fewest = 1  # images that a batch must hold
        self._last: Any = None
        dataset = getattr(loader, "dataset", None)
        self.num_samples = len(dataset) if isinstance(dataset, Sized) else None
        self.signature = digest_of("loader", type(loader).__name__, self._length, views, seed)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        parts: list[Any] = [self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            if isinstance(own := getattr(part, "generator", None), torch.Generator):
                own.manual_seed(seed_of("loader", self.seed, epoch))
        with own_randomness(seed_of("loader", self.seed, epoch)):
            iterator = iter(self.loader)
        self._refuse_the_same(iterator)
        for number in range(self._length):
            with own_randomness(seed_of("loader", self.seed, epoch, number, *self._rank)):
                try:
                    item = next(iterator)
                except StopIteration:
                    raise InputError(f"{self.name} says it has {self._length} batches and gave {number}") from None
            if number >= start:
                yield self._batch(item, number)

    def look(self) -> list[Batch]:
        """The first batches of the first epoch, their images read.

        Raises:
            InputError: an image with a value that is not finite.
        """
        found = list(islice(self.epoch(0), LOOKED_AT))
        for number, batch in enumerate(found):
            problem = problem_of(batch, self.views)
            if problem is not None:
                raise InputError(f"{self._where(number)}: {problem}")
        return found

    def expect(self, num_classes: int, looked: Iterable[Batch] = (), *, raw: bool = False) -> list[Batch]:
        """Check the batches that were looked at, and every batch from now on, against the student's outputs.

        Args:
            num_classes: C.
            looked: what :meth:`look` gave.
            raw: let images pass that hold whole numbers from 0 to 255.

        Returns:
            The batches that were looked at, as training will get them.

        Raises:
            InputError: the first batch that does not fit, and what would be right.
        """
        self.num_classes = num_classes
        found = []
        for number, batch in enumerate(looked):
            images, target = self._fitting(batch.images, batch.target, number)
            found.append(Batch(images, target, labelled=labelled_rows(target)))
            if not raw and _like_pixels(batch.images):
                raise InputError(
                    f"{self._where(number)}: the images hold whole numbers up to {batch.images.max():g}, as pixels do; "
                    "normalise them (divide by 255, take off the mean, divide by the std), or, if both models do so "
                    f'themselves, allow=["{RAW}"]'
                )
        return found

    def without_last(self) -> None:
        """Leave the last batch of every epoch out."""
        self._length -= 1

    def _where(self, number: int) -> str:
        return f"{self.name}, batch {number + 1} of {self._length}"

    def _refuse_the_same(self, iterator: Any) -> None:
        """A loader that hands out one iterator again and again is empty from its second epoch on."""
        if iterator is self._last and not isinstance(self.loader, torch.utils.data.DataLoader):
            raise InputError(
                f"{self.name} gives the same iterator each time, so that it is used up after one epoch; give a "
                "DataLoader, a list, or an object whose __iter__ starts anew"
            )
        self._last = iterator

    def _batch(self, item: Any, number: int) -> Batch:
        images, target = self._parts(item, number)
        if self.num_classes is not None:
            images, target = self._fitting(images, target, number)
        elif target.ndim == 1 and _counts(target):
            target = target.long()
        whole = torch.cat([target] * self.views)
        return Batch(images, whole, labelled=labelled_rows(whole))

    def _parts(self, item: Any, number: int) -> tuple[Tensor, Tensor]:
        """Images of all views [V N, ...] and target [N, ...] of what the loader gave."""
        where = self._where(number)
        if isinstance(item, Mapping):
            images = next((item[key] for key in ("images", "image", "pixel_values") if key in item), None)
            target = next((item[key] for key in ("target", "targets", "labels", "label") if key in item), None)
            if images is None or target is None:
                keys = ", ".join(map(str, item))
                raise InputError(f'{where}: a batch must have "images" and "target", got the keys {keys}')
        elif isinstance(item, tuple | list) and len(item) >= 2:
            images, target = item[0], item[1]
        else:
            raise InputError(f"{where}: a loader must yield (images, target) or a mapping, got {type(item).__name__}")
        stacked = tuple(images) if isinstance(images, tuple | list) else (images,)
        if len(stacked) != self.views:
            raise InputError(f"{where}: the loader must give {self.views} view(s) of each image, got {len(stacked)}")
        if not all(isinstance(part, Tensor) for part in (*stacked, target)):
            kinds = ", ".join(type(part).__name__ for part in (*stacked, target))
            raise InputError(f"{where}: images and target of a batch must be tensors, got {kinds}")
        if target.ndim == 0 or any(view.ndim == 0 or len(view) != len(target) for view in stacked):
            labels = "one number for" if target.ndim == 0 else len(target)
            count = len(stacked[0]) if stacked[0].ndim else 0
            raise InputError(f"{where}: a batch has {count} images and {labels} labels")
        if any(view.shape != stacked[0].shape for view in stacked):
            shapes = " and ".join(str(list(view.shape)) for view in stacked)
            raise InputError(f"{where}: the views of an image must have one shape, got {shapes}")
        return torch.cat(stacked), target

    def _fitting(self, images: Tensor, target: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images as float32 and labels as int64 [N], or probabilities [N, C]."""
        where, c = self._where(number), self.num_classes
        assert c is not None
        if len(images) == 0:
            raise InputError(f"{where}: the batch holds no images")
        if len(images) < self.fewest * self.views:
            raise InputError(
                f"{where}: the batch holds one image, too few for the student, whose batch normalisation needs "
                f"{self.fewest}; leave it out (drop_last), or make the batches larger"
            )
        if not images.is_floating_point():
            raise InputError(
                f"{where}: images must be floating point and normalised, got {_dtype(images)}; convert them with "
                "images.float() / 255, and take off the mean and divide by the std"
            )
        if target.ndim == 2 and _counts(target):
            target = _from_one_hot(target, c, where)
        if target.ndim == 2 and target.shape[1] == c and target.is_floating_point():
            _check_probabilities(target, where)
        elif target.ndim != 1 or not _counts(target):
            right = f"labels must be integers [{len(target)}], or probabilities [{len(target)}, {c}]"
            remedy = "; use target.squeeze(1)" if target.ndim == 2 and target.shape[1] == 1 else ""
            remedy = remedy or ("; use target.long()" if target.ndim == 1 else "")
            raise InputError(f"{where}: {right}, got {_dtype(target)} {list(target.shape)}{remedy}")
        else:
            target = target.long()
            if number < LOOKED_AT or target.device.type == "cpu":  # to read it from a GPU at every step would stall it
                _check_range(target, c, where)
        return images.float(), target


def _length(loader: Any, name: str) -> int:
    if not isinstance(loader, Sized):
        raise InputError(f"{name} must have a length (batches per epoch), {type(loader).__name__} has none")
    try:
        length = len(loader)
    except TypeError as error:
        raise InputError(f"{name} must have a length (batches per epoch): {error}") from None
    if length == 0:
        raise InputError(f"{name} has no batches")
    if isinstance(loader, Iterator):
        raise InputError(f"{name} is an iterator, which is used up after one epoch; give a DataLoader or a list")
    return length


def _counts(target: Tensor) -> bool:
    """Whether a tensor holds integers."""
    return not (target.is_floating_point() or target.is_complex())


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _from_one_hot(target: Tensor, num_classes: int, where: str) -> Tensor:
    """Labels [N] of integer rows [N, C], each with a single 1; a row of UNLABELLED is one without a label."""
    if target.shape[1] != num_classes:
        return target  # refused by its shape
    rows = target.long()
    without = (rows == UNLABELLED).all(1)
    if not bool((without | ((rows >= 0).all(1) & (rows.sum(1) == 1))).all()):
        raise InputError(f"{where}: integer labels [N, {num_classes}] must have a single 1 in each row")
    return rows.argmax(1).masked_fill(without, UNLABELLED)


def _check_probabilities(target: Tensor, where: str) -> None:
    rows = target.float()
    fits = rows.isfinite().all(1) & (rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-2)
    fits |= (rows == UNLABELLED).all(1)
    if not bool(fits.all()):
        row = int((~fits).nonzero()[0, 0])
        raise InputError(
            f"{where}: target[{row}] must be probabilities that sum to 1 (all {UNLABELLED}: unlabelled), "
            f"they sum to {float(rows[row].sum()):.4g}"
        )


def _check_range(target: Tensor, num_classes: int, where: str) -> None:
    wrong = ((target < 0) | (target >= num_classes)) & (target != UNLABELLED)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        hint = "; subtract 1 if yours count from 1" if int(target.max()) == num_classes else ""
        raise InputError(
            f"{where}: target[{row}] is {int(target[row])}, and the student has {num_classes} outputs, so that labels "
            f"are 0 to {num_classes - 1} ({UNLABELLED}: unlabelled){hint}"
        )


def _like_pixels(images: Tensor) -> bool:
    """Whether images hold whole numbers from 0 to 255, as pixels that nobody normalised."""
    least, most = images.aminmax()
    return bool(least >= 0) and 16 < float(most) <= 255 and bool((images == images.round()).all())
