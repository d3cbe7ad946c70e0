"""COCO json, as COCO itself, Roboflow, CVAT, Label Studio and FiftyOne write it."""

import math
from collections import Counter
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
    Record,
    check_name,
    finish_split,
    key_of,
    number_of,
    own_id,
    shown,
    size_of,
)
from pcdistill.detection.formats.images import ImageFinder, seen_in
from pcdistill.errors import InputError
from pcdistill.plain import MOST_DATA, parse_json, read_text

LAYOUT = "train.json beside images/, annotations/instances_train*.json, or train/_annotations.coco.json"
# Where a split's file is looked for, with the split's name for {}; the last of several in sorting order.
PLACES = (
    "{}.json",
    "annotations/instances_{}*.json",
    "{}/_annotations.coco.json",
    "{}/labels.json",
    "{}/result.json",
    "{}/annotations/instances_*.json",
    "annotations/{}.json",
)
SOLE = (  # files of sets without splits
    "_annotations.coco.json",
    "annotations/instances_default.json",
    "result.json",
    "labels.json",
    "annotations.json",
)


@dataclass(frozen=True)
class Category:
    """A category as a file has it."""

    own_id: OwnId
    name: str
    above: str | None


@dataclass
class CocoFile:
    """One annotation file, its types checked."""

    path: Path
    categories: list[Category]
    images: dict[OwnId, RawImage]  # by comparable id
    annotations: list[tuple[OwnId, OwnId, tuple[float, float, float, float], float, int]]
    notes: list[Note]


def find_coco(root: Path, *, sure: bool) -> dict[str, Path]:
    """The annotation file of each split; a set without splits has its one file as "train".

    Args:
        root: the data's folder.
        sure: whether it is known to be in COCO format: the only json file is then taken, whatever its name.
    """
    found: dict[str, Path] = {}
    for split, aliases in SPLITS.items():
        places = [place.format(alias) for place in PLACES for alias in aliases]
        files = [[path for path in seen_in(root, place) if path.is_file()] for place in places]
        best = next((several[-1] for several in files if several), None)
        if best is not None:
            found[split] = best
    if "train" not in found:
        sole = next((root / name for name in SOLE if (root / name).is_file()), None)
        every = [path for path in seen_in(root, "*.json", "annotations/*.json") if path not in found.values()]
        if sole is None and sure and len(every) == 1:
            sole = every[0]
        if sole is not None:
            found["train"] = sole
    return found


def read_coco(files: dict[str, Path], root: Path) -> DetectionSet:
    """Read the annotation files of a set's splits. Category ids may have gaps: they are mapped to 1..K in their order.

    Left out is Roboflow's root category: it has no boxes and stands above all others.

    Args:
        files: annotation file by split.
        root: the data's folder; images are looked for in it and beside the files.

    Raises:
        InputError: what is wrong, in which file, at which key.
    """
    trees = {split: _read_file(path, split, root) for split, path in files.items()}
    notes = []
    above = _root_category(list(trees.values()))
    if above is not None:
        notes.append(Note("left out", f"{root}: the category {above!r}, without boxes and above all others"))
        for tree in trees.values():
            tree.categories = [c for c in tree.categories if not (c.name == above and c.above in (None, "", "none"))]
    for tree in trees.values():
        _check_unique(tree.path, "category id", [key_of(c.own_id) for c in tree.categories])
        _check_unique(tree.path, "category name", [c.name for c in tree.categories])
    first = trees.get("train") or next(iter(trees.values()))
    categories = sorted(first.categories, key=_order)
    classes = tuple(category.name for category in categories)
    for split, tree in trees.items():
        names = {category.name for category in tree.categories}
        if names != set(classes):
            different = sorted(set(classes) ^ names)
            raise InputError(f"{root}: the categories of {split} differ from those of train: {', '.join(different)}")
    splits, origins = {}, {}
    for split, tree in trees.items():
        raw = RawSplit(tree.path, _relative(tree.path, root), _label(tree, classes), tree.notes)
        splits[split], found = finish_split(raw)
        origins[split] = raw.origin
        notes += [*found, *_corner_format(raw, splits[split])]
    return DetectionSet("COCO", classes, tuple(c.own_id for c in categories), splits, origins, tuple(notes))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _order(category: Category) -> tuple[bool, OwnId]:
    key = key_of(category.own_id)
    return isinstance(key, str), key


