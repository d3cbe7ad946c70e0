"""Images without labels beside labelled ones: each step's batch has a share of both."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pcdistill.arrays import read_npz
from pcdistill.data.files import ImageFiles, find_images
from pcdistill.data.loader import UNLABELLED, Batch, Batches, Feed, Job, Reader, SplitBatches, digest_of, generator_of
from pcdistill.data.shards import PREFIX as SHARDS
from pcdistill.data.sources import Split, data_root, images_of, open_encoded, path_of
from pcdistill.data.tables import PREFIX as TABLE
from pcdistill.errors import InputError

REST = "rest"  # data.unlabelled: the training images that data.limit leaves out
ARRAYS = ("x_unlabelled", "x", "x_train")  # of an .npz file, the first that is there


def open_unlabelled(name: str, *, root: str | None = None, download: bool = False, streamed: bool = False) -> Split:
    """All images of a folder, however deep, or of an .npz file ([N, H, W, C] or [N, H, W] uint8); of `wds:PATTERN` and
    `hf:NAME` those for training. Labels are not read.

    Args:
        name: of the images.
        root: as of `open_source`.
        download: as of `open_source`.
        streamed: as of `open_source`.

    Raises:
        InputError: there is no such folder or file, or no image in it.
    """
    if name.startswith((SHARDS, TABLE)):
        parts = open_encoded(name, data_root(root), download=download, streamed=streamed, labelled=False).parts
        items = parts["train"].items
        return Split(None, items, torch.full((len(items),), UNLABELLED))
    path = path_of(name, "data.unlabelled")
    if path.suffix == ".npz":
        arrays = read_npz(path)
        key = next((key for key in ARRAYS if key in arrays), None)
        if key is None:
            raise InputError(f"{path} must hold one of {', '.join(ARRAYS)}; it holds {', '.join(arrays) or 'nothing'}")
        images = images_of(arrays[key], f"{path.name}: {key}")
        found = Split(images, None, torch.full((len(images),), UNLABELLED))
    elif path.is_dir():
        files = ImageFiles(find_images(path))
        found = Split(None, files, torch.full((len(files),), UNLABELLED))
    else:
        raise InputError(f'data.unlabelled: {name} must be a folder of images, an .npz file, or "{REST}"')
    if len(found.labels) == 0:
        raise InputError(f"data.unlabelled: {path} holds no images")
    return found


class UnlabelledBatches(SplitBatches):
    """A stream of unlabelled images that goes on from epoch to epoch: `steps` batches in each.

    A pass takes every image once, in an order that depends on the seed and the pass; passes need not end with epochs.
    A batch is a pure function of (seed, epoch, number), as with any training batches.

    Args:
        reader: where the pixels come from; its seed must not be that of the labelled images.
        count: number of images.
        feed: of training; `batch_size` is over all processes.
        steps: batches in an epoch, as many as the labelled images give.
        fingerprint: of the images, for the signature.
        groups: as of SplitBatches.
    """

    def __init__(
        self,
        reader: Reader,
        count: int,
        feed: Feed,
        *,
        steps: int,
        fingerprint: str = "",
        groups: Tensor | None = None,
    ) -> None:
        super().__init__(reader, torch.full((count,), UNLABELLED), feed, fingerprint, groups)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def _jobs(self, epoch: int, start: int) -> Iterator[Job]:
        count, size = len(self.labels), self.feed.batch_size
        known: dict[int, Tensor] = {}  # of the passes that the batch at hand touches
        for step in range(epoch * self.steps + start, (epoch + 1) * self.steps):
            slots, own, partner = self._slots(size)
            places = step * size + slots
            number = places // count
            known = {n: known[n] if n in known else self._order(n) for n in number.unique().tolist()}
            index = torch.empty_like(places)
            for n, order in known.items():
                index[number == n] = order[places[number == n] % count]
            # The step stands for the epoch: an image that comes twice in one is augmented anew.
            yield Job(step, 0, size, index, slots, own, partner)

    def _order(self, epoch: int) -> Tensor:
        """The images of a pass, as which an epoch stands here."""
        return self._shuffled(generator_of("unlabelled order", self.feed.stream.seed, epoch))

    def _mixed_target(self, job: Job, labels: Tensor, share: float) -> Tensor:
        return torch.full((job.own, self.feed.num_classes), float(UNLABELLED))


class WithUnlabelled(Batches):
    """Labelled and unlabelled images in one batch, in every view the labelled rows first.

    Args:
        labelled: gives the epochs: one pass over the labelled images each.
        unlabelled: as many batches an epoch.
    """

    def __init__(self, labelled: SplitBatches, unlabelled: UnlabelledBatches) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        self.num_samples = len(labelled.labels) + len(unlabelled.labels)
        self.signature = digest_of(labelled.signature, unlabelled.signature)

    @property
    def labels(self) -> Tensor:
        """[num_samples]: for losses that draw negatives, every unlabelled image is of a class of its own."""
        first = self.labelled.feed.num_classes
        return torch.cat([self.labelled.labels, torch.arange(first, first + len(self.unlabelled.labels))])

    def __len__(self) -> int:
        return len(self.labelled)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pairs = zip(self.labelled.epoch(epoch, start), self.unlabelled.epoch(epoch, start), strict=True)
        for first, second in pairs:
            yield self._together(first, second)

    def _together(self, first: Batch, second: Batch) -> Batch:
        assert first.index is not None
        assert second.index is not None
        views, own = len(first) // len(first.index), len(first.index)
        rows = own + len(second.index)
        labelled = torch.cat([torch.arange(own) + view * rows for view in range(views)])
        index = torch.cat([first.index, second.index + len(self.labelled.labels)])
        return Batch(
            _by_view(first.images, second.images, views),
            _by_view(first.target, second.target, views),
            index,
            labelled=labelled.to(index.device, non_blocking=True),
        )


def _by_view(first: Tensor, second: Tensor, views: int) -> Tensor:
    """Rows of both, view by view."""
    pairs = zip(first.chunk(views), second.chunk(views), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
