"""Pascal VOC xml, as VOC itself, Roboflow, CVAT and LabelImg write it."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pcdistill.detection.formats.base import (
    SPLITS,
    DetectionSet,
    Note,
    RawImage,
    RawSplit,
    check_name,
    finish_split,
    number_of,
    shown,
    size_of,
)
from pcdistill.detection.formats.images import ImageFinder, Size, seen_in
from pcdistill.errors import InputError
from pcdistill.plain import MOST_DATA, read_text

LAYOUT = "Annotations/, JPEGImages/ and ImageSets/Main/"
YES = ("1", "true", "yes")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MOST_BYTES = 16 * 2**20  # of one xml file, which describes one image

Row = tuple[tuple[float, float, float, float], str, float, int]


@dataclass
class XmlImage:
    """One xml file: the image's names in it, its size, and corners as they stand, class, area (NaN) and difficult.

    `decimal`: every corner is written with a point.
    """

    names: list[str]
    size: Size | None
    rows: list[Row]
    decimal: bool = True


@dataclass
class Group:
    """The xml files of one split."""

    origin: str
    where: Path
    files: list[tuple[Path | None, str, ImageFinder]]  # file, name of the image without extension, where images may be


def find_voc(root: Path) -> dict[str, Group]:
    """The xml files of each split, by lists in ImageSets/Main, by folders, or all as train.

    Raises:
        InputError: a list cannot be read, or names what is not there.
    """
    groups: dict[str, Group] = {}
    for folder in [root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))]:
        for split, (listing, entries) in _listed(folder).items():
            finder = ImageFinder(_folders(folder, folder / "Annotations", split))
            group = groups.setdefault(split, Group("", root, []))
            group.origin += (", " if group.origin else "") + _relative(listing, root)
            group.where = group.where if group.files else listing
            named: dict[Path | str, tuple[Path | None, str, ImageFinder]] = {}
            for entry in entries:  # one that is listed twice could be learnt from and held out
                file = _xml(folder, split, entry, listing)
                named.setdefault(file or entry, (file, entry, finder))
            group.files += named.values()
    if groups:
        return groups
    for split, aliases in SPLITS.items():
        for alias in aliases:
            places = [root / alias / "Annotations", root / alias, root / "Annotations" / alias]
            found = next((place for place in places if seen_in(place, "*.xml")), None)
            if found is not None and split not in groups:
                groups[split] = _folder_group(found, root, split)
    if "train" not in groups:
        found = next((p for p in (root / "Annotations", root / "annotations", root) if seen_in(p, "*.xml")), None)
        if found is not None:
            groups["train"] = _folder_group(found, root, "train")
    return groups


def voc_file(file: Path) -> dict[str, Group]:
    """One xml file as a set of one image."""
    root = file.parent.parent if file.parent.name.lower() == "annotations" else file.parent
    group = _folder_group(file.parent, root, "train")
    return {"train": Group(file.name, file, [(file, file.stem, group.files[0][2])])}


def read_voc(groups: dict[str, Group], root: Path) -> DetectionSet:
    """Read the xml files of a set's splits. Classes are the names that occur, in the order of the alphabet.

    Objects marked difficult count as crowd: neither learnt nor held against a detector. Corners count from 1 there and
    include the last pixel: columns a..b become the edges a - 1 and b. Where a corner is below 1, or all are decimals,
    they are edges already, as CVAT writes them. An image that CVAT lists without an xml file has no boxes.

    Raises:
        InputError: broken or incomplete xml, missing or unreadable images.
    """
    read = {
        split: [_read_xml(file) if file else XmlImage([], None, []) for file, *_ in group.files]
        for split, group in groups.items()
    }
    every = [row for images in read.values() for image in images for row in image.rows]
    classes = tuple(sorted({row[1] for row in every}))
    label_of = {name: k for k, name in enumerate(classes, start=1)}
    decimal = bool(every) and all(image.decimal for images in read.values() for image in images)
    first = 0.0 if decimal or any(min(row[0][:2]) < 1 for row in every) else 1.0
    notes = []
    if first == 0:
        why = "all corners are decimals" if decimal else "a corner is below 1"
        notes.append(Note("repaired", f"{root}: {why}: corners are taken as edges, not as pixels counted from 1"))
    splits, origins = {}, {}
    for split, group in groups.items():
        raw = RawSplit(group.where, group.origin, [])
        respelled = other = 0
        for number, (image, (_, stem, finder)) in enumerate(zip(read[split], group.files, strict=True)):
            path, renamed, doubtful = _image_file(image, stem, finder)
            respelled += renamed
            other += doubtful
            rows = [
                ((x0 - first, y0 - first, x1, y1), label_of[name], area, hard)
                for (x0, y0, x1, y1), name, area, hard in image.rows
            ]
            raw.images.append(RawImage(path.name if path else [*image.names, stem][0], path, image.size, number, rows))
        if without := sum(file is None for file, *_ in group.files):
            raw.notes.append(Note("warning", f"{group.where}: {without} images have no xml file, and so no boxes"))
        if respelled:
            raw.notes.append(Note("repaired", f"{group.where}: {respelled} images were found under another spelling"))
        if other:
            raw.notes.append(
                Note(
                    "warning",
                    f"{group.where}: {other} xml files name another image than the one of their own name, "
                    "which was taken",
                )
            )
        splits[split], found = finish_split(raw)
        origins[split] = group.origin
        notes += found
    return DetectionSet("VOC", classes, tuple(range(1, len(classes) + 1)), splits, origins, tuple(notes))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _listed(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Split -> list and its entries. Without train.txt, trainval.txt less val.txt is train, or CVAT's default.txt."""
    lists = folder / "ImageSets" / "Main"
    found = {}
    for split, aliases in SPLITS.items():
        path = next((p for alias in aliases if (p := lists / f"{alias}.txt").is_file()), None)
        if path is not None:
            found[split] = (path, _entries(path, folder))
    for name in ("trainval", "default"):
        path = lists / f"{name}.txt"
        if "train" not in found and path.is_file():
            taken = set(found["val"][1]) if "val" in found else set()
            found["train"] = (path, [entry for entry in _entries(path, folder) if entry not in taken])
    return found


