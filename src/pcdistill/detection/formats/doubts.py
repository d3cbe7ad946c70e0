"""What looks wrong in a set that could be read: boxes of another kind, doubled ones, classes without any."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from pcdistill.detection.formats.base import DetectionSet, Note, Record

FEW = 5  # names in a message


def doubts(found: DetectionSet) -> Iterator[Note]:
    """Notes on what looks wrong, split by split."""
    for split, records in found.splits.items():
        where = f"{split} ({found.origins[split]})"
        boxes = np.concatenate([record.boxes for record in records])
        if found.format != "YOLO" and len(boxes) and boxes.max() <= 1 and min(r.width for r in records) > 2:
            yield Note(
                "warning",
                f"{where}: every box lies within the first pixel; they seem to be divided by width and height, "
                f"and {found.format} wants pixels",
                told=True,
            )
        doubled = sum(_doubled(record) for record in records)
        if doubled:
            yield Note("warning", f"{where}: {doubled} boxes are there twice, with the same class")
        labels = Counter(np.concatenate([record.labels for record in records]).tolist())
        empty = [name for k, name in enumerate(found.classes, start=1) if k not in labels]
        if empty:
            more = f" and {len(empty) - FEW} more" if len(empty) > FEW else ""
            yield Note("warning", f"{where}: no box has the class {', '.join(empty[:FEW])}{more}")


def _doubled(record: Record) -> int:
    if len(record.boxes) < 2:
        return 0
    rows = np.concatenate([record.boxes, record.labels[:, None]], axis=1)
    return len(rows) - len(np.unique(rows, axis=0))
