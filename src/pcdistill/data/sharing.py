"""A user's loader in several processes: each takes its own batches, so that none is trained on twice."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pcdistill.errors import InputError


@dataclass(frozen=True)
class Share:
    """One process's part of a loader.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        equal: every process takes equally many batches: training waits for all at each step. What is left over is left
            out.
    """

    rank: int = 0
    world_size: int = 1
    equal: bool = True


ALONE = Share()


class EveryNth:
    """A batch sampler's batches rank, rank + n, rank + 2 n, ...

    Args:
        batches: gives lists of positions; drawn anew, whole, each time, so that every process draws the same.
        share: which of them.
    """

    def __init__(self, batches: Any, share: Share) -> None:
        self.batches, self.share = batches, share

    @property
    def sampler(self) -> Any:
        """The sampler behind it, whose epoch is to be set."""
        return getattr(self.batches, "sampler", None)

    @property
    def generator(self) -> Any:
        return getattr(self.sampler, "generator", None)

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers behind it."""
        for part in (self.batches, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        return length_of_share(len(self.batches), self.share)

    def __iter__(self) -> Iterator[Any]:
        every = list(self.batches)  # here, not at the first batch: the order is drawn under the epoch's own seed
        return iter(every[self.share.rank :: self.share.world_size][: len(self)])


def length_of_share(length: int, share: Share) -> int:
    """Batches of a process, of so many in all."""
    if share.equal:
        return length // share.world_size
    return len(range(share.rank, length, share.world_size))


def shared(loader: Iterable[Any], length: int, share: Share, name: str) -> tuple[Any, int]:
    """The loader of this process's batches, and how many they are.

    A loader that is split already (a DistributedSampler, a loader that Accelerate prepared) is left as it is. Any other
    DataLoader over a data set with positions gets a batch sampler that takes every n-th batch.

    Raises:
        InputError: too few batches, or a loader that cannot be split and may give every process the same.
    """
    if share.world_size == 1 or is_split(loader, share.world_size):
        return loader, length
    splits = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if not isinstance(loader, DataLoader) or not splits or isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"{name} gives the same batches to each of the {share.world_size} processes; give a DataLoader over a data "
            "set with positions, which is split for you, or one with a DistributedSampler, or set its attribute "
            "is_split = True if it gives each process its own"
        )
    if length < share.world_size:
        raise InputError(f"{name} has {length} batches for {share.world_size} processes; make the batches smaller")
    return _split(loader, share), length_of_share(length, share)


def is_split(loader: Any, world_size: int) -> bool:
    """Whether a loader gives each process its own batches already."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batches, "sampler", None), batches)
    if any(isinstance(one, DistributedSampler) and one.num_replicas == world_size for one in samplers):
        return True
    accelerated = type(loader).__module__.startswith("accelerate.")
    return accelerated or bool(getattr(loader, "is_split", False))


def _split(loader: "DataLoader[Any]", share: Share) -> "DataLoader[Any]":
    workers: dict[str, Any] = {}
    if loader.num_workers > 0:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=EveryNth(loader.batch_sampler, share),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **workers,
    )
