"""Where pixels come from: arrays held on the device, or items read and augmented one by one in worker processes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcdistill.data.augment import COLUMNS, Augment, augment_batch, augment_image
from pcdistill.data.loader import Job, generator_of, seed_of
from pcdistill.errors import InputError


class Items(Protocol):
    """Images that are read one at a time, such as files."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> Tensor:
        """Image i, [3, H, W] uint8; an InputError names what cannot be read."""
        ...


class MemoryReader:
    """Pixels from an array on the device, augmented there in whole batches.

    Args:
        images: [M, C, H, W] uint8, on the device; splits share it.
        rows: [N] int64, the rows that are this split, in its order.
        views: the augmentation of each view; None gives the images as they are.
        fill: colour of a cut-out square, [C] uint8.
        seed: of the augmentation.
    """

    def __init__(
        self, images: Tensor, rows: Tensor, views: Sequence[Augment | None], fill: Tensor, seed: int = 0
    ) -> None:
        self.images = images
        self.rows = rows
        self.views = tuple(views)
        self.fill = fill.to(images.device)
        self.seed = seed

    @property
    def signature(self) -> str:
        return f"memory {self.views} {self.seed if any(self.views) else None} {self.fill.tolist()}"

    def read(self, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
        for job in jobs:
            pixels = self.images[self.rows[job.index].to(self.images.device)]
            if not any(self.views):
                yield [pixels] * len(self.views)
                continue
            # Drawn for the whole batch of all processes, each of which takes its rows.
            u = torch.rand(
                len(self.views), job.size, COLUMNS, generator=generator_of("view", self.seed, job.epoch, job.batch)
            )[:, job.slots]
            yield [
                pixels if augment is None else augment_batch(pixels, augment, u[view], self.fill)
                for view, augment in enumerate(self.views)
            ]


class ItemReader:
    """Pixels from items that are read, decoded and augmented one by one, by worker processes where asked.

    Args:
        items: all images; splits share them.
        rows: [N] int64, the items that are this split, in its order.
        views: the augmentation of each view; None is the evaluation's resize and centre crop.
        size: side of the images that are given, in pixels.
        fill: colour of a cut-out square, [3] uint8.
        seed: of the augmentation, with the epoch and the sample's position in the split.
        workers: processes that read ahead; 0 reads in this one.
        pin: page-locked memory, for the copy to a GPU.
    """

    def __init__(
        self,
        items: Items,
        rows: Tensor,
        views: Sequence[Augment | None],
        *,
        size: int,
        fill: Tensor,
        seed: int = 0,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.task = _ItemTask(items, rows.tolist(), tuple(views), size, fill, seed)
        self.workers = workers
        self.pin = pin

    @property
    def signature(self) -> str:
        task = self.task
        return f"items {task.views} {task.seed if any(task.views) else None} {task.size} {task.fill.tolist()}"

    def read(self, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
        loader = DataLoader(
            self.task,
            batch_size=None,  # a job is a whole batch
            sampler=((job.epoch, job.index.tolist()) for job in jobs),
            num_workers=self.workers,
            pin_memory=self.pin,
            generator=torch.Generator(),  # the default one would take a number from the global generator
        )
        for found in loader:
            if isinstance(found, str):
                raise InputError(found)
            yield found


class _ItemTask(Dataset[list[Tensor] | str]):
    """A job's pixels for each view; or, as errors lose their form between processes, an InputError's sentence."""

    def __init__(
        self, items: Items, rows: list[int], views: tuple[Augment | None, ...], size: int, fill: Tensor, seed: int
    ) -> None:
        self.items = items
        self.rows = rows
        self.views = views
        self.size = size
        self.fill = fill
        self.seed = seed

    def __getitem__(self, job: tuple[int, list[int]]) -> list[Tensor] | str:
        epoch, index = job
        try:
            samples = [self._sample(epoch, i) for i in index]
        except InputError as error:
            return str(error)
        return [torch.stack(view) for view in zip(*samples, strict=True)]

    def _sample(self, epoch: int, i: int) -> list[Tensor]:
        image = self.items.read(self.rows[i])
        views = []
        with torch.random.fork_rng(devices=[]):
            for view, augment in enumerate(self.views):
                torch.default_generator.manual_seed(seed_of("item", self.seed, epoch, i, view))
                views.append(augment_image(image, augment, self.size, self.fill))
        return views
