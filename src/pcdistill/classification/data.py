"""Classification data by name, as batches for training, validation and test."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pcdistill.data.augment import Augment, make_augment
from pcdistill.data.loader import Batch, Batches, Feed, LoaderBatches, SplitBatches
from pcdistill.data.readers import ItemReader, MemoryReader
from pcdistill.data.sources import ImageFiles, Source, Split, open_source, stratified
from pcdistill.errors import InputError

__all__ = ["Batch", "Batches", "Data", "LoaderBatches", "build_data"]
FOLDER_SIZE = 224


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
        val_from_train: whether `val` was taken out of the training data.
        fingerprint: changes with the training images, their labels, the classes, or which images are in the split.
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
    val_from_train: bool
    fingerprint: str


def build_data(
    name: str,
    *,
    batch_size: int = 64,
    eval_batch_size: int = 256,
    val_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    augment: str = "auto",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    views: int = 1,
    workers: int | None = None,
    limit: int | None = None,
    download: bool = False,
    root: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Data:
    """Open a data set and arrange it as batches.

    The validation images are `val/` where a folder has both `val/` and `test/`, else a fixed, stratified share of the
    training images: they do not depend on `seed`. A `val/` without `test/`, as in ImageNet, is kept for the test.

    Args:
        name: digits, cifar10, cifar100, imagenet, torchvision/NAME, an .npz file, or a folder of class folders.
        batch_size: of training, over all processes.
        eval_batch_size: of evaluation, for each process.
        val_fraction: of the training images, 0 < f < 1, where the data has no validation images.
        seed: of the order, the augmentation and the mixing.
        image_size: side in pixels; None keeps arrays as they are, and is 224 for folders.
        augment: one of pcdistill.data.augment.AUGMENTS.
        mixup: alpha of the Beta distribution; 0 for none. With cutmix too, each batch has one or the other.
        cutmix: the same.
        views: 2 gives every image twice: with `augment`, then with RandAugment and cutout added.
        workers: processes that read files; None chooses by the cores and the number of images. Arrays need none.
        limit: keep this many training images, a stratified sample drawn after validation was taken out.
        download: fetch what is missing.
        root: folder of downloads; None is $PCDISTILL_DATA or a folder in the user's cache.
        rank: of this process.
        world_size: number of processes.
        device: that images are given on; arrays are held there.
        mean: by channel, to replace the customary or computed one.
        std: the same.

    Raises:
        InputError: naming what is wrong with an argument, a folder, a file or the labels.
        PcdistillError: a download that failed.
    """
    _check(batch_size=batch_size, eval_batch_size=eval_batch_size, world_size=world_size, limit=limit, size=image_size)
    if not 0 < val_fraction < 1:
        raise InputError(f"data.val_fraction must be between 0 and 1, got {val_fraction}")
    if views not in (1, 2):
        raise InputError(f"data.views must be 1 or 2, got {views}")
    if mixup < 0 or cutmix < 0:
        raise InputError(f"data.mixup and data.cutmix must be 0 or more, got {mixup} and {cutmix}")
    where = torch.device(device or "cpu")
    source = open_source(name, root=root, download=download)
    _check_classes(source, name)
    folder = source.train.images is None
    channels, native = _shape(source, name, image_size)
    size = image_size or native
    # Arrays are augmented as they are, and resized after it.
    policy = make_augment(augment, size=size if folder else native, channels=channels, folder=folder)

    train_rows = torch.arange(len(source.train.labels))
    val_split, val_rows = source.val, None
    if val_split is None:
        held_out = round(val_fraction * len(train_rows))
        spare = len(train_rows) - len(source.classes)
        if not 0 < held_out <= spare:
            raise InputError(
                f"{name}: {len(train_rows)} training images of {len(source.classes)} classes are too few to hold out a "
                f"share of {val_fraction:g}"
            )
        val_split = source.train
        train_rows, val_rows = stratified(source.train.labels, len(train_rows) - held_out)
    if limit is not None and limit < len(train_rows):
        if limit < len(source.classes):
            raise InputError(f"data.limit must be at least the number of classes, {len(source.classes)}, got {limit}")
        train_rows = train_rows[stratified(source.train.labels[train_rows], limit)[0]]
    stats = source.stats or _measure(cast(Tensor, source.train.images), train_rows)
    stats = _chosen(mean, stats[0], "mean", channels), _chosen(std, stats[1], "std", channels)
    if min(stats[1]) <= 0:
        raise InputError(f"data: std must be above 0, got {stats[1]}")

    fingerprint = _fingerprint(source, train_rows)
    placed: dict[int, Tensor] = {}  # training and validation may share one array
    evaluation = Feed(
        num_classes=len(source.classes),
        mean=stats[0],
        std=stats[1],
        image_size=size,
        batch_size=eval_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=where,
    )
    training = replace(evaluation, batch_size=batch_size, train=True, mixup=mixup, cutmix=cutmix)
    processes = _workers(workers, len(train_rows), world_size) if folder else 0

    def batches(split: Split, rows: Tensor | None, feed: Feed, *policies: Augment | None) -> SplitBatches:
        rows = torch.arange(len(split.labels)) if rows is None else rows
        fill = (torch.tensor(stats[0]) * 255).round().to(torch.uint8)
        reader: MemoryReader | ItemReader
        if split.images is not None:
            held = placed.setdefault(id(split), split.images.to(where))
            reader = MemoryReader(held, rows, policies, fill, seed)
        else:
            assert split.items is not None
            pin = where.type == "cuda"
            reader = ItemReader(
                split.items, rows, policies, size=size, fill=fill, seed=seed, workers=processes, pin=pin
            )
        return SplitBatches(reader, split.labels[rows], feed, fingerprint)

    policies = (policy, policy.strong(size if folder else native))[:views]
    return Data(
        name=name,
        classes=source.classes,
        in_channels=channels,
        image_size=size,
        mean=stats[0],
        std=stats[1],
        train=batches(source.train, train_rows, training, *policies),
        train_eval=batches(source.train, train_rows, evaluation, None),
        val=batches(val_split, val_rows, evaluation, None),
        test=None if source.test is None else batches(source.test, None, evaluation, None),
        val_from_train=source.val is None,
        fingerprint=fingerprint,
    )


def _check(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"data.{'image_size' if name == 'size' else name} must be 1 or more, got {count}")


def _check_classes(source: Source, name: str) -> None:
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


def _shape(source: Source, name: str, image_size: int | None) -> tuple[int, int]:
    """Channels and side of the images; files are brought to one side, arrays must have one."""
    if source.train.images is None:
        return 3, image_size or FOLDER_SIZE
    _, channels, height, width = source.train.images.shape
    if height != width and image_size is None:
        raise InputError(f"{name}: the images are {height} x {width}; give data.image_size to make them square")
    return channels, min(height, width)


def _chosen(given: Sequence[float] | None, default: Sequence[float], name: str, channels: int) -> tuple[float, ...]:
    chosen = tuple(float(value) for value in (default if given is None else given))
    if len(chosen) != channels:
        raise InputError(f"data: {name} must have one value for each of {channels} channels, got {len(chosen)}")
    return chosen


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
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        digest.update("\n".join(os.path.relpath(path, common) for path in paths).encode())
        digest.update(repr([os.path.getsize(path) for path in paths[:: max(1, len(paths) // 1000)]]).encode())
    return digest.hexdigest()


def _workers(asked: int | None, num_images: int, world_size: int) -> int:
    if asked is not None:
        if asked < 0:
            raise InputError(f"data.workers must be 0 or more, got {asked}")
        return asked
    if num_images < 1000:  # starting processes takes longer than reading
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // world_size)
