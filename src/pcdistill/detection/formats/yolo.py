"""YOLO: data.yaml, and a text file of normalised boxes or polygons for each image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcdistill.detection.formats.base import (
    SPLITS,
    DetectionSet,
    Note,
    OwnId,
    RawImage,
    RawSplit,
    check_name,
    finish_split,
    shown,
)
from pcdistill.detection.formats.images import images_in, seen_in
from pcdistill.errors import InputError
from pcdistill.files import home_followed
from pcdistill.plain import MOST_DATA, parse_yaml, read_text

LAYOUT = "data.yaml, or classes.txt beside images/ and labels/"
BEYOND = 1.1  # a centre or side greater than this is no part of an image

Row = tuple[tuple[float, float, float, float], int, float, int]


@dataclass
class YoloSet:
    """What data.yaml says, resolved.

    Attributes:
        file: data.yaml, or classes.txt.
        root: names of images are relative to it in messages.
        names: class by its number.
        splits: images by split.
        origins: where they come from.
        keypoints: lines have keypoints behind the box.
        notes: what was seen.
    """

    file: Path
    root: Path
    names: dict[int, str]
    splits: dict[str, list[Path]]
    origins: dict[str, str]
    keypoints: bool
    notes: list[Note]


def find_yolo(root: Path) -> Path | None:
    """The yaml file of a folder, or else its classes.txt; None where there is neither."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    for path in seen_in(root, "*.yaml", "*.yml"):
        if isinstance(tree := _load_yaml(path), dict) and "names" in tree and "train" in tree:
            return path
    if (root / "classes.txt").is_file() and (root / "labels").is_dir():
        return root / "classes.txt"
    return None


def read_yolo(file: Path) -> DetectionSet:
    """Read a set by its data.yaml, or by its classes.txt, beside which are images/ and labels/.

    `train`, `val` and `test` are folders, lists of folders, or text files that list images, relative to `path`, itself
    relative to the file. Labels lie beside images, with labels/ for images/ in their path. An image without a label
    file, or with an empty one, has no boxes. Polygons become the boxes around them.

    Raises:
        InputError: what is wrong, in which file, at which key or line.
    """
    found = _from_classes(file) if file.suffix == ".txt" else _from_yaml(file)
    position = {number: k for k, number in enumerate(sorted(found.names), start=1)}
    notes, splits = found.notes, {}
    for split, paths in found.splits.items():
        raw = RawSplit(file, found.origins[split], [])
        missing, folders = 0, set()
        for number, path in enumerate(paths):
            name = path.relative_to(found.root).as_posix() if path.is_relative_to(found.root) else path.name
            image = RawImage(name, path if path.is_file() else None, None, number, relative=True)
            labels = label_file(path)
            folders.add(labels.parent)
            rows = _rows(labels, position, found.keypoints)
            missing += rows is None
            image.rows = rows or []
            raw.images.append(image)
        if paths and missing == len(paths):
            raise InputError(
                f"{file}: none of the {len(paths)} images of {split} has a label file; looked in {min(folders)}"
            )
        if missing:
            raw.notes.append(
                Note(
                    "warning",
                    f"{file}: {missing} of {len(paths)} images of {split} have no label file; they count as "
                    "images without boxes",
                )
            )
        splits[split], seen = finish_split(raw)
        notes += seen
    numbers: tuple[OwnId, ...] = tuple(sorted(found.names))
    classes = tuple(found.names[number] for number in sorted(found.names))
    return DetectionSet("YOLO", classes, numbers, splits, found.origins, tuple(notes))


