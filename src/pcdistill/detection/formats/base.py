"""What every format is read into: records of images and boxes, and notes on what was repaired or left out."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pcdistill.detection.formats.images import Size, check_found, oriented, read_sizes
from pcdistill.errors import InputError

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # with the names they go by
SMALLEST_BOX = 1e-3  # pixels: a box thinner than this has no area
MOST_ID = 2**63 - 1  # what a tensor of int64 can hold

OwnId = int | str


@dataclass(frozen=True)
class Record:
    """One image and its boxes.

    Attributes:
        path: the image file; None when the pixels are in memory.
        width: in pixels, of the image as a person sees it (EXIF orientation applied).
        height: in pixels.
        boxes: [M, 4] float32, xyxy in pixels, inside the image.
        labels: [M] int64, from 1.
        area: [M] float32 in square pixels: the annotated one (of the mask, in COCO), which decides small or large.
        iscrowd: [M] int64: 1 for regions that are neither learnt nor counted against a detector.
        image_id: as the file numbers it; a number of our own where the file's is no whole number of 63 bits.
        own_id: exactly as the data has it; None where it has none.
        name: the image's name as the data has it; None where it has none.
    """

    path: Path | None
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    image_id: int
    own_id: OwnId | None = None
    name: str | None = None


@dataclass(frozen=True)
class Note:
    """Something that a reader of the data should know: what was "repaired", "left out", or looks wrong ("warning").

    `told` ones are said before a training too, the others by check-data alone.
    """

    kind: Literal["repaired", "left out", "warning"]
    text: str
    told: bool = False


@dataclass(frozen=True)
class DetectionSet:
    """A detection set as its files have it.

    Attributes:
        format: "COCO", "VOC" or "YOLO".
        classes: label k is classes[k - 1].
        category_ids: the data's own id of each class; for VOC, which has names alone, 1 to K.
        splits: records of train, and of val and test where the files define them.
        origins: where each split comes from, in words.
        notes: what was repaired or left out, and what looks wrong.
    """

    format: str
    classes: tuple[str, ...]
    category_ids: tuple[OwnId, ...]
    splits: dict[str, list[Record]]
    origins: dict[str, str]
    notes: tuple[Note, ...] = ()


@dataclass
class RawImage:
    """One image as the annotations have it, before its file was looked at.

    Attributes:
        name: as the annotations have it.
        path: the file; None if it was not found.
        size: width and height as annotated; None where they are missing.
        own_id: the data's own.
        rows: for each box xyxy (in pixels, or in parts of the image if `relative`), label, area or NaN, and crowd.
        relative: the boxes are in parts of the image.
    """

    name: str
    path: Path | None
    size: Size | None
    own_id: OwnId
    rows: list[tuple[tuple[float, float, float, float], int, float, int]] = field(default_factory=list)
    relative: bool = False


@dataclass
class RawSplit:
    """One split as its files have it.

    Attributes:
        where: the file or folder that messages name.
        origin: the same in words, relative to the data's folder.
        images: in the file's order.
        notes: what was seen so far.
    """

    where: Path
    origin: str
    images: list[RawImage]
    notes: list[Note] = field(default_factory=list)


@np.errstate(over="ignore", invalid="ignore")  # boxes of 1e308 and of no number at all are dropped
def finish_split(raw: RawSplit) -> tuple[list[Record], list[Note]]:
    """Look at the image files, bring boxes to pixels, cut them to their image, and drop those without area.

    Raises:
        InputError: images that are missing or unreadable, or of another size than annotated.
    """
    paths = check_found(raw.where, [image.path for image in raw.images], [image.name for image in raw.images])
    sizes = read_sizes(raw.where, paths)
    counts: Counter[str] = Counter()
    turned = _raw_boxes(raw, sizes)
    ids = _image_ids([image.own_id for image in raw.images])
    records = []
    for image, path, size, number in zip(raw.images, paths, sizes, ids, strict=True):
        width, height = size.seen
        if image.size is None:
            counts["sizes"] += not image.relative
        elif image.size == size.stored != size.seen:
            counts["turned"] += 1
        elif image.size != size.seen:
            raise InputError(
                f"{raw.where}: {path} is {width} x {height} pixels, its annotation says {shown(image.size[0])} x "
                f"{shown(image.size[1])}; the boxes would be in the wrong places"
            )
        boxes = np.array([row[0] for row in image.rows], dtype=np.float64).reshape(-1, 4)
        if image.relative:
            boxes = boxes * np.array([width, height] * 2)
        elif turned and image.size == size.stored:
            boxes = oriented(boxes, size)
        kept, clipped = _inside(boxes, width, height)
        annotated = np.array([row[2] for row in image.rows], dtype=np.float64)
        area, replaced = _areas(boxes[kept], annotated[kept], width * height)
        counts["areas"] += replaced
        counts["dropped"] += len(boxes) - int(kept.sum())
        counts["clipped"] += int((np.abs(clipped - boxes)[kept] > 1).any(1).sum())
        record = Record(
            path=path,
            width=width,
            height=height,
            boxes=clipped[kept].astype(np.float32),
            labels=np.array([row[1] for row in image.rows], dtype=np.int64)[kept],
            area=area.astype(np.float32),
            iscrowd=np.array([row[3] for row in image.rows], dtype=np.int64)[kept],
            image_id=number,
            own_id=image.own_id,
            name=image.name,
        )
        records.append(record)
    return records, [*raw.notes, *_notes(raw, counts, turned)]


def _notes(raw: RawSplit, counts: Counter[str], turned: bool) -> list[Note]:
    where = raw.where
    found = []
    if counts["sizes"]:
        found.append(
            Note("repaired", f"{where}: {counts['sizes']} images without width and height; read from the files")
        )
    if counts["turned"]:
        how = (
            "a box fits the stored pixels alone, so all boxes of such images were turned with them"
            if turned
            else "the boxes were taken to be on the image as it is seen"
        )
        found.append(
            Note(
                "warning",
                f"{where}: {counts['turned']} images are turned by their EXIF orientation, and annotated with the "
                f"size before; {how}",
            )
        )
    if counts["areas"]:
        found.append(Note("repaired", f"{where}: {counts['areas']} boxes without a usable area; width x height taken"))
    if counts["clipped"]:
        found.append(
            Note("repaired", f"{where}: cut {counts['clipped']} boxes that reach over the edge of their image")
        )
    if counts["dropped"]:
        text = f"{where}: left out {counts['dropped']} boxes without area inside their image"
        found.append(Note("left out", text, told=True))
    return found


def _raw_boxes(raw: RawSplit, sizes: Sequence[Any]) -> bool:
    """Whether the boxes of images that EXIF turns are on the stored pixels: one fits there, and not on what is seen.

    Annotation tools show the turned image, so boxes are taken to be on that unless the numbers speak against it.
    """
    for image, size in zip(raw.images, sizes, strict=True):
        if image.size is None or image.relative or not image.size == size.stored != size.seen:
            continue
        for box, *_ in image.rows:
            over_seen = box[2] > size.seen[0] + 1 or box[3] > size.seen[1] + 1
            if over_seen and box[2] <= size.stored[0] + 1 and box[3] <= size.stored[1] + 1:
                return True
    return False


def _inside(boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """[M] bool: finite and with area inside the image; and the boxes [M, 4] cut to it."""
    finite = np.isfinite(boxes).all(1)
    clipped = np.where(finite[:, None], boxes, 0.0)
    clipped = np.clip(clipped, 0, np.array([width, height] * 2, dtype=np.float64))
    wide = clipped[:, 2:] - clipped[:, :2] > SMALLEST_BOX
    return finite & wide.all(1), clipped


def _areas(boxes: np.ndarray, annotated: np.ndarray, largest: int) -> tuple[np.ndarray, int]:
    """Areas of boxes [M, 4], the annotated ones where they can be, else the box's own before it was cut; and how many
    had to be replaced. Formats without areas have NaN throughout, which is nothing to repair.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    own = np.minimum(sides[:, 0] * sides[:, 1], largest)
    good = (annotated > 0) & (annotated <= largest)
    return np.where(good, annotated, own), int((~good & ~np.isnan(annotated)).sum())


