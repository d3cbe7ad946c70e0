"""What there is to say about a data set before a training: of either task, for `pcdistill check-data`."""

import base64
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

MOST_BYTES = 4 * 2**30  # read in the search for equal files
SIDE = 480  # pixels of a sample's longer side


@dataclass(frozen=True)
class SplitFacts:
    """One split.

    Attributes:
        name: train, val or test.
        origin: where it comes from, in words.
        images: how many.
        counts: boxes, or images for classifiers, of each class.
        empty: images without boxes; None for classifiers.
    """

    name: str
    origin: str
    images: int
    counts: dict[str, int]
    empty: int | None = None


@dataclass(frozen=True)
class Sample:
    """An image to look at.

    Attributes:
        split: it is from.
        name: as the data has it.
        picture: JPEG, in base64.
        size: width and height of the picture in pixels.
        boxes: class, left, top, width and height in the picture's pixels.
        label: the class, for classifiers.
    """

    split: str
    name: str
    picture: str
    size: tuple[int, int]
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()
    label: str = ""


@dataclass
class Findings:
    """A data set as it will be used, and what was repaired, left out, or looks wrong."""

    data: str
    task: str
    format: str
    classes: list[str]
    splits: list[SplitFacts]
    repaired: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the pictures."""
        found = {key: value for key, value in vars(self).items() if key != "samples"}
        return {**found, "splits": [vars(split) for split in self.splits]}


def make_sample(
    image: Image.Image,
    split: str,
    name: str,
    *,
    boxes: Iterable[tuple[str, float, float, float, float]] = (),
    label: str = "",
) -> Sample:
    """A sample of an image, which is RGB and upright; `boxes` are class and xyxy in its pixels."""
    factor = min(SIDE / max(image.size), 8.0)  # tiny images are enlarged
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    resampling = Image.Resampling.BOX if factor > 1 else Image.Resampling.BILINEAR
    buffer = io.BytesIO()
    image.resize(size, resampling).save(buffer, "JPEG", quality=85)
    across, down = size[0] / image.width, size[1] / image.height
    scaled = tuple((c, x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down) for c, x0, y0, x1, y1 in boxes)
    return Sample(split, name, base64.b64encode(buffer.getvalue()).decode(), size, scaled, label)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` positions out of `count`, evenly."""
    return sorted({i * count // wanted for i in range(wanted)}) if count else []


def equal_files(paths: Mapping[str, Sequence[str | os.PathLike[str]]]) -> list[str]:
    """Sentences about images that are in two splits, by their files' bytes; only files of equal length are read."""
    by_length: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for split, names in paths.items():
        for name in names:
            by_length[os.path.getsize(name)].append((split, os.fspath(name)))
    suspects = {length: found for length, found in by_length.items() if len({split for split, _ in found}) > 1}
    if sum(length * len(found) for length, found in suspects.items()) > MOST_BYTES:
        return [f"not looked for images in two splits: more than {MOST_BYTES >> 30} GiB would have to be read"]
    by_content: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for found in suspects.values():
        for split, name in found:
            with open(name, "rb") as file:
                by_content[hashlib.file_digest(file, "blake2b").digest()].append((split, name))
    return _in_two(list(by_content.values()))


def equal_rows(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences about images that are in two splits, of arrays [N, ...]."""
    by_content: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for split, rows in arrays.items():
        for i, row in enumerate(rows):
            by_content[hashlib.blake2b(np.ascontiguousarray(row).tobytes()).digest()].append((split, f"image {i}"))
    return _in_two(list(by_content.values()))


def _in_two(groups: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for group in groups:
        first: dict[str, str] = {}
        for split, name in group:
            first.setdefault(split, name)
        splits = list(first)
        for i, one in enumerate(splits):
            for other in splits[i + 1 :]:
                pairs[one, other].append((first[one], first[other]))
    return [
        f"{len(same)} images are in {one} and in {other}, the first is {same[0][0]} and {same[0][1]}"
        for (one, other), same in pairs.items()
    ]