def _entries(path: Path, folder: Path) -> list[str]:
    """The names of a list; the lists of a class have -1, 0 or 1 behind each."""
    lines = [line.strip() for line in read_text(path, most=MOST_DATA).splitlines() if line.strip()]
    found = []
    for line in lines:
        name, _, mark = line.rpartition(" ")
        marked = mark in ("-1", "0", "1") and name.strip() and not (folder / "Annotations" / f"{line}.xml").exists()
        found.append(name.strip() if marked else line)
    return found


def _xml(folder: Path, split: str, entry: str, listing: Path) -> Path | None:
    """The xml file of a list's entry, which may have an extension of an image; CVAT writes none without boxes."""
    bases = [folder / "Annotations", *(folder / "Annotations" / name for name in (*SPLITS[split], "default"))]
    for name in (entry, str(PurePosixPath(entry).with_suffix(""))):
        for base in bases:
            path = base / f"{name}.xml"
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # no name of a file at all
                break
    if listing.stem == "default" or (folder / "labelmap.txt").is_file():
        return None
    raise InputError(
        f"{listing}: the image list names {shown(entry)[1:-1]}, but {folder / 'Annotations'} has no such xml file"
    )


def _folders(folder: Path, annotations: Path, split: str) -> list[Path]:
    names = ("JPEGImages", "images", "Images", "data")
    inside = [folder / name / alias for name in names for alias in (*SPLITS[split], "default")]
    return [*inside, *(folder / name for name in names), annotations, folder, *(folder / a for a in SPLITS[split])]


def _folder_group(found: Path, root: Path, split: str) -> Group:
    """All xml files of a folder."""
    above = found.parent if found != root else root
    finder = ImageFinder([found, *_folders(above, found, split), *_folders(root, found, split)])
    origin = "all images" if found == root else f"{_relative(found, root)}/"
    return Group(origin, found, [(file, file.stem, finder) for file in seen_in(found, "*.xml")])


def _image_file(image: XmlImage, stem: str, finder: ImageFinder) -> tuple[Path | None, bool, bool]:
    """The image of an xml file; whether its name had to be respelled; whether the xml names another image.

    The file of the same name counts for more than what stands in the xml, which renaming leaves behind.
    """
    before = finder.respelled
    named = next((found for name in image.names if (found := finder.find(name)) is not None), None)
    finder.respelled, respelled = before, finder.respelled > before
    same = finder.of_stem(stem) or finder.of_stem(str(PurePosixPath(stem).with_suffix("")))
    if named is not None and (not same or named in same):
        return named, respelled, False
    if same:
        return same[0], named is None, named is not None
    without = [path for name in image.names for path in finder.of_stem(name.replace("\\", "/").rpartition("/")[2])]
    return (without[0], True, False) if without else (None, False, False)


class _NoDoctype(ET.TreeBuilder):
    """Refuses document types, which can hold entities that expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type")


def _read_xml(file: Path) -> XmlImage:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        root = ET.parse(file, ET.XMLParser(target=_NoDoctype())).getroot()
        for node in root.iter():
            node.tag = node.tag.rpartition("}")[2]  # a namespace stands before it
        if root.tag.lower() != "annotation" and all(root.find(key) is None for key in ("filename", "size", "object")):
            raise ValueError(f"it begins with <{shown(root.tag)[1:-1]}>, not with <annotation>")
        names = [text.strip() for key in ("filename", "path") if (text := root.findtext(key)) and text.strip()]
        size = size_of(_optional(root, "size/width"), _optional(root, "size/height"))
        rows = list(_rows(root, file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that Python does not know
        raise InputError(f"{file}: not a VOC annotation: {error}") from None
    corners = [item.findtext(f"bndbox/{key}") or "" for item in root.iter("object") for key in CORNERS]
    return XmlImage(names, size, rows, all("." in text for text in corners))


def _rows(root: Any, file: Path) -> Iterator[Row]:
    for i, item in enumerate(root.iter("object")):
        x0, y0, x1, y1 = (number_of(_text(item, f"bndbox/{key}")) for key in CORNERS)
        name = check_name(_text(item, "name"), f"{file}: object {i}: <name>")
        hard = (item.findtext("difficult") or "").strip().lower() in YES
        yield (x0, y0, x1, y1), name, float("nan"), int(hard)


def _text(node: Any, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{path}> is missing")
    return str(text).strip()


def _optional(node: Any, path: str) -> str | None:
    text = node.findtext(path)
    return None if text is None else str(text).strip()
