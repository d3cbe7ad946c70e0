"""Classification data by name, as batches for training, validation and test."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from pcdistill.data.augment import Augment, make_augment
from pcdistill.data.contents import NONE, dataset_contents, files_fingerprint, fingerprint_of
from pcdistill.data.encoded import EncodedItems
from pcdistill.data.files import DatasetItems, ImageFiles
from pcdistill.data.loader import WINDOW, Batch, Batches, Feed, SplitBatches, Stream, digest_of, seed_of
from pcdistill.data.passed import LoaderBatches
from pcdistill.data.readers import ItemReader, MemoryReader
from pcdistill.data.sources import Source, Split, open_source, stratified
from pcdistill.data.unlabelled import REST, UnlabelledBatches, WithUnlabelled, open_unlabelled
from pcdistill.data.workers import Workers, choose_workers
from pcdistill.errors import InputError
from pcdistill.files import AS_IT_IS
from pcdistill.recipe import DataConfig

__all__ = ["Batch", "Batches", "Data", "LoaderBatches", "build_data"]
FOLDER_SIZE = 224
COUNTS = ("batch_size", "eval_batch_size", "limit", "image_size", "unlabelled_batch")


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    Attributes:
        name: as it was asked for.
        classes: their names, in the order of the labels.
        in_channels: of the images.
        image_size: side in pixels.
        mean: by channel, of pixels in [0, 1]; images are normalised with it.
        std: by channel.
        train: shuffled and augmented; complete batches.
        train_eval: the same images in order, without augmentation.
        val: held out, for choosing.
        test: for the end; None where the data has none.
        fingerprint: changes with the training images, their labels, the classes, or which images are in the split.
        contents: fingerprints of what the data set holds, by :func:`pcdistill.engine.fingerprint.words`' keys.
        origins: where each split comes from, in words.
    """

    name: str
    classes: list[str]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Batches
    train_eval: Batches
    val: Batches
    test: Batches | None
    fingerprint: str
    contents: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


def build_data(config: DataConfig, stream: Stream) -> Data:
    """Open a data set and arrange it as batches.

    The validation images are `val/` where a folder has both `val/` and `test/`, else a fixed, stratified share of the
    training images: they do not depend on the seed. A `val/` without `test/`, as in ImageNet, is kept for the test.

    Args:
        config: `name` is digits, cifar10, cifar100, imagenet, torchvision/NAME, an .npz file, a folder of class
            folders, wds:PATTERN or hf:NAME[:SPLIT]. `batch_size` of training is over all processes, `eval_batch_size`
            for each. `image_size` None keeps arrays as they are, and is 224 for folders. `augment` is one of
            pcdistill.data.augment.AUGMENTS. `mixup` and `cutmix` are alphas of Beta distributions; with both, each
            batch has one or the other. `views` 2 gives every image twice: with `augment`, then with RandAugment and
            cutout added; None is 1. `workers` are processes that read files; None chooses by the cores and the number
            of images. `limit` keeps a stratified sample of the training images, drawn after validation was taken out.
            `root` is the folder of downloads; None is $PCDISTILL_DATA or a folder in the user's cache. `seed` is not
            looked at. `unlabelled` puts `unlabelled_batch` images without labels (over all processes; None:
            `batch_size`) into each training batch, behind the labelled ones of each view; an epoch is one pass over the
            labelled images all the same.
        stream: this process's part, with the seed.

    Raises:
        InputError: naming what is wrong with a value, a folder, a file or the labels.
        PcdistillError: a download that failed.
    """
    _check(config, stream)
    source = open_source(config.name, root=config.root, download=config.download, streamed=config.streamed)
    check_source(source, config.name)
    channels, native = shape_of(source, config.name, config.image_size)
    size = config.image_size or native
    train_rows, rest, val_split, val_rows = split_rows(source, config)
    mean, std = source.stats or _measure(cast(Tensor, source.train.images), train_rows)
    evaluation = Feed(
        num_classes=len(source.classes),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        image_size=size,
        batch_size=config.eval_batch_size,
        stream=stream,
    )
    training = replace(evaluation, batch_size=config.batch_size, train=True, mixup=config.mixup, cutmix=config.cutmix)
    make = _Arrangement(_fingerprint(source, train_rows), config, len(train_rows))
    labelled = make.training(source.train, train_rows, training)
    train: Batches = labelled
    if config.unlabelled is not None:
        train = WithUnlabelled(labelled, _unlabelled(config, source, rest, training, make, steps=len(labelled)))
    return Data(
        name=config.name,
        classes=source.classes,
        in_channels=channels,
        image_size=size,
        mean=evaluation.mean,
        std=evaluation.std,
        train=train,
        train_eval=make.batches(source.train, train_rows, evaluation),
        val=make.batches(val_split, val_rows, evaluation),
        test=None if source.test is None else make.batches(source.test, None, evaluation),
        fingerprint=make.fingerprint,
        contents=_contents(source, config, make.fingerprint),
        origins=origins_of(source, config, len(rest)),
    )


