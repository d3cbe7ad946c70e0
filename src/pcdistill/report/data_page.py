"""A page on a data set: its splits and classes, what was repaired or left out, and samples with their boxes."""

from pathlib import Path
from typing import Any

from pcdistill.data.findings import Findings, Sample
from pcdistill.report._folder import replace_file
from pcdistill.report._page import render
from pcdistill.report.boxes import COLORS, font_of, labelled


def write_data_page(found: Findings, path: Path) -> Path:
    """Write the page; it is one file, loads nothing, and everything in it is escaped."""
    boxes = found.task == "detection"
    color = {name: COLORS[k % len(COLORS)] for k, name in enumerate(found.classes)}
    columns = [split.name for split in found.splits]
    rows = [(name, [split.counts[name] for split in found.splits]) for name in found.classes]
    total = sum(split.images for split in found.splits)
    header = [("images", f"{total:,}", ""), ("classes", f"{len(found.classes):,}", ""), ("format", found.format, "")]
    if boxes:
        header.insert(1, ("boxes", f"{sum(sum(split.counts.values()) for split in found.splits):,}", ""))
    page = render(
        "data.html.j2",
        title=found.data,
        subtitle=f"Data for {found.task}",
        header=header,
        boxes=boxes,
        splits=[(s.name, s.images, sum(s.counts.values()), s.empty, s.origin) for s in found.splits],
        columns=columns,
        rows=rows,
        warned=found.warnings,
        repaired=found.repaired,
        left_out=found.left_out,
        samples=[_sample(sample, color) for sample in found.samples],
    )
    return replace_file(path, page)


def _sample(sample: Sample, color: dict[str, str]) -> dict[str, Any]:
    """What the template needs of a sample; line and text are as wide on the page whatever the picture's size."""
    width, height = sample.size
    font = font_of(width)
    caption = f"{sample.split}: {sample.name}" + (f" ({sample.label})" if sample.label else "")
    boxes = [((x, y, x + w, y + h), color[name], name) for name, x, y, w, h in sample.boxes]
    return {
        "picture": sample.picture,
        "width": width,
        "height": height,
        "caption": caption,
        "boxes": labelled(boxes, width, height, font),
        "line": round(font / 7, 2),
        "font": round(font, 2),
    }
