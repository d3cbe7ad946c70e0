"""Where pixels come from: arrays held on the device, or items read and augmented one by one in worker processes."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pcdistill.data.augment import COLUMNS, Augment, augment_batch, augment_image, draw_window
from pcdistill.data.decoding import PIXELS, Window
from pcdistill.data.files import Items
from pcdistill.data.loader import Job, generator_of, seed_of
from pcdistill.data.workers import Workers


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
        workers: the processes that read; readers share them. None reads in this process.
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
        workers: Workers | None = None,
    ) -> None:
        self.rows = rows
        self.task = _ItemTask(items, tuple(views), size, fill, seed)
        self.workers = workers or Workers()
        self._number = self.workers.add(self.task)

    @property
    def signature(self) -> str:
        task = self.task
        drawn = f"{task.views} {task.seed if any(task.views) else None} {task.size} {task.fill.tolist()}"
        return f"items {drawn} pixels {PIXELS}"

    def read(self, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
        # Rows go with the job: a copy of all of them in each process would be large.
        wanted = ((job.epoch, job.index.tolist(), self.rows[job.index].tolist()) for job in jobs)
        return self.workers.run(self._number, wanted)


class _ItemTask:
    """Reads a job's images: (epoch, positions in the split, rows of the items) to [M, 3, size, size] for each view."""

    def __init__(self, items: Items, views: tuple[Augment | None, ...], size: int, fill: Tensor, seed: int) -> None:
        self.items = items
        self.views = views
        self.size = size
        self.fill = fill
        self.seed = seed

    def __call__(self, job: tuple[int, list[int], list[int]]) -> list[Tensor]:
        epoch, index, rows = job
        self.items.prepare(rows)
        with torch.random.fork_rng(devices=[]):
            samples = [self._sample(epoch, i, row) for i, row in zip(index, rows, strict=True)]
        return [torch.stack(view) for view in zip(*samples, strict=True)]

    def _sample(self, epoch: int, i: int, row: int) -> list[Tensor]:
        """The views of one image. A view's draws do not depend on the other views, nor on what its decoder may draw."""
        states = []

        def plan(width: int, height: int) -> list[Window]:
            windows = []
            for view, augment in enumerate(self.views):
                torch.default_generator.manual_seed(seed_of("item", self.seed, epoch, i, view))
                windows.append(draw_window(augment, self.size, width, height))
                states.append(torch.get_rng_state())
            return windows

        views = []
        for image, augment, state in zip(self.items.read(row, plan), self.views, states, strict=True):
            torch.set_rng_state(state)
            views.append(augment_image(image, augment, self.fill))
        return views
