"""Batches that are a pure function of (seed, epoch, batch number): the same in one process or many, resumed or not."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcdistill.errors import InputError

IN_CACHE = 2**17  # numbers
WINDOW = 16  # groups of samples that are shuffled together, where samples are in groups
UNLABELLED = -100  # the target of an image without a label: the class index, or every entry of its row


class Place(Protocol):
    """Where a batch is used: pcdistill.engine.placement.Placement is one."""

    @property
    def device(self) -> torch.device: ...

    def images(self, images: Tensor) -> Tensor:
        """Images on the device, in its memory format."""
        ...


@dataclass(frozen=True)
class Batch:
    """One batch; its length is its number of images, with two views 2N.

    Attributes:
        images: float32, normalised, [N, C, H, W]; with two views [2N, C, H, W], the first view's rows first.
        target: [N] int64, or [N, K] float32 under mixup and cutmix; with two views [2N] or [2N, K]. Rows of images
            without a label are UNLABELLED.
        index: [N] int64, the samples' positions in their split; None where a user's loader does not tell.
        teacher_logits: [N, K] (with two views [2N, K]) out of a cache, None where there is none.
        labelled: [L] int64, the rows that have a label; None: all have one.
    """

    images: Tensor
    target: Tensor
    index: Tensor | None = None
    teacher_logits: Tensor | None = None
    labelled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, place: Place) -> "Batch":
        """The batch where it is used."""
        target, index, logits, labelled = (
            None if part is None else part.to(place.device, non_blocking=True)
            for part in (self.target, self.index, self.teacher_logits, self.labelled)
        )
        assert target is not None
        return Batch(place.images(self.images), target, index, logits, labelled)


class Batches(ABC):
    """Batches of a split, by epoch.

    Attributes:
        num_samples: samples of the split, over all processes; None where a user's loader does not tell.
        signature: changes with anything that can change a batch, so that a cache knows whether it still fits.
    """

    num_samples: int | None
    signature: str

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one epoch, for this process."""

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on: the same as if the earlier ones had been taken."""


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits that depends on every part, so that neighbouring parts share nothing."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class Job:
    """What to read for one batch.

    Attributes:
        epoch: from 0.
        batch: number within the epoch.
        size: samples of the batch over all processes.
        index: positions in the split, [M] int64: this process's samples, then mixing partners it does not have.
        slots: their places in the whole batch, [M] int64.
        own: how many of them are this process's samples.
        partner: for each of the `own`, the place in `index` of the sample that it is mixed with; [own] int64.
    """

    epoch: int
    batch: int
    size: int
    index: Tensor
    slots: Tensor
    own: int
    partner: Tensor


class Reader(Protocol):
    """Gives the pixels of jobs, in order."""

    @property
    def signature(self) -> str: ...

    def read(self, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
        """For each job one tensor [M, C, H, W] uint8 for each view."""
        ...


@dataclass(frozen=True)
class Stream:
    """One process's part in a stream of batches.

    Attributes:
        seed: of order, augmentation and mixing.
        rank: of this process.
        world_size: number of processes.
        device: that images are given on; arrays are held there.
    """

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Feed:
    """How pixels become batches. `batch_size` is over all processes in training, and per process in evaluation."""

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    batch_size: int
    stream: Stream
    train: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0


class SplitBatches(Batches):
    """The batches of a split whose pixels a reader gives.

    Training shuffles by (seed, epoch) and leaves out the last incomplete batch, unless it is the only one; evaluation
    takes every sample once, in order, each process a contiguous part.

    Args:
        reader: where the pixels come from.
        labels: [N] int64.
        feed: batch size, normalisation, mixing, and this process's place.
        fingerprint: of the data, for the signature.
        groups: [N] int64, ascending, such as the shard that a sample is in. Training then takes the groups in an order
            of (seed, epoch), and shuffles the samples of `WINDOW` of them at a time. None shuffles all.
    """

    def __init__(
        self, reader: Reader, labels: Tensor, feed: Feed, fingerprint: str = "", groups: Tensor | None = None
    ) -> None:
        self.reader = reader
        self.labels = labels
        self.groups = groups
        self.feed = feed
        self.num_samples = len(labels)
        processes = feed.stream.world_size
        if feed.train and feed.batch_size % processes:
            raise InputError(
                f"the batch size {feed.batch_size} must be a multiple of the {processes} processes that share it"
            )
        if feed.train and len(labels) < processes:
            raise InputError(f"{len(labels)} training images are too few for {processes} processes")
        shared = (feed.num_classes, feed.mean, feed.std, feed.image_size, feed.batch_size)
        drawn = (feed.stream.seed, feed.mixup, feed.cutmix) if feed.train else ()
        if feed.train and groups is not None:
            drawn = (*drawn, WINDOW, groups)
        self.signature = digest_of(fingerprint, reader.signature, labels, *shared, *drawn)
        mean, std = (torch.tensor(stat, dtype=torch.float64).view(-1, 1, 1) for stat in (feed.mean, feed.std))
        self._scale, self._shift = (
            (1 / (255 * std)).float().to(feed.stream.device),
            (mean / std).float().to(feed.stream.device),
        )

    def __len__(self) -> int:
        if self.feed.train:
            return max(1, len(self.labels) // self.feed.batch_size)
        first, last = self._part()
        return -(-(last - first) // self.feed.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        jobs = self._jobs(epoch, start)
        waiting: list[Job] = []

        def passed() -> Iterator[Job]:
            for job in jobs:
                waiting.append(job)
                yield job

        for views in self.reader.read(passed()):
            yield self._batch(waiting.pop(0), views)

    def _part(self) -> tuple[int, int]:
        """This process's samples in evaluation: from, to."""
        n, share = len(self.labels), -(-len(self.labels) // self.feed.stream.world_size)
        return min(n, self.feed.stream.rank * share), min(n, (self.feed.stream.rank + 1) * share)

    def _jobs(self, epoch: int, start: int) -> Iterator[Job]:
        feed = self.feed
        if not feed.train:
            first, last = self._part()
            for batch in range(start, len(self)):
                low = first + batch * feed.batch_size
                index = torch.arange(low, min(last, low + feed.batch_size))
                yield Job(epoch, batch, len(index), index, torch.arange(len(index)), len(index), index[:0])
            return
        order = self._order(epoch)
        size = min(feed.batch_size, len(order) - len(order) % feed.stream.world_size)
        for batch in range(start, len(self)):
            slots, own, partner = self._slots(size)
            index = order[batch * feed.batch_size + slots]
            yield Job(epoch, batch, size, index, slots, own, partner)

    def _order(self, epoch: int) -> Tensor:
        """The samples of a training epoch, [N] int64."""
        return self._shuffled(generator_of("order", self.feed.stream.seed, epoch))

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """All samples once, where they are in groups window by window, [N] int64."""
        order = torch.randperm(len(self.labels), generator=generator)
        if self.groups is None:
            return order
        known, number = self.groups.unique(return_inverse=True)
        window = torch.randperm(len(known), generator=generator)[number] // WINDOW
        return order[window[order].argsort(stable=True)]

    def _slots(self, size: int) -> tuple[Tensor, int, Tensor]:
        """This process's places in a training batch of `size`, how many they are, and their partners: as in a Job."""
        feed = self.feed
        share = size // feed.stream.world_size
        slots = torch.arange(feed.stream.rank * share, (feed.stream.rank + 1) * share)
        if not (feed.mixup > 0 or feed.cutmix > 0):
            return slots, share, slots[:0]
        # Neighbours are mixed: after the shuffle they are as good as any, and they are mostly on one process.
        other = slots ^ 1
        other = torch.where(other < size, other, slots - 1).clamp(min=0)
        missing = {int(slot) for slot in other} - set(slots.tolist())
        slots = torch.cat([slots, torch.tensor(sorted(missing), dtype=torch.int64)])
        return slots, share, torch.tensor([slots.tolist().index(slot) for slot in other.tolist()])

    def _batch(self, job: Job, views: list[Tensor]) -> Batch:
        images = [self._normalise(view) for view in views]
        labels, index = self.labels[job.index], job.index[: job.own]
        target = labels[: job.own]
        if len(job.partner):
            images, share = self._mix(job, images)
            target = self._mixed_target(job, labels, share)
        if len(images) > 1:
            target = torch.cat([target] * len(images))
        device = self.feed.stream.device
        whole = torch.cat(images) if len(images) > 1 else images[0]
        return Batch(whole, target.to(device, non_blocking=True), index.to(device, non_blocking=True))

    def _normalise(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.feed.stream.device, non_blocking=True)
        size = self.feed.image_size
        if pixels.device.type == "cpu" and pixels.shape[-2:] == (size, size):
            # In parts that stay in the processor's cache: faster, and the same bits.
            images = torch.empty(pixels.shape)
            step = max(1, IN_CACHE // pixels[0].numel())
            for part, of in zip(images.split(step), pixels.split(step), strict=True):
                part.copy_(of).mul_(self._scale).sub_(self._shift)
            return images
        images = pixels.float()
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return images.mul_(self._scale).sub_(self._shift)

    def _mixed_target(self, job: Job, labels: Tensor, share: float) -> Tensor:
        """Probabilities [own, K] of samples that are mixed with their partners."""
        one_hot = F.one_hot(labels, self.feed.num_classes).float()
        return share * one_hot[: job.own] + (1 - share) * one_hot[job.partner]

    def _mix(self, job: Job, images: list[Tensor]) -> tuple[list[Tensor], float]:
        """mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of each sample with its partner, one draw a batch.

        Returns:
            The mixed views, and the share of each sample in its mixture.
        """
        feed = self.feed
        rng = np.random.default_rng(seed_of("mix", feed.stream.seed, job.epoch, job.batch))
        cut = feed.cutmix > 0 and (feed.mixup == 0 or rng.random() < 0.5)
        alpha = feed.cutmix if cut else feed.mixup
        share = float(rng.beta(alpha, alpha))
        height, width = images[0].shape[2:]
        keep = torch.full((1, 1), share)
        if cut:
            y, x = int(rng.integers(height)), int(rng.integers(width))
            half_y, half_x = int(height * (1 - share) ** 0.5) // 2, int(width * (1 - share) ** 0.5) // 2
            keep = torch.ones(height, width)
            keep[max(0, y - half_y) : y + half_y, max(0, x - half_x) : x + half_x] = 0
            share = float(keep.mean())  # the share of the first image that is left after the box met the border
        keep = keep.to(feed.stream.device)
        partner = job.partner.to(feed.stream.device)
        mixed = [view[: job.own] * keep + view[partner] * (1 - keep) for view in images]
        return mixed, share


def labelled_rows(target: Tensor) -> Tensor | None:
    """Positions [L] of the rows of a target [N] or [N, K] that have a label; None if all have. Reads the target."""
    without = (target if target.ndim == 1 else target.flatten(1)[:, 0]) == UNLABELLED
    return (~without).nonzero()[:, 0] if bool(without.any()) else None


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeds torch, NumPy and Python for the block, and puts back what they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits of tensors and of what prints as it is."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        digest.update(b"/")
    return digest.hexdigest()
