"""Detection sets on disk, checked whole before any training starts.

Everything that could stop a run after an hour is looked for here: files that are missing or no images, sizes that
differ from what the annotations say, category ids that do not exist, boxes that are no boxes. Nothing in a file is
executed or expanded.
"""

from dataclasses import replace
from pathlib import Path

from pcdistill.detection.formats.base import SPLITS, DetectionSet, Note, Record
from pcdistill.detection.formats.coco import LAYOUT as COCO_LAYOUT
from pcdistill.detection.formats.coco import find_coco, read_coco
from pcdistill.detection.formats.doubts import doubts
from pcdistill.detection.formats.voc import LAYOUT as VOC_LAYOUT
from pcdistill.detection.formats.voc import find_voc, read_voc, voc_file
from pcdistill.detection.formats.yolo import LAYOUT as YOLO_LAYOUT
from pcdistill.detection.formats.yolo import find_yolo, read_yolo
from pcdistill.errors import InputError

__all__ = ["KINDS", "SPLITS", "DetectionSet", "Note", "Record", "read_set"]

KINDS = {"coco": COCO_LAYOUT, "voc": VOC_LAYOUT, "yolo": YOLO_LAYOUT}
ENDINGS = {".json": "coco", ".xml": "voc", ".yaml": "yolo", ".yml": "yolo"}


def read_set(path: Path, kind: str | None = None) -> DetectionSet:
    """Read a detection set, with whatever of train, val and test its files define; docs/data.md lists the layouts.

    Args:
        path: a folder, or a single annotation file (data.yaml for YOLO).
        kind: "coco", "voc" or "yolo"; None looks which it is.

    Raises:
        InputError: what is wrong, in which file.
    """
    found = _read_file(path, kind) if path.is_file() else _read_folder(path, kind)
    notes, splits = list(found.notes), {}
    for split, records in found.splits.items():
        if records:
            splits[split] = records
        elif split == "train":
            raise InputError(f"{path}: the training split ({found.origins[split]}) lists no images")
        else:
            notes.append(Note("left out", f"{path}: the split {split} ({found.origins[split]}), which has no images"))
    if "train" not in splits:
        raise InputError(f"data folder {path} has no training split, only {', '.join(found.splits)}")
    if not any(len(record.boxes) for record in splits["train"]):
        raise InputError(f"{path}: no training image has a usable box")
    origins = {split: found.origins[split] for split in splits}
    found = replace(found, splits=splits, origins=origins)
    return replace(found, notes=(*notes, *doubts(found)))


def _read_file(path: Path, kind: str | None) -> DetectionSet:
    fits = ENDINGS.get(path.suffix.lower())
    if fits is None or kind not in (None, fits):
        wanted = {"coco": "a .json file", "voc": "an .xml file", "yolo": "data.yaml"}
        right = wanted[kind] if kind else ", ".join(wanted.values())
        raise InputError(f"data: {path} must be a folder or {right}")
    if fits == "coco":
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        return read_coco({"train": path}, root)
    if fits == "voc":
        return read_voc(voc_file(path), path.parent)
    return read_yolo(path)


def _read_folder(root: Path, kind: str | None) -> DetectionSet:
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist")
    if kind in (None, "coco") and (files := find_coco(root, sure=kind is not None)):
        return read_coco(files, root)
    if kind in (None, "voc") and (groups := find_voc(root)):
        return read_voc(groups, root)
    if kind in (None, "yolo") and (file := find_yolo(root)) is not None:
        return read_yolo(file)
    wanted = " nor ".join(text for name, text in KINDS.items() if kind in (None, name))
    raise InputError(f"data folder {root} holds no detection set: found neither {wanted}")