def _root_category(trees: Sequence[CocoFile]) -> str | None:
    """The name of the category above all others, if no box has it."""
    categories = trees[0].categories
    tops = [c for c in categories if c.above in (None, "", "none")]
    if len(tops) != 1 or len(categories) < 2:
        return None
    if any(c.above != tops[0].name for c in categories if c is not tops[0]):
        return None
    for tree in trees:
        ids = {key_of(c.own_id) for c in tree.categories if c.name == tops[0].name and c.above in (None, "", "none")}
        if any(category in ids for _, category, *_ in tree.annotations):
            return None
    return tops[0].name


def _label(tree: CocoFile, classes: Sequence[str]) -> list[RawImage]:
    """The file's images with their boxes."""
    position = {name: k for k, name in enumerate(classes, start=1)}
    label_of = {key_of(c.own_id): position[c.name] for c in tree.categories}
    for image, category, box, area, crowd in tree.annotations:
        tree.images[image].rows.append((box, label_of[category], area, crowd))
    return list(tree.images.values())


def _corner_format(raw: RawSplit, records: Sequence[Record]) -> list[Note]:
    """A warning where the boxes seem to be [x1, y1, x2, y2]: so read, all of them fit, and as they were read not."""
    beyond = count = 0
    for image, record in zip(raw.images, records, strict=True):
        for (x0, y0, x1, y1), *_ in image.rows:
            right, bottom = x1 - x0, y1 - y0  # what the file has in the third and fourth place
            if not (x0 < right <= record.width + 1 and y0 < bottom <= record.height + 1):
                return []
            beyond += x1 > record.width + 1 or y1 > record.height + 1
            count += 1
    if not beyond:
        return []
    text = (
        f"{raw.where}: {beyond} of {count} boxes reach beyond their image as [x, y, width, height], and none as "
        "[x1, y1, x2, y2]; COCO wants the former"
    )
    return [Note("warning", text, told=True)]


def _read_file(path: Path, split: str, root: Path) -> CocoFile:
    tree = load_json(path)
    categories = []
    for i, entry in enumerate(tree["categories"]):
        where = f"{path}: categories[{i}]"
        above = _entry(entry, where).get("supercategory")
        name = check_name(entry.get("name"), f"{where}.name")
        categories.append(
            Category(own_id(entry.get("id"), f"{where}.id"), name, above if isinstance(above, str) else None)
        )
    finder = ImageFinder(_folders(path, split, root))
    images: dict[OwnId, RawImage] = {}
    for i, entry in enumerate(tree["images"]):
        image = _image(entry, f"{path}: images[{i}]", finder)
        if key_of(image.own_id) in images:
            raise InputError(f"{path}: image id {shown(image.own_id)} occurs twice")
        images[key_of(image.own_id)] = image
    notes = []
    if finder.respelled:
        notes.append(Note("repaired", f"{path}: {finder.respelled} images were found under another spelling"))
    twice = [name for name, n in Counter(str(image.path or image.name) for image in images.values()).items() if n > 1]
    if twice:
        notes.append(
            Note("warning", f"{path}: {len(twice)} files are listed as several images, the first is {twice[0]}")
        )
    counts: Counter[str] = Counter()
    ids = {key_of(category.own_id): category.own_id for category in sorted(categories, key=_order)}
    annotations = [
        _annotation(entry, f"{path}: annotation {_number(entry, i)}", (images, ids), counts)
        for i, entry in enumerate(tree["annotations"])
    ]
    if counts["derived"]:
        notes.append(Note("repaired", f"{path}: {counts['derived']} boxes were taken from their segmentation"))
    numbers = Counter(shown(entry["id"]) for entry in tree["annotations"] if entry.get("id") is not None)
    if repeated := sum(n - 1 for n in numbers.values()):
        notes.append(Note("warning", f"{path}: {repeated} annotations have the id of another one; all are kept"))
    return CocoFile(path, categories, images, annotations, notes)


def _folders(path: Path, split: str, root: Path) -> list[Path]:
    """Where the images of an annotation file may be, the likeliest first."""
    own = path.stem.removeprefix("instances_")  # train2017, default
    names = [own, *SPLITS[split]]
    bases = [path.parent, path.parent.parent, root] if path.parent != root else [root]
    inside = [base / "images" / name for base in bases for name in names]
    beside = [base / name for base in bases for name in names]
    return [*inside, *beside, *(base / name for base in bases for name in ("images", "data")), *bases]


