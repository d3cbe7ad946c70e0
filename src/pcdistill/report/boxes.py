"""Boxes drawn on the images themselves, as SVG: sharp at any size, and no label covers another."""

import base64
import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SAMPLES = "samples.npz"
SHOWN_SCORE = 0.3  # detections below it are not drawn
MOST_BOXES = 12
COLORS = ("#b34700", "#0067a5", "#00704f", "#93378a", "#7d5600", "#1d6a96")  # white text on each has 4.5 : 1
TINY = 64  # pixels of the longer side: so small an image is shown with its pixels
MASKED_ROWS = 4
UNFOLDED = 3  # images that a page shows at once; the others are a click away


def read_samples(run_dir: Path) -> dict[str, np.ndarray] | None:
    """What a detection run left in samples.npz; None where there is none, or it is damaged."""
    try:
        with (Path(run_dir) / SAMPLES).open("rb") as file, np.load(file, allow_pickle=False) as samples:
            return dict(samples)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # cut off, or no archive
        return None


def boxes_of_classes(run_dir: Path) -> dict[str, int]:
    """How many boxes each class has in the split that a run was evaluated on; {} where that was not left."""
    samples = read_samples(run_dir)
    if samples is None or "class_boxes" not in samples:
        return {}
    return {str(n): int(k) for n, k in zip(samples["classes"], samples["class_boxes"], strict=True)}


def run_boxes(run_dir: Path) -> dict[str, Any] | None:
    """Truth, teacher and student on a run's images, and what DFMSD masked; None without samples."""
    samples = read_samples(run_dir)
    if samples is None:
        return None
    found = _figures({"truth": (samples, "truth"), "teacher": (samples, "teacher"), "student": (samples, "student")})
    strides = sorted({int(m.group(1)) for name in samples if (m := re.fullmatch(r"mask_0_(\d+)", name))})
    if strides:
        found["rows"] += [_masks(samples, row, strides) for row in range(min(_count(samples), MASKED_ROWS))]
        found["notes"].append("Dark: places that DFMSD masked at the end of training.")
    return found