def _image_ids(own: Sequence[OwnId]) -> list[int]:
    """The file's own numbers, or positions where one of them is no whole number of 63 bits."""
    numbers = [key_of(value) for value in own]
    if all(isinstance(number, int) and abs(number) <= MOST_ID for number in numbers):
        return [int(number) for number in numbers]
    return list(range(len(own)))


def key_of(own: OwnId) -> OwnId:
    """The same for 7 and "7"."""
    if isinstance(own, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,999})", own):
        return int(own)
    return own


def shown(value: object) -> str:
    """A value out of a file as a message can hold it: one short line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..."


def own_id(value: object, what: str) -> OwnId:
    """An id: a whole number or text.

    Args:
        value: out of a file.
        what: file and key, for the message.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{what} must be a whole number or text, got {shown(value)}")
    return value


def number_of(value: object) -> float:
    """A float, not finite perhaps.

    Raises:
        ValueError: it is no number, nor text of one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{shown(value)} is no number")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        raise ValueError(f"{shown(value)} is no number") from None


def whole_of(value: object) -> int | None:
    """A size in pixels, or None where there is none: it is missing or 0.

    Raises:
        ValueError: it is no whole number, or negative.
    """
    if value is None or value == "":
        return None
    number = number_of(value)
    if not math.isfinite(number) or number != int(number) or number < 0:
        raise ValueError(f"{shown(value)} is no number of pixels")
    return int(number) or None


def size_of(width: object, height: object) -> Size | None:
    """Width and height, or None unless there are both.

    Raises:
        ValueError: one of them is no number of pixels.
    """
    found = whole_of(width), whole_of(height)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def check_name(value: object, what: str) -> str:
    """A class's name: text, or a number as text.

    Raises:
        InputError: it is neither, or empty, or no valid text.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{what} must be text, got {shown(value)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is no valid text: {shown(value)}") from None
    return text