def _image(entry: Any, where: str, finder: ImageFinder) -> RawImage:
    _entry(entry, where)
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InputError(f"{where}.file_name must be the name of a file, got {shown(name)}")
    try:
        size = size_of(entry.get("width"), entry.get("height"))
    except ValueError as error:
        raise InputError(f"{where}: width and height must be whole numbers of pixels: {error}") from None
    return RawImage(name, finder.find(name), size, own_id(entry.get("id"), f"{where}.id"))


def _number(entry: Any, i: int) -> str:
    number = entry.get("id") if isinstance(entry, dict) else None
    return str(i) if number is None else shown(number)


def _annotation(
    entry: Any, where: str, known: tuple[dict[OwnId, RawImage], dict[OwnId, OwnId]], counts: Counter[str]
) -> tuple[OwnId, OwnId, tuple[float, float, float, float], float, int]:
    _entry(entry, where)
    images, categories = known
    for key in ("image_id", "category_id"):
        if entry.get(key) is None:
            raise InputError(f"{where} must have image_id, category_id and bbox [x, y, width, height]; it has no {key}")
    image = key_of(own_id(entry["image_id"], f"{where}: image_id"))
    category = key_of(own_id(entry["category_id"], f"{where}: category_id"))
    if image not in images:
        raise InputError(f"{where} names image_id {shown(image)}, which is not among the images")
    if category not in categories:
        ids = ", ".join(shown(i) for i in list(categories.values())[:10]) + (", ..." if len(categories) > 10 else "")
        raise InputError(f"{where} names category_id {shown(category)}, which is not among the categories ({ids})")
    try:
        if not entry.get("bbox") and entry.get("segmentation"):
            box = _around(entry["segmentation"])
            counts["derived"] += 1
        else:
            box = _corners(entry.get("bbox"))
        area = math.nan if entry.get("area") is None else number_of(entry["area"])
        crowd = 0 if entry.get("iscrowd") in (None, "") else int(entry["iscrowd"])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} must have image_id, category_id and bbox [x, y, width, height]; {error}") from None
    return image, category, box, area, int(crowd != 0)


def _corners(value: Any) -> tuple[float, float, float, float]:
    """[x, y, width, height] to xyxy."""
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"bbox is {shown(value)}")
    x, y, width, height = (number_of(v) for v in value)
    if width <= 0 or height <= 0:  # without area, and not to be turned into one by cutting
        return x, y, x, y
    return x, y, x + width, y + height


def _around(polygons: Any) -> tuple[float, float, float, float]:
    """The box around polygons [[x, y, x, y, ...], ...]."""
    if isinstance(polygons, dict):
        raise ValueError("it has no bbox, and a run-length segmentation")
    if not isinstance(polygons, list) or not all(isinstance(p, list) and len(p) >= 4 for p in polygons):
        raise ValueError(f"it has no bbox, and its segmentation is {shown(polygons)}")
    xs = [number_of(v) for polygon in polygons for v in polygon[0::2]]
    ys = [number_of(v) for polygon in polygons for v in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def load_json(path: Path) -> dict[str, list[Any]]:
    """A COCO file's tree, with its three lists; UTF-8 or UTF-16, with or without a byte-order mark.

    Raises:
        InputError: it cannot be read, is no JSON, or has not the three lists.
    """
    tree = parse_json(read_text(path, most=MOST_DATA), f"the annotation file {path}")
    keys = ("images", "annotations", "categories")
    found: dict[str, Any] = tree if isinstance(tree, dict) else {}
    missing = [key for key in keys if key not in found]
    if missing:
        raise InputError(f"{path}: not in COCO format: it has no {', no '.join(missing)}")
    for key in keys:
        if not isinstance(found[key], list):
            raise InputError(f"{path}: not in COCO format: {key} must be a list, got {shown(found[key])}")
    return found


def _entry(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object with keys, got {shown(entry)}")
    return entry


def _check_unique(path: Path, what: str, values: Sequence[OwnId]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise InputError(f"{path}: {what} {value!r} occurs twice")
