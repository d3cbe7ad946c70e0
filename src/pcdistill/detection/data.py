"""Data for detectors: `digits-detection`, and sets in COCO, VOC or YOLO format, as batches.

Every image, augmentation and order follows from (seed, epoch, sample index) alone: a resumed run sees what the
uninterrupted one would have seen, and each process of a distributed run takes its share of the same global batch.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pcdistill.data.contents import files_fingerprint, fingerprint_of
from pcdistill.data.loader import Place, Stream
from pcdistill.data.workers import FEW, Workers, choose_workers
from pcdistill.detection import digits as digits_detection
from pcdistill.detection.formats import KINDS, DetectionSet, Note, Record, read_set
from pcdistill.detection.packed import PackedSamples, Target
from pcdistill.errors import InputError, nearest
from pcdistill.files import home_followed
from pcdistill.recipe import DataConfig

AUGMENTATIONS = ("flip", "photometric", "crop")
DIGITS_SIZE = 96


@dataclass(frozen=True)
class DetectionBatch:
    """One batch; its length is its number of images.

    Attributes:
        images: [3, H, W] float32 in 0..1 each; sizes may differ.
        targets: per image "boxes" [M, 4] xyxy pixels, "labels" [M] int64 from 1, "area" [M], "iscrowd" [M],
            "image_id" [1] int64.
        index: [N] int64, positions in the split; None where nobody asks.
    """

    images: list[Tensor]
    targets: list[Target]
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, place: Place) -> "DetectionBatch":
        """The batch where it is used; the index stays."""
        images = [place.images(image) for image in self.images]
        targets = [{key: value.to(place.device, non_blocking=True) for key, value in t.items()} for t in self.targets]
        return DetectionBatch(images, targets, self.index)


@dataclass(frozen=True)
class DetectionData:
    """A detection set, ready to train on.

    Attributes:
        name: as it was asked for.
        classes: label k is classes[k - 1]; 0 is the background.
        train: shuffled and augmented.
        val: decides which epoch is best.
        test: looked at once, at the end.
        fingerprint: changes with any image list, box or size.
        image_size: side of `digits-detection`'s images or the bound on the longer side; None for files as they are.
        contents: fingerprints of what the data set holds, by :func:`pcdistill.engine.fingerprint.words`' keys.
        category_ids: the data's own id of each class; the names of images and their own ids stand in the records.
        origins: where each split comes from, in words.
    """

    name: str
    classes: tuple[str, ...]
    train: "DetectionBatches"
    val: "DetectionBatches"
    test: "DetectionBatches | None"
    fingerprint: str
    image_size: int | None = None
    contents: Mapping[str, str] = field(default_factory=dict)
    category_ids: tuple[int | str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)


class DetectionSplit:
    """Images with boxes: from files, or uint8 in memory.

    Args:
        records: one per image.
        pixels: [N, 3, H, W] uint8 when the images are in memory.
        image_size: images of files are scaled down so that their longer side is at most this; boxes follow.
    """

    def __init__(self, records: Sequence[Record], pixels: Tensor | None = None, image_size: int | None = None) -> None:
        self.records = list(records)
        self.pixels = pixels
        self.image_size = image_size
        self.samples = PackedSamples(self.records, pixels, image_size)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def in_memory(self) -> bool:
        """Whether images are drawn, or kept once they were decoded."""
        return self.samples.in_memory

    def sample(self, index: int) -> tuple[Tensor, Target]:
        """The image [3, H, W] uint8 and its target."""
        return self.samples.sample(index)


class DetectionBatches:
    """Batches of a split, one process's share of each.

    Training batches are shuffled anew in every epoch and are all of the full size (a remainder waits for the next
    epoch's order). Batches for evaluation go through the split once, in order, without augmentation.

    Args:
        split: the images.
        batch_size: images of the global batch, over all processes.
        stream: this process's part, with the seed of order and augmentation.
        train: shuffle, augment, leave out crowd boxes and the last incomplete batch.
        augment: names out of AUGMENTATIONS.
        workers: the processes that decode and augment; splits share them. None does it in this process.
    """

    def __init__(
        self,
        split: DetectionSplit,
        *,
        batch_size: int,
        stream: Stream,
        train: bool = False,
        augment: Sequence[str] = (),
        workers: Workers | None = None,
    ) -> None:
        if len(split) == 0:
            raise InputError("a split of the data has no images")
        world_size = stream.world_size
        if batch_size % world_size != 0:
            raise InputError(f"data.batch_size {batch_size} must be divisible by the {world_size} processes")
        self.split = split
        self.batch_size = min(batch_size, len(split) // world_size * world_size) if train else batch_size
        self.stream, self.train, self.augment = stream, train, tuple(augment)
        self.workers = workers or Workers()
        self._examples = _Examples(split.samples, stream.seed, self.augment if train else None)
        self._number = self.workers.add(self._examples)

    @property
    def num_samples(self) -> int:
        """Images of the split, over all processes."""
        return len(self.split)

    def __len__(self) -> int:
        if self.train:
            return len(self.split) // self.batch_size
        return -(-len(range(self.stream.rank, len(self.split), self.stream.world_size)) // self._share)

    @property
    def _share(self) -> int:
        return self.batch_size // self.stream.world_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[DetectionBatch]:
        """The batches of an epoch, from number `start` on."""
        if self.train:
            order = torch.randperm(len(self.split), generator=_generator(self.stream.seed, epoch))
            order = order[: len(self) * self.batch_size].view(len(self), self.batch_size)
            indices = list(order[:, self.stream.rank :: self.stream.world_size])
        else:
            own = torch.arange(self.stream.rank, len(self.split), self.stream.world_size)
            indices = list(torch.split(own, self._share))
        return self.workers.run(self._number, ((epoch, index) for index in indices[start:]))

    def example(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        """One image [3, H, W] float32 in 0..1 and its target, as they are in that epoch."""
        return self._examples.example(index, epoch)


class _Examples:
    """Makes the batch of (epoch, positions). `augment` None: for evaluation, with crowd boxes and as they are."""

    def __init__(self, samples: PackedSamples, seed: int, augment: tuple[str, ...] | None) -> None:
        self.samples, self.seed, self.augment = samples, seed, augment

    def __call__(self, job: tuple[int, Tensor]) -> DetectionBatch:
        epoch, index = job
        images, targets = zip(*(self.example(i, epoch) for i in index.tolist()), strict=True)
        return DetectionBatch(list(images), list(targets), index)

    def example(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        raw, target = self.samples.sample(index)
        image = raw.float() / 255
        if self.augment is not None:
            learnt = target["iscrowd"] == 0
            target = {key: value if key == "image_id" else value[learnt] for key, value in target.items()}
            image, target = augmented(image, target, self.augment, _generator(self.seed, epoch, index))
        return image, target


def build_detection_data(config: DataConfig, stream: Stream) -> DetectionData:
    """Build a detection set by name.

    A folder without a test split tests on its val split, and without a val split sets a fixed part of the training
    images aside; which part does not depend on the seed.

    Args:
        config: `name` is "digits-detection", a folder or annotation file, or one with "coco:", "voc:" or "yolo:" in
            front to say what it is. `batch_size` and `eval_batch_size` are of the global batch. `image_size` is the
            side of the images that `digits-detection` draws (96); for files a bound on the longer side, to which images
            and boxes are scaled down before anything else (AP by size is then of the scaled boxes). `limit` keeps so
            many training images. `augment` is "none", "auto", or names out of flip, photometric and crop joined by "+";
            auto is flip for files and photometric for digits, which must not be mirrored. `workers` are processes that
            decode and augment; None takes some for training images that are decoded at every step. `root` is a folder
            that relative names are looked up in. `seed` and what is for classifiers alone are not looked at.
        stream: this process's part, with the seed of order and augmentation.

    Raises:
        InputError: unknown name, or anything wrong with the files.
    """
    found = open_set(config)
    for note in found.notes:
        if note.told:
            warnings.warn(note.text, stacklevel=2)
    drawn = found.format == "drawn"
    refuse_without_boxes(config.name, found)
    splits = {split: split_of(config, found, split) for split in found.splits}
    image_size = config.image_size or (DIGITS_SIZE if drawn else None)
    auto = "photometric" if drawn else "flip"
    names = _augmentations(auto if config.augment == "auto" else config.augment)
    fingerprint, contents = _fingerprint(found.classes, splits), _contents(found.classes, splits)
    if config.limit is not None:
        splits["train"] = _limited(splits["train"], config.limit)
    shared = Workers(choose_workers(config.workers, FEW, stream.world_size))
    # Images in memory need no processes beside this one; who asks for them gets them.
    workers = {name: None if of.in_memory and not config.workers else shared for name, of in splits.items()}
    val, test = (
        DetectionBatches(splits[name], batch_size=config.eval_batch_size, stream=stream, workers=workers[name])
        for name in ("val", "test")
    )
    train = DetectionBatches(
        splits["train"],
        batch_size=config.batch_size,
        stream=stream,
        train=True,
        augment=names,
        workers=workers["train"],
    )
    return DetectionData(
        config.name,
        found.classes,
        train,
        val,
        test,
        fingerprint,
        image_size,
        contents,
        found.category_ids,
        found.origins,
    )


def open_set(config: DataConfig, *, fill: bool = True) -> DetectionSet:
    """The set that `config.name` names, with all three splits: those that the files lack are made, unless not `fill`.

    Raises:
        InputError: unknown name, or anything wrong with the files.
    """
    if config.name == "digits-detection":
        image_size = config.image_size or DIGITS_SIZE
        if image_size < 48:
            raise InputError(f"data.image_size must be at least 48 for digits-detection, got {image_size}")
        drawn = {split: _digits(split, image_size).records for split in ("train", "val", "test")}
        ids = tuple(range(len(digits_detection.CLASSES)))
        return DetectionSet("drawn", digits_detection.CLASSES, ids, drawn, dict.fromkeys(drawn, "drawn"))
    found = read_set(*_place(config.name, config.root))
    if not fill:
        return found
    records, origins, notes = dict(found.splits), dict(found.origins), found.notes
    if "test" in records and not _has_boxes(records["test"]):
        del records["test"]
        told = f"the test split ({origins.pop('test')}) has no boxes to measure anything by; it is left out"
        notes = (*notes, Note("left out", told, told=True))
    _fill_splits(records, origins, config.val_fraction)
    return replace(found, splits=records, origins=origins, notes=notes)


def split_of(config: DataConfig, found: DetectionSet, split: str) -> DetectionSplit:
    """The images of one split of a set that `open_set` gave."""
    if found.format == "drawn":
        return _digits(split, config.image_size or DIGITS_SIZE)
    return DetectionSplit(found.splits[split], image_size=config.image_size)


def augmented(image: Tensor, target: Target, names: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Target]:
    """Augment an image in 0..1 and its boxes.

    Crop (half of the time) takes a part with sides of 60 % to 100 %; a box stays if its centre does, cut to the part.
    Flip (half of the time) mirrors left and right. Photometric scales contrast by 20 % at most, each colour by 10 %.
    """
    draw = torch.rand(10, generator=generator)
    if "crop" in names and draw[0] < 0.5:
        image, target = _crop(image, target, draw[1:5].tolist())
    if "flip" in names and draw[5] < 0.5:
        width = image.shape[-1]
        boxes = target["boxes"]
        flipped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        image, target = image.flip(-1), {**target, "boxes": flipped}
    if "photometric" in names:
        gain = 0.8 + 0.4 * draw[6]
        mean = image.mean()
        image = ((image - mean) * gain + mean) * (0.9 + 0.2 * draw[7:10, None, None])
        image = image.clamp(0, 1)
    return image, target


def _crop(image: Tensor, target: Target, draw: Sequence[float]) -> tuple[Tensor, Target]:
    height, width = image.shape[-2:]
    h, w = round(height * (0.6 + 0.4 * draw[0])), round(width * (0.6 + 0.4 * draw[1]))
    y, x = round((height - h) * draw[2]), round((width - w) * draw[3])
    boxes = target["boxes"] - torch.tensor([x, y, x, y], dtype=torch.float32)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    cut = torch.stack([boxes[:, 0::2].clamp(0, w), boxes[:, 1::2].clamp(0, h)], dim=2).flatten(1)
    inside = (centre >= 0).all(1) & (centre[:, 0] < w) & (centre[:, 1] < h) & (cut[:, 2:] - cut[:, :2] > 1).all(1)
    kept = {key: value if key == "image_id" else value[inside] for key, value in target.items()}
    return image[:, y : y + h, x : x + w].contiguous(), {**kept, "boxes": cut[inside]}


def _digits(split: str, image_size: int) -> DetectionSplit:
    pixels, boxes, labels = digits_detection.draw_split(split, image_size)
    records = [
        Record(
            path=None,
            width=image_size,
            height=image_size,
            boxes=b,
            labels=d + 1,
            area=(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
            iscrowd=np.zeros(len(b), dtype=np.int64),
            image_id=i,
        )
        for i, (b, d) in enumerate(zip(boxes, labels, strict=True))
    ]
    return DetectionSplit(records, pixels)


def _place(name: str, root: str | None) -> tuple[Path, str | None]:
    """The folder or file, and the kind that the name gives."""
    prefix, colon, rest = name.partition(":")
    kind = prefix if colon and prefix in KINDS else None
    path = home_followed(rest if kind else name)
    if root is not None and not path.is_absolute():
        path = home_followed(root) / path
    if not path.exists() and kind is None:
        raise InputError(
            f'unknown detection data "{name}"{nearest(name, ["digits-detection"])}; it must be digits-detection or '
            "data in COCO, VOC or YOLO format (coco:FOLDER, voc:FOLDER, yolo:data.yaml)"
        )
    return path, kind


def _has_boxes(records: Sequence[Record]) -> bool:
    return any(len(record.boxes) for record in records)


def refuse_without_boxes(name: str, found: DetectionSet) -> None:
    """Raise InputError for a validation split that no epoch can be chosen by."""
    records = found.splits["val"]
    if not any((record.iscrowd == 0).any() for record in records):
        raise InputError(
            f"{name}: none of the {len(records)} images of the validation split ({found.origins['val']}) has a box to "
            "choose the best epoch by; check where its annotations are, or take the split away"
        )


def _fill_splits(records: dict[str, list[Record]], origins: dict[str, str], val_fraction: float) -> None:
    """Make sure that there are train, val and test, without one image in two of them; say where they come from."""
    if "test" not in records and "val" in records:
        records["test"] = records.pop("val")
        origins["test"] = f"the validation split ({origins.pop('val')}), as there is no test split"
    for split in ("test", "val"):
        if split not in records:
            records["train"], records[split] = _set_aside(records["train"], val_fraction)
            origins[split] = f"{val_fraction:.0%} of the training images, set aside, as there is no such split"


def _set_aside(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    count = max(round(len(records) * fraction), 1)
    if count >= len(records):
        raise InputError(f"{len(records)} training images are too few to set {fraction:.0%} aside for validation")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    if not _has_boxes([records[i] for i in order[:count]]):  # of few images it may be one without
        order.sort(key=lambda i: not len(records[i].boxes))
    return [records[i] for i in sorted(order[count:])], [records[i] for i in sorted(order[:count])]


def _limited(split: DetectionSplit, limit: int) -> DetectionSplit:
    """A fixed random part of the training images."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:limit].sort().values
    pixels = None if split.pixels is None else split.pixels[order]
    return DetectionSplit([split.records[i] for i in order.tolist()], pixels, split.image_size)


def _augmentations(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split("+"))
    for name in names:
        if name not in AUGMENTATIONS:
            raise InputError(
                f'data.augment: unknown "{name}"{nearest(name, AUGMENTATIONS)}; known: none, auto, '
                f"{', '.join(AUGMENTATIONS)}"
            )
    return names


def _generator(*parts: int) -> torch.Generator:
    """A generator of its own for (seed, epoch) or (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _fingerprint(classes: Sequence[str], splits: dict[str, DetectionSplit]) -> str:
    """Sixteen hexadecimal digits over classes, splits, file names, sizes and boxes: the same on every machine.

    Pixels do not count: drawn ones follow from the drawing's version, and their last bit may differ between machines.
    """
    digest = hashlib.sha256(repr((digits_detection.VERSION, tuple(classes))).encode())
    for name, split in sorted(splits.items()):
        digest.update(f"{name} {len(split)} {split.image_size}".encode())
        for record in split.records:
            file = None if record.path is None else record.path.name
            digest.update(repr((file, record.width, record.height, record.image_id)).encode())
            for values in (record.boxes, record.labels, record.area, record.iscrowd):
                digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def _contents(classes: Sequence[str], splits: dict[str, DetectionSplit]) -> dict[str, str]:
    """Fingerprints of classes, and of each split's images and boxes."""
    found = {"data.classes": fingerprint_of(list(classes))}
    for name, split in splits.items():
        known = split.records
        boxes = [(one.boxes, one.labels, one.area, one.iscrowd) for one in known]
        files = [str(one.path) for one in known if one.path is not None]
        sizes = [(one.width, one.height, one.image_id) for one in known]
        found[f"data.{name}.boxes"] = fingerprint_of(boxes)
        found[f"data.{name}.images"] = fingerprint_of(digits_detection.VERSION, files_fingerprint(files), sizes)
    return found
