"""Charts as inline SVG: learning curves of one run, curves and seeds of several methods."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from pcdistill.report._format import metric_name, short_metric
from pcdistill.report.rows import EPOCHS, Row
from pcdistill.stats import Summary, summary

# Okabe and Ito's palette: distinguishable in the common forms of colour blindness. Grey and black are the baselines'.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9"
INK, SOFT, GREY, LIGHT = "#22272e", "#5b6470", "#8a929c", "#e4e7eb"
BASELINES = {"none": GREY, "kd": INK, "pcd": VERMILION}
OTHERS = (BLUE, GREEN, PURPLE, ORANGE, SKY)
TOGETHER = 6  # more methods than this get a panel each
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pcdistill",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#b6bcc4",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def learning_curves(rows: Sequence[Mapping[str, float]], metric: str, best_epoch: float | None) -> Markup | None:
    """The metric and the loss over epochs, on training and validation images; None if there is nothing to draw."""
    panels = []
    for key in (metric, "loss"):
        lines = {
            "training": (f"train/{key}", BLUE, "-"),
            "validation": (f"val/{key}", VERMILION, "-"),
            "validation, averaged weights": (f"val_ema/{key}", GREEN, "--"),
        }
        drawn = {label: (series(rows, column), color, style) for label, (column, color, style) in lines.items()}
        drawn = {label: line for label, line in drawn.items() if len(line[0])}
        if drawn:
            panels.append((key, drawn))
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9 * len(panels), 3.1), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (key, drawn) in zip(axes, panels, strict=True):
            for label, (points, color, style) in drawn.items():
                _line(ax, points, color=color, linestyle=style, label=label)
            ax.set_title(metric_name(key) if key != "loss" else "loss")
            _epoch_axis(ax)
            if best_epoch is not None and key == metric:
                ax.axvline(best_epoch, color=GREY, linewidth=1, linestyle=":", label=f"best epoch ({best_epoch:g})")
            ax.legend(loc="best")
        return _svg(figure, "learning curves")


def term_curves(rows: Sequence[Mapping[str, float]]) -> Markup | None:
    """A small panel for every part of the loss and for the learning rate; None if there is none."""
    skip = {"train/loss", "train/top1", "train/top5"}
    columns = dict.fromkeys(key for row in rows for key in row if key.startswith("train/") and key not in skip)
    panels = [(key.removeprefix("train/"), series(rows, key), BLUE) for key in columns]
    panels = [("total loss", series(rows, "train/loss"), INK), *panels, ("learning rate", series(rows, "lr"), GREEN)]
    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(len(panels), across=4, width=2.45, height=2.0)
        for ax, (title, points, color) in zip(grid, panels, strict=False):
            _line(ax, points, color=color)
            ax.set_title(_shorten(title, 26))
            values = points[:, 1]
            if title != "learning rate" and values.min() > 0 and values.max() / values.min() > 100:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            _epoch_axis(ax)
        return _svg(figure, "terms of the loss and learning rate")


def method_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str) -> Markup | None:
    """Validation over epochs: each method's mean over its runs, with the 95 % interval of the mean as a band.

    Up to six methods share two panels (the whole training, and its second half); more get a small panel each, with KD
    in the background.
    """
    bands = {name: band for name, of_runs in runs.items() if len(band := _band(of_runs, f"val/{metric}"))}
    if not bands:
        return None
    colors = _colors(list(bands))
    with matplotlib.rc_context(STYLE):
        if len(bands) <= TOGETHER:
            return _svg(_curves_together(bands, colors, metric), f"{short_metric(metric)} on validation, by method")
        return _svg(_curves_apart(bands, colors), f"{short_metric(metric)} on validation, one panel per method")


def strength_lines(found: Mapping[str, Mapping[float, Summary]], metric: str) -> Markup:
    """The metric against the strength, one line a method, with the 95 % interval of every mean."""
    colors = _colors(list(found))
    strengths = sorted({strength for row in found.values() for strength in row})
    positions = {strength: math.log2(strength) for strength in strengths}
    step = 0.012 * max(max(positions.values()) - min(positions.values()), 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.8, 4.2), layout="constrained")
        ax = figure.subplots()
        for i, (name, row) in enumerate(found.items()):
            x = [positions[strength] + step * (i - len(found) / 2) for strength in row]
            means = [one.mean for one in row.values()]
            widths = [one.ci95 if math.isfinite(one.ci95) else 0.0 for one in row.values()]
            marker = "os^Dvp*Xh<>"[i % 11]
            ax.errorbar(x, means, widths, color=colors[name], marker=marker, markersize=5, capsize=2, label=name)
        ax.set_xticks(list(positions.values()), [f"{strength:g}" for strength in strengths])
        ax.set_xlabel("strength: distillation's gradient over the labels'")
        ax.set_ylabel(metric_name(metric))
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, "accuracy against strength, by method")


def seed_dots(rows: Sequence[Row]) -> Markup | None:
    """Every seed's result as a dot, the mean and its 95 % interval above it, best and last epoch side by side."""
    methods = [row for row in rows if row.kind == "method"]
    if not any(row.finished for row in methods):
        return None
    colors = _colors([row.name for row in methods])
    everything = [v for row in methods for v in (*row.best_values.values(), *row.last_values.values())]
    low, high = min(everything), max(everything)
    room = max(high - low, 0.5)
    teachers = [row.best.mean for row in rows if row.kind == "teacher" and math.isfinite(row.best.mean)]
    near = [value for value in teachers if low - room <= value <= high + room]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.07 * max(high - low, 0.5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.8, 1.15 + 0.34 * len(methods)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True, sharex=True)
        for ax, epoch in zip(axes, EPOCHS, strict=True):
            for y, row in enumerate(methods):
                _dots(ax, y, row, epoch, colors[row.name], frame=(low - pad, high + pad))
            for value in near:
                ax.axvline(value, color=SOFT, linewidth=1.2, linestyle="--", zorder=1)
            if teachers:
                where = "" if near else " (right of the axis)" if teachers[0] > high else " (left of the axis)"
                ax.annotate(
                    f"teacher {teachers[0]:.2f}{where}",
                    (1, 1),
                    xycoords="axes fraction",
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    color=SOFT,
                    fontsize=8.5,
                )
            ax.set_title(f"{epoch} epoch")
            ax.set_xlabel(f"{metric_name(methods[0].metric)}, {'validation' if methods[0].split == 'val' else 'test'}")
            ax.set_xlim(low - pad, high + pad)
            ax.set_ylim(len(methods) - 0.4, -0.6)
            ax.grid(axis="y", visible=False)
            ax.xaxis.set_major_locator(MaxNLocator(6))
        labels = [_shorten(row.name, 26) + (f"  {row.finished}/{row.runs}" if row.failures else "") for row in methods]
        axes[0].set_yticks(range(len(methods)), labels)
        for label, row in zip(axes[0].get_yticklabels(), methods, strict=True):
            label.set_color(VERMILION if row.failures else INK)
        return _svg(figure, "every seed's result, by method")