class _Arrangement:
    """Makes the batches of one data set of `count` training images; splits of one array share it on the device."""

    def __init__(self, fingerprint: str, config: DataConfig, count: int) -> None:
        self.fingerprint, self.config, self.count = fingerprint, config, count
        self._placed: dict[int, Tensor] = {}
        self._workers: dict[int, Workers] = {}

    def batches(self, split: Split, rows: Tensor | None, feed: Feed) -> SplitBatches:
        """The rows of a split, all where None, as they are."""
        rows = torch.arange(len(split.labels)) if rows is None else rows
        return SplitBatches(self._reader(split, rows, feed, (None,)), split.labels[rows], feed, self.fingerprint)

    def training(self, split: Split, rows: Tensor, feed: Feed) -> SplitBatches:
        """The rows of a split under the augmentation of each view."""
        reader, groups = self.augmented(split, rows, feed), _groups(split, rows)
        return SplitBatches(reader, split.labels[rows], feed, self.fingerprint, groups)

    def augmented(self, split: Split, rows: Tensor, feed: Feed) -> MemoryReader | ItemReader:
        """The pixels of rows of a split under the augmentation of each view."""
        images = split.images
        # Arrays are augmented as they are, and resized after it.
        size = feed.image_size if images is None else min(images.shape[2:])
        policy = make_augment(self.config.augment, size=size, channels=len(feed.mean), folder=images is None)
        return self._reader(split, rows, feed, (policy, policy.strong(size))[: self.config.views or 1])

    def _reader(
        self, split: Split, rows: Tensor, feed: Feed, policies: Sequence[Augment | None]
    ) -> MemoryReader | ItemReader:
        fill = (torch.tensor(feed.mean) * 255).round().to(torch.uint8)
        stream, where = feed.stream, torch.device(feed.stream.device)
        if split.images is not None:
            held = self._placed.setdefault(id(split), split.images.to(where))
            return MemoryReader(held, rows, tuple(policies), fill, stream.seed)
        assert split.items is not None
        return ItemReader(
            split.items,
            rows,
            tuple(policies),
            size=feed.image_size,
            fill=fill,
            seed=stream.seed,
            workers=self._shared_workers(len(rows), stream),
        )

    def _shared_workers(self, count: int, stream: Stream) -> Workers:
        """The processes that read `count` images in turn with other splits."""
        number = choose_workers(self.config.workers, max(count, self.count), stream.world_size)
        pin = torch.device(stream.device).type == "cuda"
        return self._workers.setdefault(number, Workers(number, pin=pin))


def _groups(split: Split, rows: Tensor) -> Tensor | None:
    """[N] int64, what is read well together, such as a shard; None where any order is as good."""
    found = split.items.groups if isinstance(split.items, EncodedItems) else None
    return None if found is None else torch.from_numpy(found)[rows]