def label_file(image: Path) -> Path:
    """The label file of an image: labels/ for the last images/ in its path, .txt for its extension."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _from_classes(file: Path) -> YoloSet:
    names = [line.strip() for line in _lines(file) if line.strip()]
    images = file.parent / "images"
    paths = images_in(images) if images.is_dir() else images_in(file.parent)
    named = {i: check_name(name, f"{file}: line {i + 1}") for i, name in enumerate(names)}
    _check_names(file, named)
    return YoloSet(file, file.parent, named, {"train": paths}, {"train": "all images"}, False, [])


def _from_yaml(file: Path) -> YoloSet:
    tree = _load_yaml(file)
    if not isinstance(tree, dict):
        raise InputError(f"{file}: not a YOLO data file: it must have the keys train, val and names")
    names = _names(tree, file)
    notes: list[Note] = []
    root = _root(tree.get("path"), file, notes)
    splits: dict[str, list[Path]] = {}
    origins: dict[str, str] = {}
    for split, aliases in SPLITS.items():
        key = next((alias for alias in aliases if tree.get(alias) not in (None, "", "null", "~", [])), None)
        if key is None:
            continue
        entries = tree[key] if isinstance(tree[key], list) else [tree[key]]
        paths: list[Path] = []
        for entry in entries:
            found = _images(entry, root, file, key)
            if found is None and split == "test":  # Roboflow names a test folder whether there is one or not
                notes.append(Note("left out", f"{file}: the split test: {shown(entry)} does not exist"))
            elif found is None:
                raise InputError(f"{file}: {key}: {shown(entry)} is neither a folder nor a list of images in {root}")
            else:
                paths += found
        if paths or split != "test":
            splits[split] = list(dict.fromkeys(paths))
            origins[split] = f"{key}: {', '.join(str(entry) for entry in entries)} in {file.name}"
    return YoloSet(file, root, names, splits, origins, tree.get("kpt_shape") is not None, notes)


def _load_yaml(file: Path) -> Any:
    """The tree of a yaml file with every scalar as text, as it is written: a class may be called `no` or `1`."""
    return parse_yaml(read_text(file), str(file), as_text=True)


def _names(tree: dict[Any, Any], file: Path) -> dict[int, str]:
    """Class by its number, from a list, from number: name, or from nc alone."""
    raw, count = tree.get("names"), tree.get("nc")
    if isinstance(raw, list):
        pairs = [(str(i), name) for i, name in enumerate(raw)]
    elif isinstance(raw, dict):
        pairs = [(number, name) for number, name in raw.items()]
    elif raw is None and isinstance(count, str) and count.isascii() and count.isdigit() and 0 < int(count[:6]) < 10**5:
        pairs = [(str(i), str(i)) for i in range(int(count[:6]))]
    else:
        raise InputError(f"{file}: names must be a list of classes or number: class, got {shown(raw)}")
    found = {}
    for number, name in pairs:
        if not isinstance(number, str) or not (number.isascii() and number.isdigit()) or len(number) > 9:
            raise InputError(f"{file}: names: {shown(number)} must be the number of a class")
        found[int(number)] = check_name(name, f"{file}: names: {number}")
    if count is not None and str(count) != str(len(found)):
        raise InputError(f"{file}: nc is {shown(count)}, and names has {len(found)} classes")
    _check_names(file, found)
    return found


def _check_names(file: Path, names: dict[int, str]) -> None:
    if not names:
        raise InputError(f"{file}: names no classes")
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise InputError(f"{file}: the class {twice!r} occurs twice in names")


def _root(path: Any, file: Path, notes: list[Note]) -> Path:
    """The folder that the splits are relative to: `path` where it is there, else that of the file."""
    if path is None or path in ("", "null", "~"):
        return file.parent
    if not isinstance(path, str):
        raise InputError(f"{file}: path must be a folder, got {shown(path)}")
    root = file.parent / home_followed(path.replace("\\", "/"))
    if _is_dir(root):
        return root
    notes.append(Note("repaired", f"{file}: path: {shown(path)} does not exist here; the file's own folder was taken"))
    return file.parent


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _images(entry: Any, root: Path, file: Path, key: str) -> list[Path] | None:
    """The images of a folder or of a list of images; None where there is neither."""
    if not isinstance(entry, str):
        raise InputError(f"{file}: {key} must be a folder, a list of folders or a .txt file, got {shown(entry)}")
    text = entry.replace("\\", "/")
    # Roboflow writes ../train/images for a folder beside the file
    for place in (root / text, file.parent / text, root / text.removeprefix("../")):
        if _is_dir(place):
            return images_in(place)
        if _is_file(place) and place.suffix.lower() == ".txt":
            return _list(place, root)
    return None


def _list(listing: Path, root: Path) -> list[Path]:
    """The images that a text file lists, relative to its folder or to `root`."""
    found = []
    for line in _lines(listing):
        text = line.strip().replace("\\", "/")
        if text:
            places = [listing.parent / text, root / text, root / text.removeprefix("data/")]
            found.append(next((place for place in places if _is_file(place)), places[0]))
    return found


def _lines(file: Path) -> list[str]:
    return read_text(file, most=MOST_DATA).splitlines()


def _rows(file: Path, position: dict[int, int], keypoints: bool) -> list[Row] | None:
    """The boxes of a label file, in parts of the image; None where there is no such file."""
    if not _is_file(file):
        return None
    rows: list[Row] = []
    for i, line in enumerate(_lines(file), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{file}: line {i}"
        try:
            values = [float(text) for text in fields]
        except ValueError:
            raise InputError(
                f"{where} must be numbers: class, centre x, centre y, width, height; got {shown(line)}"
            ) from None
        number = values[0]
        if not math.isfinite(number) or number not in position:
            numbers = ", ".join(str(n) for n in list(position)[:10])
            raise InputError(f"{where} names class {shown(fields[0])}, which is not among the names ({numbers})")
        rows.append((_box(values[1:], keypoints, where), position[int(number)], math.nan, 0))
    return rows


def _box(values: Sequence[float], keypoints: bool, where: str) -> tuple[float, float, float, float]:
    """xyxy in parts of the image, from centre and sides, or around a polygon."""
    if any(value > BEYOND for value in values[: 4 if keypoints else None] if math.isfinite(value)):
        raise InputError(
            f"{where}: {max(values):g} is no part of an image; YOLO's boxes are divided by width and height (0 to 1)"
        )
    if len(values) == 4 or (keypoints and len(values) > 4):
        x, y, width, height = values[:4]
        if width <= 0 or height <= 0:
            return x, y, x, y
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) >= 6 and len(values) % 2 == 0:
        return min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
    count = len(values) + 1
    raise InputError(f"{where} must be a class and 4 numbers, or the points of a polygon; it has {count} numbers")