def series(rows: Sequence[Mapping[str, float]], column: str) -> np.ndarray:
    """[points, 2]: epoch and value, of the rows where the column is a finite number."""
    found = [(row["epoch"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan)) and "epoch" in row]
    return np.asarray(found, dtype=np.float64).reshape(-1, 2)


def _band(runs: Sequence[Sequence[Mapping[str, float]]], column: str) -> np.ndarray:
    """[epochs, 3]: epoch, mean over the runs that reached it, half width of the interval (0 for one run)."""
    at: dict[float, list[float]] = {}
    for rows in runs:
        for epoch, value in series(rows, column):
            at.setdefault(epoch, []).append(value)
    found = []
    for epoch in sorted(at):
        over = summary(at[epoch])
        found.append((epoch, over.mean, 0.0 if math.isnan(over.ci95) else over.ci95))
    return np.asarray(found, dtype=np.float64).reshape(-1, 3)


def _curves_together(bands: Mapping[str, np.ndarray], colors: Mapping[str, str], metric: str) -> Figure:
    figure = Figure(figsize=(9.8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    half = max(band[:, 0].max() for band in bands.values()) / 2
    for ax, start in zip(axes, (0.0, half), strict=True):
        for name, band in bands.items():
            part = band[band[:, 0] >= start]
            _line(
                ax, part[:, :2], color=colors[name], label=_shorten(name, 28), linestyle="--" if name == "none" else "-"
            )
            ax.fill_between(
                part[:, 0],
                part[:, 1] - part[:, 2],
                part[:, 1] + part[:, 2],
                color=colors[name],
                alpha=0.15,
                linewidth=0,
            )
        ax.set_title("all epochs" if start == 0 else "second half")
        _epoch_axis(ax)
    axes[0].set_ylabel(f"{metric_name(metric)}, validation")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def _curves_apart(bands: Mapping[str, np.ndarray], colors: Mapping[str, str]) -> Figure:
    figure, grid = _grid(len(bands), across=4, width=2.45, height=1.9, shared=True)
    last = max(band[-1, 0] for band in bands.values())
    late = np.concatenate([band[band[:, 0] >= last / 2] for band in bands.values()])
    low, high = late[:, 1].min(), late[:, 1].max()  # of the means: a band of two runs would flatten every curve
    pad = 0.15 * max(high - low, 0.5)
    for ax, (name, band) in zip(grid, bands.items(), strict=False):
        if name != "kd" and "kd" in bands:
            ax.plot(bands["kd"][:, 0], bands["kd"][:, 1], color=GREY, linewidth=1, linestyle="--")
        color = VERMILION if name == "pcd" else INK if name in ("none", "kd") else BLUE
        _line(ax, band[:, :2], color=color)
        ax.fill_between(
            band[:, 0], band[:, 1] - band[:, 2], band[:, 1] + band[:, 2], color=color, alpha=0.15, linewidth=0
        )
        ax.set_title(_shorten(name, 26))
        if band[-1, 0] < last:
            ax.text(0.97, 0.05, f"ends in epoch {band[-1, 0]:g}", transform=ax.transAxes, ha="right", color=VERMILION)
        ax.set_ylim(low - pad, high + pad)
        _epoch_axis(ax)
        ax.tick_params(labelbottom=True)
    return figure


def _dots(ax: Axes, y: int, row: Row, epoch: str, color: str, frame: tuple[float, float]) -> None:
    values = row.last_values if epoch == "last" else row.best_values
    over = row.last if epoch == "last" else row.best
    if values:
        ax.scatter(
            list(values.values()), [y + 0.16] * len(values), s=17, color=color, alpha=0.45, linewidths=0, zorder=3
        )
        if math.isfinite(over.ci95):
            ends = (over.mean - over.ci95, over.mean + over.ci95)
            ax.plot(ends, [y - 0.12] * 2, color=color, linewidth=2, zorder=3)
            _beyond(ax, y - 0.12, over, frame, color)
        ax.scatter([over.mean], [y - 0.12], s=34, marker="D", color=color, edgecolors="white", linewidths=0.8, zorder=4)


def _beyond(ax: Axes, y: float, over: Summary, frame: tuple[float, float], color: str) -> None:
    """An arrow at each side of the frame that the interval passes, and its half width in figures."""
    passed = (over.mean - over.ci95 < frame[0], over.mean + over.ci95 > frame[1])
    for x, marker, is_passed in zip(frame, "<>", passed, strict=True):
        if is_passed:
            ax.plot([x], [y], marker=marker, color=color, markersize=6, clip_on=False, zorder=5)
    if any(passed):
        text = f"± {over.ci95:.3g}, {over.n} seeds"
        x, away, side = (frame[1], (-7, 2), "right") if passed[1] else (frame[0], (7, 2), "left")
        ax.annotate(text, (x, y), away, textcoords="offset points", ha=side, va="bottom", color=color, fontsize=6.5)


def _colors(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in BASELINES]
    return {name: BASELINES.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


def _grid(n: int, *, across: int, width: float, height: float, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with n small panels in rows of `across`; the panels left over are switched off."""
    down = math.ceil(n / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharex=shared, sharey=shared).flat)
    for ax in panels[n:]:
        ax.set_axis_off()
    return figure, panels[:n]


def _line(ax: Axes, points: np.ndarray, **look: Any) -> None:
    ax.plot(points[:, 0], points[:, 1], marker="o" if len(points) <= 12 else "", markersize=3, **look)


def _epoch_axis(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element that stands in a page: no prolog, no metadata, no addresses, ids of its own."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
        out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    prefix = re.sub(r"[^a-z]+", "-", title.lower())
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', rest)
    rest = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{prefix}-", rest)
    return Markup(f'<svg class="chart" role="img" aria-label="{{}}" {box.group(0) if box else ""}>').format(
        title
    ) + Markup(rest)
