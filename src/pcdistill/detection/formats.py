"""Detection sets on disk: COCO json and Pascal VOC folders, checked whole before any training starts.

Everything that could stop a run after an hour is looked for here: files that are missing or no images, sizes that
differ from what the annotations say, category ids that do not exist, boxes that are no boxes.
"""

import json
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pcdistill.errors import InputError

SPLITS = ("train", "val", "test")
SMALLEST_BOX = 1e-3  # pixels: a box thinner than this has no area


@dataclass(frozen=True)
class Record:
    """One image and its boxes.

    Attributes:
        path: the image file; None when the pixels are in memory.
        width: in pixels.
        height: in pixels.
        boxes: [M, 4] float32, xyxy in pixels, inside the image.
        labels: [M] int64, from 1.
        area: [M] float32 in square pixels: the annotated one (of the mask, in COCO), which decides small or large.
        iscrowd: [M] int64: 1 for regions that are neither learnt nor counted against a detector.
        image_id: as the file numbers it.
    """

    path: Path | None
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    image_id: int


@dataclass(frozen=True)
class Annotations:
    """What one split's annotations hold: the classes, label k being classes[k - 1], and the images."""

    classes: tuple[str, ...]
    records: list[Record]


def read_folder(root: Path, kind: str | None = None) -> dict[str, Annotations]:
    """Read a detection set's splits, whatever of train, val and test there is.

    Understood are, for COCO: `train.json` beside `images/`; `annotations/instances_train2017.json` beside
    `train2017/`; `train/_annotations.coco.json` beside its images. For VOC: `Annotations`, `JPEGImages` and
    `ImageSets/Main`, in the folder itself, in `VOCdevkit/VOC20xx`, or in several such years.

    Args:
        root: the folder.
        kind: "coco" or "voc"; None looks which it is.

    Raises:
        InputError: what is wrong, in which file.
    """
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist")
    coco = {} if kind == "voc" else _find_coco(root)
    voc = [] if kind == "coco" or coco else _find_voc(root)
    if coco:
        found = {split: read_coco(file, images) for split, (file, images) in coco.items()}
    elif voc:
        found = read_voc(voc)
    else:
        expected = {
            "coco": "train.json beside images/, annotations/instances_train*.json, or train/_annotations.coco.json",
            "voc": "Annotations/, JPEGImages/ and ImageSets/Main/",
        }
        wanted = " nor ".join(text for name, text in expected.items() if kind in (None, name))
        raise InputError(f"data folder {root} holds no detection set: found neither {wanted}")
    if "train" not in found:
        raise InputError(f"data folder {root} has no training split, only {', '.join(found)}")
    classes = found["train"].classes
    for split, annotations in found.items():
        if annotations.classes != classes:
            different = sorted(set(classes) ^ set(annotations.classes)) or ["their order"]
            raise InputError(f"{root}: the categories of {split} differ from those of train: {', '.join(different)}")
    if not any(len(record.boxes) for record in found["train"].records):
        raise InputError(f"{root}: no training image has a usable box")
    return found


