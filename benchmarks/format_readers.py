"""Which shapes of tests/detection/exports.py do supervision and datumaro read to the true boxes?

    uv venv readers && uv pip install -p readers/bin/python supervision datumaro
    PYTHONPATH=. readers/bin/python benchmarks/format_readers.py

supervision is told the right folders, as it looks for none; datumaro gets the folder and the format's name.
"""

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.detection.exports import EXPORTS, TRUTH

Found = dict[str, list[tuple]]


def by_supervision(kind: str, place: Path, root: Path) -> Found:
    """Every annotation file or folder of a set, read with the folder of its images."""
    found: Found = {}
    for part in supervision_sets(kind, place, root):
        for path, _, seen in part:
            found[Path(path).stem] = [(part.classes[c], *box) for box, c in zip(seen.xyxy, seen.class_id, strict=True)]
    return found


def supervision_sets(kind: str, place: Path, root: Path) -> Iterator[Any]:
    import supervision

    read = supervision.DetectionDataset
    if kind == "coco":
        for file in [place] if place.is_file() else [f for f in root.rglob("*.json") if "captions" not in f.name]:
            named = file.stem.removeprefix("instances_")
            likely = (root / "images" / named, root / named, file.parent / "data", root / "images", file.parent)
            yield read.from_coco(str(next((f for f in likely if any(f.glob("*.jpg"))), file.parent)), str(file))
    elif kind == "voc":
        for folder in sorted({file.parent for file in root.rglob("*.xml")}):
            likely = (folder.parent / "JPEGImages", folder.parent / "images", folder)
            yield read.from_pascal_voc(str(next(f for f in likely if f.is_dir())), str(folder))
    else:
        yaml = place if place.is_file() else next(iter(root.glob("*.yaml")), None)
        for folder in sorted({file.parent for file in root.rglob("*.jpg")}):
            yield read.from_yolo(str(folder), str(folder).replace("images", "labels"), str(yaml))


def by_datumaro(kind: str, place: Path, root: Path) -> Found:
    import datumaro

    found: Found = {}
    read = datumaro.Dataset.import_from(str(place if place.is_dir() else place.parent), kind)
    names = read.categories()[datumaro.AnnotationType.label]
    for item in read:
        boxes = [a for a in item.annotations if a.type == datumaro.AnnotationType.bbox]
        found[Path(item.id).name] = [(names[a.label].name, a.x, a.y, a.x + a.w, a.y + a.h) for a in boxes]
    return found


def outcome(reader: Any, export: str) -> str:
    """ "right", "other boxes", or the error's class and first words."""
    with tempfile.TemporaryDirectory() as folder:
        kind, _, place = EXPORTS[export](Path(folder)).partition(":")
        try:
            found = reader(kind, Path(place), Path(folder))
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    found.pop("edge", None)
    same = {stem: sorted((c, *map(float, box)) for c, *box in boxes) for stem, boxes in found.items()}
    return "right" if same == TRUTH else "other boxes"


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for reader in (by_supervision, by_datumaro):
        outcomes = {export: outcome(reader, export) for export in EXPORTS}
        for export, text in outcomes.items():
            print(f"{reader.__name__:<16} {export:<28} {text}")
        counts = Counter(text.partition(":")[0] for text in outcomes.values())
        print(reader.__name__, dict(counts))


if __name__ == "__main__":
    main()