def _unlabelled(
    config: DataConfig, source: Source, rest: Tensor, training: Feed, make: _Arrangement, *, steps: int
) -> UnlabelledBatches:
    """The stream of unlabelled images: those that `data.limit` left out, or others; `steps` batches an epoch."""
    name = str(config.unlabelled)
    if name == REST:
        if len(rest) == 0:
            raise InputError("data.unlabelled: rest is what data.limit leaves out; set data.limit below all images")
        split, rows, fingerprint = source.train, rest, make.fingerprint
    else:
        split = open_unlabelled(name, root=config.root, download=config.download, streamed=config.streamed)
        rows = torch.arange(len(split.labels))
        fingerprint = _fingerprint(Source([], split), rows)
        channels, _ = shape_of(Source([], split), f"data.unlabelled: {name}", config.image_size)
        if channels != len(training.mean):
            raise InputError(
                f"data.unlabelled: the images of {name} have {channels} channels, those of {config.name} "
                f"{len(training.mean)}"
            )
    stream = replace(training.stream, seed=seed_of("unlabelled", training.stream.seed))
    feed = replace(training, batch_size=config.unlabelled_batch or config.batch_size, stream=stream)
    reader = make.augmented(split, rows, feed)
    fingerprint, groups = digest_of(fingerprint, rows), _groups(split, rows)
    return UnlabelledBatches(reader, len(rows), feed, steps=steps, fingerprint=fingerprint, groups=groups)


def split_rows(source: Source, config: DataConfig) -> tuple[Tensor, Tensor, Split, Tensor | None]:
    """Rows of the training images to train on, and those that `limit` leaves out; the split that holds validation, and
    its rows (None: all).
    """
    train_rows = torch.arange(len(source.train.labels))
    val_split, val_rows = source.val, None
    if val_split is None:
        held_out = round(config.val_fraction * len(train_rows))
        spare = len(train_rows) - len(source.classes)
        if not 0 < held_out <= spare:
            raise InputError(
                f"{config.name}: {len(train_rows)} training images of {len(source.classes)} classes are too few to "
                f"hold out a share of {config.val_fraction:g}"
            )
        val_split = source.train
        train_rows, val_rows = stratified(source.train.labels, len(train_rows) - held_out)
    rest = train_rows[:0]
    limit = config.limit
    if limit is not None and limit < len(train_rows):
        if limit < len(source.classes):
            raise InputError(f"data.limit must be at least the number of classes, {len(source.classes)}, got {limit}")
        drawn, others = stratified(source.train.labels[train_rows], limit)
        train_rows, rest = train_rows[drawn], train_rows[others]
    return train_rows, rest, val_split, val_rows


def origins_of(source: Source, config: DataConfig, left_out: int) -> dict[str, str]:
    """Where each split comes from: the source's words, and what is made of them here."""
    found = dict(source.origins)
    if source.val is None:
        found["val"] = f"{config.val_fraction:.0%} of the training images, held out, as there is no such split"
    if left_out:
        found["train"] = "; ".join([*filter(None, [found.get("train")]), f"data.limit leaves {left_out:,} out"])
    return found


def _check(config: DataConfig, stream: Stream) -> None:
    counts = {name: getattr(config, name) for name in COUNTS}
    for name, count in {**counts, "world_size": stream.world_size}.items():
        if count is not None and count < 1:
            raise InputError(f"data.{name} must be 1 or more, got {count}")
    if not 0 < config.val_fraction < 1:
        raise InputError(f"data.val_fraction must be between 0 and 1, got {config.val_fraction}")
    if config.views not in (None, 1, 2):
        raise InputError(f"data.views must be 1 or 2, got {config.views}")
    if config.mixup < 0 or config.cutmix < 0:
        raise InputError(f"data.mixup and data.cutmix must be 0 or more, got {config.mixup} and {config.cutmix}")


