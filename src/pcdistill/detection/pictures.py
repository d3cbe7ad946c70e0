"""Pictures of a detection run: what was found beside the truth, and what DFMSD masked, from the run's samples.npz."""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pcdistill.files import atomic_write
from pcdistill.report.plots import BLUE, GREEN, INK, LIGHT, ORANGE, PURPLE, SKY, STYLE, VERMILION

SHOWN_SCORE = 0.3  # detections below it are not drawn
MOST_BOXES = 12
COLORS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)
SIDE = 1.75  # inches of one image


def write_run_pictures(run_dir: Path, *, missing_only: bool = False) -> list[Path]:
    """Draw the pictures of a run that left samples, or only those that are missing; none for any other."""
    samples = read_samples(run_dir)
    if samples is None:
        return []
    columns = {"truth": (samples, "truth"), "teacher": (samples, "teacher"), "student": (samples, "student")}
    made, folder = [], run_dir / "pictures"
    detections, masks = folder / "1_detections.png", folder / "2_masks_of_DFMSD.png"
    if not (missing_only and detections.exists()):
        made.append(_save(draw_detections(columns), detections))
    if any(name.startswith("mask_0_") for name in samples) and not (missing_only and masks.exists()):
        made.append(_save(draw_masks(samples), masks))
    return made


def write_compare_pictures(out_dir: Path, runs: Mapping[str, Path]) -> list[Path]:
    """Draw truth, teacher and the student of every method side by side; nothing without samples.

    Args:
        out_dir: the comparison's folder; `pictures/` in it is written.
        runs: method to the folder of one of its runs.
    """
    found = {name: samples for name, path in runs.items() if (samples := read_samples(path)) is not None}
    if not found:
        return []
    taught = next((s for s in found.values() if "teacher_0_boxes" in s), None)
    columns = {"truth": (next(iter(found.values())), "truth")}
    if taught is not None:
        columns["teacher"] = (taught, "teacher")
    columns.update({name: (samples, "student") for name, samples in found.items()})
    return [_save(draw_detections(columns), out_dir / "pictures" / "1_detections.png")]


def read_samples(run_dir: Path) -> dict[str, np.ndarray] | None:
    path = Path(run_dir) / "samples.npz"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as samples:
            return dict(samples)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # cut off, or no archive
        return None


def draw_detections(columns: Mapping[str, tuple[Mapping[str, np.ndarray], str]]) -> Figure:
    """One row per image, one column per model; a column whose model left nothing is not drawn."""
    drawn = {title: value for title, value in columns.items() if f"{value[1]}_0_boxes" in value[0]}
    first = next(iter(drawn.values()))[0]
    rows = _count(first)
    with matplotlib.rc_context({**STYLE, "axes.titleweight": "normal", "axes.titlelocation": "center"}):
        shape = max(first[f"image_{row}"].shape[0] / first[f"image_{row}"].shape[1] for row in range(rows))
        figure = Figure(figsize=(SIDE * len(drawn), SIDE * shape * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, len(drawn), squeeze=False)
        for row in range(rows):
            for ax, (title, (samples, who)) in zip(axes[row], drawn.items(), strict=True):
                _picture(ax, samples[f"image_{row}"])
                _boxes(ax, samples, f"{who}_{row}")
                if row == 0:
                    ax.set_title(title)
        figure.supxlabel(f"score of the box beside its class; boxes below {SHOWN_SCORE:g} are not drawn", fontsize=7.5)
    return figure


def draw_masks(samples: Mapping[str, np.ndarray]) -> Figure:
    """One row per image: the image with its boxes, then per level the places that are masked, and under each level the
    share of channels that are masked.
    """
    strides = sorted({int(m.group(1)) for name in samples if (m := re.fullmatch(r"mask_0_(\d+)", name))})
    rows = min(_count(samples), 4)
    with matplotlib.rc_context({**STYLE, "axes.titleweight": "normal", "axes.titlelocation": "center"}):
        figure = Figure(figsize=(SIDE * (1 + len(strides)), (SIDE + 0.28) * rows + 0.6), layout="constrained")
        axes = figure.subplots(2 * rows, 1 + len(strides), squeeze=False, height_ratios=[1, 0.07] * rows)
        for row in range(rows):
            height, width = samples[f"image_{row}"].shape[:2]
            _picture(axes[2 * row][0], samples[f"image_{row}"])
            _boxes(axes[2 * row][0], samples, f"truth_{row}")
            axes[2 * row + 1][0].set_axis_off()
            bottom, right = samples[f"extent_{row}"]
            for column, stride in enumerate(strides, start=1):
                ax, strip = axes[2 * row][column], axes[2 * row + 1][column]
                mask = samples[f"mask_{row}_{stride}"]
                _picture(ax, samples[f"image_{row}"])
                shade = np.zeros((*mask.shape, 4))
                shade[mask == 0] = (*matplotlib.colors.to_rgb(INK), 0.72)
                ax.imshow(shade, extent=(0, right, bottom, 0), interpolation="nearest")
                ax.set_xlim(0, width)
                ax.set_ylim(height, 0)
                channels = samples[f"channels_{row}_{stride}"]
                strip.imshow(1 - channels[None], aspect="auto", cmap=_two_colors(), vmin=0, vmax=1)
                strip.set_xticks([])
                strip.set_yticks([])
                strip.grid(False)
                if row == 0:
                    ax.set_title(f"stride {stride}")
            if row == 0:
                axes[0][0].set_title("truth")
        note = "dark: masked places, and in the strip below masked channels, at the end of training"
        figure.supxlabel(note, fontsize=7.5)
    return figure


def _two_colors() -> Any:
    return matplotlib.colors.ListedColormap([LIGHT, INK])


def _picture(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def _boxes(ax: Axes, samples: Mapping[str, np.ndarray], name: str) -> None:
    """The boxes of one image in the colours of their classes, the most certain last and so on top."""
    boxes, labels = samples[f"{name}_boxes"], samples[f"{name}_labels"].astype(int)
    scores = samples.get(f"{name}_scores")
    order: Sequence[int] = range(len(boxes))
    if scores is not None:
        order = [i for i in np.argsort(scores, kind="stable") if scores[i] >= SHOWN_SCORE][-MOST_BOXES:]
    for i in order:
        x0, y0, x1, y1 = boxes[i]
        color = COLORS[(labels[i] - 1) % len(COLORS)]
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.3))
        text = str(samples["classes"][labels[i] - 1])
        text += "" if scores is None else f" {scores[i]:.2f}".replace("0.", ".")
        back = {"facecolor": color, "edgecolor": "none", "pad": 0.6, "alpha": 0.9}
        ax.text(x0, max(y0, 1), text, fontsize=5.5, color="white", bbox=back, va="bottom", clip_on=True)


def _count(samples: Mapping[str, np.ndarray]) -> int:
    return sum(name.startswith("image_") for name in samples)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # a figure needs a canvas to be drawn on
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    if not (path.exists() and path.read_bytes() == buffer.getvalue()):
        atomic_write(path, buffer.getvalue())
    return path