def _find_coco(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (json, image folder)."""
    found: dict[str, tuple[Path, Path]] = {}
    for split in SPLITS:
        plain, folder = root / f"{split}.json", root / ("valid" if split == "val" else split)
        inside = folder / "_annotations.coco.json"
        official = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if plain.is_file():
            images = root / "images"
            found[split] = (plain, images if images.is_dir() else root)
        elif official:
            named = root / official[-1].stem.removeprefix("instances_")
            found[split] = (official[-1], named if named.is_dir() else root / "images")
        elif inside.is_file():
            found[split] = (inside, folder)
    return found


def _find_voc(root: Path) -> list[Path]:
    """The folders that hold `Annotations` and `ImageSets/Main`."""
    candidates = [root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))]
    return [path for path in candidates if (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()]


def read_coco(file: Path, images: Path) -> Annotations:
    """Read a COCO json. Category ids may have gaps: they are mapped to 1..K in the order of the ids.

    Args:
        file: the json; `file_name` in it is relative to `images`.
        images: the image folder.

    Raises:
        InputError: broken json, missing or unreadable images, unknown ids, malformed boxes.
    """
    tree = _load_json(file)
    try:
        named = sorted((int(c["id"]), str(c["name"])) for c in tree["categories"])
        pictures = {int(i["id"]): (str(i["file_name"]), int(i["width"]), int(i["height"])) for i in tree["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: not in COCO format: {type(error).__name__} {error} in categories or images"
        ) from error
    _check_unique(file, "category id", [number for number, _ in named])
    _check_unique(file, "category name", [name for _, name in named])
    if len(pictures) != len(tree["images"]):
        _check_unique(file, "image id", [int(i["id"]) for i in tree["images"]])
    if not pictures:
        raise InputError(f"{file}: lists no images")
    label_of = {number: k for k, (number, _) in enumerate(named, start=1)}
    rows: dict[int, list[tuple[list[float], int, float, int]]] = {number: [] for number in pictures}
    for i, annotation in enumerate(tree["annotations"]):
        where = f"{file}: annotation {annotation.get('id', i) if isinstance(annotation, dict) else i}"
        try:
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            x, y, width, height = (float(v) for v in annotation["bbox"])
            area, crowd = float(annotation.get("area", width * height)), int(annotation.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__} {error}"
            raise InputError(
                f"{where} must have image_id, category_id and bbox [x, y, width, height]; {what}"
            ) from error
        if image_id not in rows:
            raise InputError(f"{where} names image_id {image_id}, which is not among the images")
        if category not in label_of:
            known = ", ".join(str(number) for number, _ in named[:10]) + (", ..." if len(named) > 10 else "")
            raise InputError(f"{where} names category_id {category}, which is not among the categories ({known})")
        rows[image_id].append(([x, y, x + width, y + height], label_of[category], area, crowd))
    records, dropped = [], 0
    for number, (name, width, height) in pictures.items():
        record, bad = _make_record(images / name, width, height, rows[number], number)
        records.append(record)
        dropped += bad
    _warn_dropped(file, dropped)
    check_images(file, records)
    return Annotations(tuple(name for _, name in named), records)


def read_voc(folders: Sequence[Path]) -> dict[str, Annotations]:
    """Read Pascal VOC folders. Objects marked difficult count as crowd: neither learnt nor held against a detector.

    Corners are 1-based and inclusive there: pixel columns a..b become the edges a - 1 and b.

    Raises:
        InputError: broken or incomplete xml, missing or unreadable images.
    """
    raw: dict[str, list[tuple[Path, int, int, list[tuple[list[float], str, int]]]]] = {}
    for folder in folders:
        for split in SPLITS:
            listing = folder / "ImageSets" / "Main" / f"{split}.txt"
            if listing.is_file():
                stems = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
                raw.setdefault(split, []).extend(_read_voc_xml(folder, stem) for stem in stems)
    names = sorted({name for images in raw.values() for *_, objects in images for _, name, _ in objects})
    label_of = {name: k for k, name in enumerate(names, start=1)}
    found = {}
    for split, images in raw.items():
        records, dropped = [], 0
        for number, (path, width, height, objects) in enumerate(images):
            rows = [
                (box, label_of[name], (box[2] - box[0]) * (box[3] - box[1]), difficult)
                for box, name, difficult in objects
            ]
            record, bad = _make_record(path, width, height, rows, number)
            records.append(record)
            dropped += bad
        _warn_dropped(folders[0] / split, dropped)
        check_images(folders[0], records)
        found[split] = Annotations(tuple(names), records)
    return found


def _read_voc_xml(folder: Path, stem: str) -> tuple[Path, int, int, list[tuple[list[float], str, int]]]:
    file = folder / "Annotations" / f"{stem}.xml"
    try:
        root = ET.parse(file).getroot()
        path = folder / "JPEGImages" / (root.findtext("filename") or f"{stem}.jpg")
        width, height = int(_text(root, "size/width")), int(_text(root, "size/height"))
        objects = []
        for item in root.iter("object"):
            x0, y0, x1, y1 = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            objects.append(([x0 - 1, y0 - 1, x1, y1], _text(item, "name"), int(item.findtext("difficult") or 0)))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: the image list names {stem}, but {file} does not exist") from error
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{file}: not a VOC annotation: {error}") from error
    return path, width, height, objects


def _text(node: ET.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{path}> is missing")
    return text.strip()


def _load_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"annotation file {file} does not exist") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON (line {error.lineno}: {error.msg}); is it cut off?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not valid JSON: not UTF-8 text") from error
    found: dict[str, Any] = tree if isinstance(tree, dict) else {}
    missing = [key for key in ("images", "annotations", "categories") if key not in found]
    if missing:
        raise InputError(f"{file}: not in COCO format: it has no {', no '.join(missing)}")
    return found


def _check_unique(file: Path, what: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise InputError(f"{file}: {what} {value!r} occurs twice")
        seen.add(value)


def _make_record(
    path: Path, width: int, height: int, rows: Sequence[tuple[list[float], int, float, int]], image_id: int
) -> tuple[Record, int]:
    """Clip the boxes to the image and drop those without area; how many were dropped."""
    kept = []
    for box, label, area, crowd in rows:
        x0, x1 = (min(max(v, 0.0), float(width)) for v in (box[0], box[2]))
        y0, y1 = (min(max(v, 0.0), float(height)) for v in (box[1], box[3]))
        finite = all(math.isfinite(v) for v in box)
        if finite and x1 - x0 > SMALLEST_BOX and y1 - y0 > SMALLEST_BOX:
            kept.append(([x0, y0, x1, y1], label, area, crowd))
    record = Record(
        path=path,
        width=width,
        height=height,
        boxes=np.array([row[0] for row in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([row[1] for row in kept], dtype=np.int64),
        area=np.array([row[2] for row in kept], dtype=np.float32),
        iscrowd=np.array([row[3] for row in kept], dtype=np.int64),
        image_id=image_id,
    )
    return record, len(rows) - len(kept)


def _warn_dropped(where: Path, dropped: int) -> None:
    if dropped:
        warnings.warn(f"{where}: left out {dropped} boxes without area inside their image", stacklevel=3)


def check_images(where: Path, records: Sequence[Record]) -> None:
    """Raise unless every image is there, opens, and has the size that its annotation says. Reads headers only."""
    present: dict[Path, set[str]] = {}
    for folder in {record.path.parent for record in records if record.path is not None}:
        present[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    paths = [record.path for record in records if record.path is not None]
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        raise InputError(f"{where}: {len(missing)} of its {len(paths)} images are missing, the first is {missing[0]}")
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(_problem, records, chunksize=64):
            if problem is not None:
                raise InputError(f"{where}: {problem}")


def _problem(record: Record) -> str | None:
    """What is wrong with an image file, from its header."""
    assert record.path is not None
    try:
        with Image.open(record.path) as picture:
            size = picture.size
    except (OSError, UnidentifiedImageError):
        return f"{record.path} cannot be read as an image"
    if size != (record.width, record.height):
        return (
            f"{record.path} is {size[0]} x {size[1]} pixels, its annotation says {record.width} x {record.height}; "
            "the boxes would be in the wrong places"
        )
    return None