def compare_boxes(runs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Truth, teacher and the student of every method side by side; None without samples.

    Args:
        runs: method to the folder of one of its runs.
    """
    read = {name: samples for name, path in runs.items() if (samples := read_samples(path)) is not None}
    if not read:
        return None
    columns = {"truth": (next(iter(read.values())), "truth")}
    taught = next((samples for samples in read.values() if "teacher_0_boxes" in samples), None)
    if taught is not None:
        columns["teacher"] = (taught, "teacher")
    return _figures(columns | {name: (samples, "student") for name, samples in read.items()})


def labelled(
    boxes: Iterable[tuple[Sequence[float], str, str]], width: float, height: float, font: float
) -> list[dict[str, Any]]:
    """Boxes with places for their labels, which keep within the image and clear of each other.

    Args:
        boxes: (x0, y0, x1, y1), colour, label; where there is no room for all labels, the earlier ones have them.
        width: of the image.
        height: of the same.
        font: height of a letter, in the image's pixels.

    Returns:
        What a template draws; `name` is empty where there was no place.
    """
    found: list[dict[str, Any]] = []
    taken: list[tuple[float, ...]] = []
    line, pad = 1.3 * font, 0.25 * font
    for (x0, y0, x1, y1), color, name in boxes:
        wide = 0.58 * font * len(name) + 2 * pad
        left, right = min(max(x0, 0.0), max(width - wide, 0.0)), max(min(x1 - wide, width - wide), 0.0)
        tops = (y0 - line, y0, y1, y1 - line)
        places = [(x, y) for x in (left, right) for y in tops if 0 <= y <= height - line]
        free = next((p for p in places if not any(_overlap((*p, wide, line), other) for other in taken)), None)
        if free is not None:
            taken.append((*free, wide, line))
        x, y = free or (0.0, 0.0)
        shown = {"x": x0, "y": y0, "width": max(x1 - x0, 0.0), "height": max(y1 - y0, 0.0)}
        shown |= {"label_x": x, "label_y": y, "label_width": wide, "label_height": line}
        shown |= {"text_x": x + pad, "text_y": y + 0.98 * font}
        found.append({"color": color, "name": name if free else "", **{k: round(v, 2) for k, v in shown.items()}})
    return found


def picture_data(pixels: np.ndarray) -> str:
    """[H, W, 3] uint8 as an address that holds it: small ones as they are, photographs as JPEG."""
    out = io.BytesIO()
    if max(pixels.shape[:2]) <= TINY or pixels.shape[2] == 4:
        Image.fromarray(pixels).save(out, "PNG")
        kind = "png"
    else:
        Image.fromarray(pixels).save(out, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def font_of(width: float) -> float:
    """Height of a letter that can be read where an image so wide is shown in a column."""
    return 13 * width / 320


def _figures(columns: Mapping[str, tuple[Mapping[str, np.ndarray], str]]) -> dict[str, Any]:
    """One row per image, one cell per model; a model that left nothing has no cell."""
    drawn = {title: value for title, value in columns.items() if f"{value[1]}_0_boxes" in value[0]}
    first = next(iter(columns.values()))[0]
    rows = []
    for row in range(_count(first)):
        cells = [_cell(samples, row, who, title) for title, (samples, who) in drawn.items()]
        rows.append({"title": f"Image {row + 1}", "cells": cells})
    notes = [
        f"Beside a class is the box's score. Boxes with a score below {SHOWN_SCORE:g} are not drawn, nor more than "
        f"{MOST_BOXES} on an image. A label that would cover another is left out."
    ]
    notes += [f"{title} left no boxes on these images." for title in columns if title not in drawn]
    return {
        "sources": [_source(first, row) for row in range(_count(first))],
        "rows": rows,
        "notes": notes,
        "shown": UNFOLDED,
    }


def _source(samples: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    image = samples[f"image_{row}"]
    height, width = image.shape[:2]
    data, tiny = picture_data(image), max(height, width) <= TINY
    return {"id": f"sample-{row}", "data": data, "width": width, "height": height, "tiny": tiny}


def _cell(samples: Mapping[str, np.ndarray], row: int, who: str, title: str) -> dict[str, Any]:
    height, width = samples[f"image_{row}"].shape[:2]
    boxes, labels = samples[f"{who}_{row}_boxes"], samples[f"{who}_{row}_labels"].astype(int)
    scores = samples.get(f"{who}_{row}_scores")
    order: Sequence[int] = range(len(boxes))
    if scores is not None:  # the most certain first
        order = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= SHOWN_SCORE][:MOST_BOXES]
    named = [
        (
            tuple(float(v) for v in boxes[i]),
            COLORS[(labels[i] - 1) % len(COLORS)],
            str(samples["classes"][labels[i] - 1]) + ("" if scores is None else f" {scores[i]:.2f}"),
        )
        for i in order
    ]
    said = f"{len(named)} box" + ("" if len(named) == 1 else "es")
    if not named:
        best = "" if scores is None or not len(scores) else f"; its best score is {float(scores.max()):.2f}"
        said = "no boxes" if scores is None else f"nothing found with a score of {SHOWN_SCORE:g} or more{best}"
    font = font_of(width)
    return {
        "title": title,
        "said": said,
        "source": f"sample-{row}",
        "width": width,
        "height": height,
        "font": round(font, 2),
        "line": round(font / 7, 2),
        "boxes": labelled(named, width, height, font),
        "overlay": None,
    }


def _masks(samples: Mapping[str, np.ndarray], row: int, strides: Sequence[int]) -> dict[str, Any]:
    """The image under what was masked of each level."""
    bottom, right = (float(v) for v in samples[f"extent_{row}"])
    cells = []
    for stride in strides:
        mask, channels = samples[f"mask_{row}_{stride}"], samples[f"channels_{row}_{stride}"]
        shade = np.zeros((*mask.shape, 4), dtype=np.uint8)
        shade[mask == 0] = (20, 24, 29, 185)
        cell = _cell(samples, row, "truth", f"stride {stride}")
        places, shares = 100 * (mask == 0).mean(), 100 * (channels == 0).mean()
        said = f"{places:.0f} % of the places and {shares:.0f} % of the channels masked"
        overlay = {"data": picture_data(shade), "width": round(right, 2), "height": round(bottom, 2)}
        cells.append({**cell, "said": said, "boxes": [], "overlay": overlay})
    return {"title": f"Image {row + 1}: masks of DFMSD", "cells": cells}


def _count(samples: Mapping[str, np.ndarray]) -> int:
    return sum(name.startswith("image_") for name in samples)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