def check_source(source: Source, name: str) -> None:
    if len(source.classes) < 2:
        raise InputError(f"{name}: at least 2 classes are needed, got {len(source.classes)}")
    if len(set(source.classes)) != len(source.classes):
        raise InputError(f"{name}: the class names must be unique")
    counts = torch.bincount(source.train.labels, minlength=len(source.classes))
    if len(counts) > len(source.classes):
        raise InputError(f"{name}: there are {len(source.classes)} class names and a label {len(counts) - 1}")
    empty = [source.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        raise InputError(f"{name}: no training image has the class {', '.join(empty[:5])}")
    for split in (source.val, source.test):
        if split is not None and len(split.labels) == 0:
            raise InputError(f"{name}: a validation or test split has no images")


def shape_of(source: Source, name: str, image_size: int | None) -> tuple[int, int]:
    """Channels and side of the images; files are brought to one side, arrays must have one."""
    if source.train.images is None:
        return 3, image_size or FOLDER_SIZE
    _, channels, height, width = source.train.images.shape
    if height != width and image_size is None:
        raise InputError(f"{name}: the images are {height} x {width}; give data.image_size to make them square")
    return channels, min(height, width)


def _measure(images: Tensor, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by channel of pixels in [0, 1], exactly, from counts of the 256 values."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in torch.split(rows, 10000):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(images[part, channel].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value**2 - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)  # a channel may be constant
    return tuple(mean.tolist()), tuple(std.tolist())


def _fingerprint(source: Source, rows: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(source.classes).encode())
    digest.update(source.train.labels.numpy().tobytes())
    digest.update(rows.numpy().tobytes())
    if source.train.images is not None:
        digest.update(source.train.images.numpy().data)
    elif isinstance(source.train.items, ImageFiles):
        # Names of all files, and sizes of some: reading a million of them would take minutes.
        paths = source.train.items.paths
        common = os.path.commonpath({os.path.dirname(path) for path in paths})
        digest.update("\n".join(os.path.relpath(path, common) for path in paths).encode(errors=AS_IT_IS))
        digest.update(repr([os.path.getsize(path) for path in paths[:: max(1, len(paths) // 1000)]]).encode())
    elif isinstance(source.train.items, EncodedItems):
        digest.update(source.train.items.fingerprint().encode())
    return digest.hexdigest()


def _contents(source: Source, config: DataConfig, fingerprint: str) -> dict[str, str]:
    """Fingerprints of each split; the data's own stands for training arrays, which are read but once."""
    found = {"data.classes": fingerprint_of(source.classes)}
    for name, split in (("train", source.train), ("val", source.val), ("test", source.test)):
        if split is None:
            found |= {f"data.{name}.labels": NONE, f"data.{name}.images": NONE}
            continue
        found[f"data.{name}.labels"] = fingerprint_of(split.labels)
        array = split.images is not None
        found[f"data.{name}.images"] = fingerprint if array and name == "train" else _images_contents(split)
    if isinstance(source.train.items, EncodedItems):
        found["data.train.order"] = "all" if source.train.items.groups is None else f"by {WINDOW}"
    if config.unlabelled not in (None, REST):
        others = open_unlabelled(
            str(config.unlabelled), root=config.root, download=config.download, streamed=config.streamed
        )
        images = _images_contents(others)
        if isinstance(others.items, EncodedItems) and others.items.groups is not None:
            images = digest_of(images, WINDOW)  # they were once taken in another order, and nothing recorded which
        found["data.unlabelled.images"] = images
    return found


def _images_contents(split: Split) -> str:
    if split.images is not None:
        return fingerprint_of(split.images)
    if isinstance(split.items, ImageFiles):
        return files_fingerprint(split.items.paths)
    if isinstance(split.items, EncodedItems):
        return split.items.fingerprint()
    return dataset_contents(split.items.dataset)["images"] if isinstance(split.items, DatasetItems) else NONE
