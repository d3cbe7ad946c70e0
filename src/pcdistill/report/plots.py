"""Charts as inline SVG in the page's own colours: curves of one run, curves, seeds and costs of several."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from pcdistill.report._format import FEW, MISSING, count, metric_name, number, short_metric, shown
from pcdistill.report.rows import EPOCHS, Row
from pcdistill.stats import Summary, summary

# After Okabe and Ito's palette, which the common forms of colour blindness tell apart; orange and sky are darker, so
# that every colour has 3 : 1 on white. Grey and black are the baselines'.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#008a64", "#aa4499", "#b27a00", "#2a8fc7"
INK, SOFT, GREY, LIGHT, EDGE = "#22272e", "#5b6470", "#7d858f", "#e4e7eb", "#b6bcc4"
VARIABLES = {  # a colour of the figures, and what a page calls it: it is another in the dark
    BLUE: "--p-blue",
    VERMILION: "--p-vermilion",
    GREEN: "--p-green",
    PURPLE: "--p-purple",
    ORANGE: "--p-orange",
    SKY: "--p-sky",
    INK: "--ink",
    SOFT: "--soft",
    GREY: "--p-grey",
    LIGHT: "--line",
    EDGE: "--p-edge",
    "#ffffff": "--page",
}
BASELINES = {"none": GREY, "kd": INK, "pcd": VERMILION}
OTHERS = (BLUE, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "os^Dvp*Xh<>"
TOGETHER = 6  # more methods than this get a panel each
MOST_EPOCHS = 100  # lines of the table behind a plot
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pcdistill",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
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
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
PANEL, SMALL = (4.3, 2.8), (2.9, 2.1)  # inches


@dataclass(frozen=True)
class Chart:
    """A plot, as a page shows it: panels that stack on a narrow screen, one legend, and the figures as a table.

    Attributes:
        title: what it shows.
        panels: inline SVG.
        legend: name, colour as a variable of the page, and "line", "dash", "dots" or "dot".
        head: of the table behind it.
        rows: of the same.
        small: whether the panels are small ones.
        note: under the table.
    """

    title: str
    panels: list[Markup]
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    small: bool = False
    note: str = ""


def learning_curves(rows: Sequence[Mapping[str, float]], metric: str, best_epoch: float | None) -> Chart | None:
    """The metric and the loss over epochs, on training and validation images; None if there is nothing to draw."""
    looks = {
        "training": ("train", BLUE, "-"),
        "validation": ("val", VERMILION, "-"),
        "validation, averaged weights": ("val_ema", GREEN, "--"),
    }
    panels: list[Markup] = []
    columns: list[tuple[str, str, str]] = []
    title = "learning curves"
    used: dict[str, tuple[str, str, str]] = {}
    for key in (metric, "loss"):
        drawn = {label: series(rows, f"{split}/{key}") for label, (split, _, _) in looks.items()}
        drawn = {label: points for label, points in drawn.items() if len(points)}
        if not drawn:
            continue
        with matplotlib.rc_context(STYLE):
            figure, ax = _panel(metric_name(key) if key != "loss" else "loss")
            for label, points in drawn.items():
                _line(ax, points, color=looks[label][1], linestyle=looks[label][2])
                used[label] = _entry(label, looks[label][1], "dash" if looks[label][2] == "--" else "line")
                columns.append((f"{short_metric(key)}, {label}", f"{looks[label][0]}/{key}", key))
            _epoch_axis(ax)
            if best_epoch is not None and key == metric:
                ax.axvline(best_epoch, color=GREY, linewidth=1, linestyle=":")
                used["best"] = _entry(f"best epoch ({best_epoch:g})", GREY, "dots")
            panels.append(_svg(figure, title, metric_name(key), len(panels)))
    if not panels:
        return None
    best = used.pop("best", None)
    legend = [*used.values(), *([best] if best else [])]
    return Chart(title, panels, legend, *_epochs_table(rows, columns))


def term_curves(rows: Sequence[Mapping[str, float]]) -> Chart | None:
    """A small panel for every part of the loss and for the learning rate; None if there is none."""
    skip = {"train/loss", "train/top1", "train/top5"}
    parts = dict.fromkeys(key for row in rows for key in row if key.startswith("train/") and key not in skip)
    found = [("total loss", "train/loss", INK), *((key.removeprefix("train/"), key, BLUE) for key in parts)]
    found = [one for one in [*found, ("learning rate", "lr", GREEN)] if len(series(rows, one[1]))]
    panels: list[Markup] = []
    title = "terms of the loss and learning rate"
    for name, column, color in found:
        points = series(rows, column)
        with matplotlib.rc_context(STYLE):
            figure, ax = _panel(_shorten(name, 26), SMALL)
            _line(ax, points, color=color)
            values = points[:, 1]
            if column != "lr" and values.min() > 0 and values.max() / values.min() > 100:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            _epoch_axis(ax)
            panels.append(_svg(figure, title, name, len(panels)))
    if not panels:
        return None
    table = _epochs_table(rows, [(name, column, "loss") for name, column, _ in found])
    return Chart(title, panels, [], *table, small=True)


def method_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str) -> Chart | None:
    """Validation over epochs: each method's mean over its runs, with the 95 % interval of the mean as a band.

    Up to six methods share two panels (the whole training, and its second half); more get a small panel each, with KD
    in the background.
    """
    bands = {name: band for name, of_runs in runs.items() if len(band := _band(of_runs, f"val/{metric}"))}
    if not bands:
        return None
    colors, title = colors_of(list(bands)), f"{short_metric(metric)} on validation, by method"
    with matplotlib.rc_context(STYLE):
        if len(bands) <= TOGETHER:
            panels = _curves_together(bands, colors, metric, title)
            legend = [_entry(name, colors[name], "dash" if name == "none" else "line") for name in bands]
        else:
            panels, legend = _curves_apart(bands, title), []
    epochs = sorted({epoch for band in bands.values() for epoch in band[:, 0]})
    at = {name: {row[0]: row for row in band} for name, band in bands.items()}
    kept = epochs[:: math.ceil(len(epochs) / MOST_EPOCHS)]
    rows = [[f"{e:g}", *(_mean_width(of.get(e), metric) for of in at.values())] for e in kept]
    return Chart(title, panels, legend, ["epoch", *bands], rows, small=len(bands) > TOGETHER)


def strength_lines(found: Mapping[str, Mapping[float, Summary]], metric: str) -> Chart:
    """The metric against the strength, one line a method, with the 95 % interval of every mean."""
    colors, title = colors_of(list(found)), "accuracy against strength, by method"
    strengths = sorted({strength for row in found.values() for strength in row})
    positions = {strength: math.log2(strength) for strength in strengths}
    step = 0.012 * max(max(positions.values()) - min(positions.values()), 1)
    with matplotlib.rc_context(STYLE):
        figure, ax = _panel("", (5.0, 3.2))
        for i, (name, row) in enumerate(found.items()):
            x = [positions[strength] + step * (i - len(found) / 2) for strength in row]
            means = [one.mean for one in row.values()]
            widths = [one.ci95 if math.isfinite(one.ci95) else 0.0 for one in row.values()]
            ax.errorbar(x, means, widths, color=colors[name], marker=MARKERS[i % 11], markersize=5, capsize=2)
        ax.set_xticks(list(positions.values()), [f"{strength:g}" for strength in strengths])
        ax.set_xlabel("strength: distillation's gradient over the labels'")
        ax.set_ylabel(metric_name(metric))
        panel = _svg(figure, title, title, 0)
    rows = [
        [name, *(_mean_width((0, row[s].mean, row[s].ci95), metric) if s in row else MISSING for s in strengths)]
        for name, row in found.items()
    ]
    head = ["method", *(f"strength {strength:g}" for strength in strengths)]
    return Chart(title, [panel], [_entry(name, color, "line") for name, color in colors.items()], head, rows)


def seed_dots(rows: Sequence[Row]) -> Chart | None:
    """Every seed's result as a dot, the mean and its 95 % interval above it, best and last epoch side by side."""
    methods = [row for row in rows if row.kind == "method"]
    if not any(row.finished for row in methods):
        return None
    colors, title = colors_of([row.name for row in methods]), "every seed's result, by method"
    everything = [v for row in methods for v in (*row.best_values.values(), *row.last_values.values())]
    low, high = min(everything), max(everything)
    room = max(high - low, 0.5)
    teachers = [row.best.mean for row in rows if row.kind == "teacher" and math.isfinite(row.best.mean)]
    near = [value for value in teachers if low - room <= value <= high + room]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.07 * max(high - low, 0.5)
    panels: list[Markup] = []
    for epoch in EPOCHS:
        with matplotlib.rc_context(STYLE):
            figure, ax = _panel(f"{epoch} epoch", (PANEL[0], 1.1 + 0.36 * len(methods)))
            for y, row in enumerate(methods):
                _dots(ax, y, row, epoch, colors[row.name], frame=(low - pad, high + pad))
            for value in near:
                ax.axvline(value, color=SOFT, linewidth=1.2, linestyle="--", zorder=1)
            _method_axis(ax, methods, (low - pad, high + pad))
            panels.append(_svg(figure, title, f"{epoch} epoch", len(panels)))
    legend = []
    if teachers:
        beyond = "" if near else ", right of the axis" if teachers[0] > high else ", left of the axis"
        legend = [_entry(f"teacher {teachers[0]:.2f}{beyond}", SOFT, "dash")]
    metric = methods[0].metric
    table = [
        [row.name, epoch, *(shown(values.get(seed), metric) for seed in _seeds_of(methods))]
        for row in methods
        for epoch, values in (("best", row.best_values), ("last", row.last_values))
    ]
    return Chart(title, panels, legend, ["method", "epoch", *(f"seed {s}" for s in _seeds_of(methods))], table)


def cost_dots(points: Sequence[Mapping[str, Any]], metric: str) -> Chart | None:
    """Accuracy against parameters, and against MACs where they are known: one dot a student and method.

    Args:
        points: with "student", "method", "mean", "ci95", "n" (seeds), "parameters" and "macs"; "method" is "teacher"
            for a teacher. Of two or three seeds no bar is drawn.
        metric: what "mean" is of.
    """
    usable = [p for p in points if number(p.get("mean")) is not None and number(p.get("parameters"))]
    if not usable:
        return None
    methods = list(dict.fromkeys(str(p["method"]) for p in usable))
    colors = {**colors_of([name for name in methods if name != "teacher"]), "teacher": SOFT}
    panels: list[Markup] = []
    title = "accuracy against cost"
    for key, name in (("parameters", "parameters"), ("macs", "multiply-adds of an image (MACs)")):
        drawn = [p for p in usable if number(p.get(key))]
        if not drawn:
            continue
        with matplotlib.rc_context(STYLE):
            figure, ax = _panel("", (PANEL[0], 3.0))
            for i, method in enumerate(methods):
                _cost_line(ax, [p for p in drawn if p["method"] == method], key, colors[method], MARKERS[i % 11])
            _cost_axes(ax, drawn, key)
            ax.set_xlabel(name)
            ax.set_ylabel(metric_name(metric))
            panels.append(_svg(figure, title, name, len(panels)))
    head = ["model", "method", metric_name(metric), "parameters", "MACs"]
    rows = [
        [
            str(p["student"]),
            str(p["method"]),
            _mean_width((0, p["mean"], p.get("ci95", math.nan)), metric),
            count(p.get("parameters")),
            count(p.get("macs")),
        ]
        for p in usable
    ]
    return Chart(title, panels, [_entry(name, colors[name], "dot") for name in methods], head, rows)


def series(rows: Sequence[Mapping[str, float]], column: str) -> np.ndarray:
    """[points, 2]: epoch and value, of the rows where the column is a finite number."""
    found = [(row["epoch"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan)) and "epoch" in row]
    return np.asarray(found, dtype=np.float64).reshape(-1, 2)


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each method: the baselines have their own."""
    others = [name for name in names if name not in BASELINES]
    return {name: BASELINES.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names}


def _entry(label: str, color: str, look: str) -> tuple[str, str, str]:
    return label, f"var({VARIABLES[color]})", look


def _epochs_table(
    rows: Sequence[Mapping[str, float]], columns: Sequence[tuple[str, str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Head and lines: (name, column, metric) by epoch, some epochs of many."""
    kept = rows[:: math.ceil(len(rows) / MOST_EPOCHS)] if rows else []
    lines = [
        [f"{row['epoch']:g}", *(shown(row.get(column), metric) for _, column, metric in columns)]
        for row in kept
        if "epoch" in row
    ]
    return ["epoch", *(name for name, _, _ in columns)], lines


def _mean_width(found: Sequence[float] | None, metric: str) -> str:
    """ "91.20 ± 0.31" of (position, mean, half width)."""
    if found is None:
        return MISSING
    width = found[2] if math.isfinite(found[2]) else 0.0
    return shown(float(found[1]), metric) + (f" ± {shown(float(width), metric)}" if width > 0 else "")


def _seeds_of(methods: Sequence[Row]) -> list[int]:
    return sorted({seed for row in methods for seed in (*row.best_values, *row.last_values)})


def _band(runs: Sequence[Sequence[Mapping[str, float]]], column: str) -> np.ndarray:
    """[epochs, 4]: epoch, mean over the runs that reached it, half width of the interval (0 for one run), runs."""
    at: dict[float, list[float]] = {}
    for rows in runs:
        for epoch, value in series(rows, column):
            at.setdefault(epoch, []).append(value)
    found = []
    for epoch in sorted(at):
        over = summary(at[epoch])
        found.append((epoch, over.mean, 0.0 if math.isnan(over.ci95) else over.ci95, over.n))
    return np.asarray(found, dtype=np.float64).reshape(-1, 4)


def _curves_together(
    bands: Mapping[str, np.ndarray], colors: Mapping[str, str], metric: str, title: str
) -> list[Markup]:
    panels: list[Markup] = []
    half = max(band[:, 0].max() for band in bands.values()) / 2
    for start in (0.0, half):
        name = "all epochs" if start == 0 else "second half"
        figure, ax = _panel(name, (PANEL[0], 3.0))
        for method, band in bands.items():
            part = band[band[:, 0] >= start]
            _line(ax, part[:, :2], color=colors[method], linestyle="--" if method == "none" else "-")
            _shade(ax, part, colors[method])
        _fit_to_means(ax, [band[band[:, 0] >= start] for band in bands.values()])
        _epoch_axis(ax)
        ax.set_ylabel(f"{metric_name(metric)}, validation")
        panels.append(_svg(figure, title, name, len(panels)))
    return panels


def _curves_apart(bands: Mapping[str, np.ndarray], title: str) -> list[Markup]:
    panels: list[Markup] = []
    last = max(band[-1, 0] for band in bands.values())
    late = [band[band[:, 0] >= last / 2] for band in bands.values()]
    for name, band in bands.items():
        figure, ax = _panel(_shorten(name, 24), SMALL)
        if name != "kd" and "kd" in bands:
            ax.plot(bands["kd"][:, 0], bands["kd"][:, 1], color=GREY, linewidth=1, linestyle="--")
        color = VERMILION if name == "pcd" else INK if name in ("none", "kd") else BLUE
        _line(ax, band[:, :2], color=color)
        _shade(ax, band, color)
        if band[-1, 0] < last:
            ax.text(0.97, 0.05, f"ends in epoch {band[-1, 0]:g}", transform=ax.transAxes, ha="right")
        ax.set_xlim(0.5, last + 0.5)
        _fit_to_means(ax, late)
        _epoch_axis(ax)
        panels.append(_svg(figure, title, name, len(panels)))
    return panels


def _shade(ax: Axes, band: np.ndarray, color: str) -> None:
    """The interval of four seeds or more: that of fewer would fill the frame."""
    band = band[band[:, 3] > FEW]
    ax.fill_between(band[:, 0], band[:, 1] - band[:, 2], band[:, 1] + band[:, 2], color=color, alpha=0.15, linewidth=0)


def _fit_to_means(ax: Axes, bands: Sequence[np.ndarray]) -> None:
    """An axis that fits the means: the band of two runs would flatten every curve."""
    means = np.concatenate([band[:, 1] for band in bands])
    if len(means):
        pad = 0.15 * max(means.max() - means.min(), 0.5)
        ax.set_ylim(means.min() - pad, means.max() + pad)


def _dots(ax: Axes, y: int, row: Row, epoch: str, color: str, frame: tuple[float, float]) -> None:
    values = row.last_values if epoch == "last" else row.best_values
    over = row.last if epoch == "last" else row.best
    if values:
        ax.scatter(
            list(values.values()), [y + 0.16] * len(values), s=17, color=color, alpha=0.6, linewidths=0, zorder=3
        )
        if math.isfinite(over.ci95) and over.ci95 > 0:
            few = over.n <= FEW  # a rough interval is drawn as a broken bar
            ends = (max(over.mean - over.ci95, frame[0]), min(over.mean + over.ci95, frame[1]))
            ax.plot(ends, [y - 0.12] * 2, color=color, linewidth=1.4 if few else 2, ls=":" if few else "-", zorder=3)
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
        ax.annotate(text, (x, y), away, textcoords="offset points", ha=side, va="bottom", color=INK, fontsize=7.5)


def _method_axis(ax: Axes, methods: Sequence[Row], frame: tuple[float, float]) -> None:
    ax.set_xlabel(f"{metric_name(methods[0].metric)}, {'validation' if methods[0].split == 'val' else 'test'}")
    ax.set_xlim(*frame)
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    names = [_shorten(row.name, 22) + (f"  {row.finished}/{row.runs}" if row.failures else "") for row in methods]
    ax.set_yticks(range(len(methods)), names)
    for label in ax.get_yticklabels():
        label.set_color(INK)


def _cost_line(ax: Axes, points: Sequence[Mapping[str, Any]], key: str, color: str, marker: str) -> None:
    ordered = sorted(points, key=lambda p: float(p[key]))
    x, y = [float(p[key]) for p in ordered], [float(p["mean"]) for p in ordered]
    widths = [w if (w := number(p.get("ci95"))) is not None and p.get("n", 0) > FEW else 0.0 for p in ordered]
    line = "-" if len(ordered) > 1 else ""
    ax.errorbar(x, y, widths, color=color, marker=marker, markersize=6, linestyle=line, linewidth=1, capsize=2)


def _cost_axes(ax: Axes, points: Sequence[Mapping[str, Any]], key: str) -> None:
    """Costs on a logarithmic axis, named as people say them; models named at their highest point."""
    costs, means = [float(p[key]) for p in points], [float(p["mean"]) for p in points]
    ax.set_xscale("log")
    ax.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
    ticks = sorted({float(f"{cost:.2g}") for cost in costs})
    far = [t for i, t in enumerate(ticks) if i == 0 or t / ticks[i - 1] > 1.35]
    ax.set_xticks(far, [count(tick) for tick in far])
    ax.xaxis.set_minor_formatter(NullFormatter())
    pad = 0.2 * max(max(means) - min(means), 0.5)
    ax.set_ylim(min(means) - pad, max(means) + 1.6 * pad)
    for name, teaches in dict.fromkeys((str(p["student"]), p["method"] == "teacher") for p in points):
        same = [p for p in points if (str(p["student"]), p["method"] == "teacher") == (name, teaches)]
        top = max(same, key=lambda p: float(p["mean"]))
        place = (float(top[key]), float(top["mean"]))
        text = _shorten(name.rsplit("/", 1)[-1], 18)
        ax.annotate(text, place, (0, 8), textcoords="offset points", ha="center", fontsize=8.5)


def _panel(title: str, size: tuple[float, float] = PANEL) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


def _line(ax: Axes, points: np.ndarray, **look: Any) -> None:
    ax.plot(points[:, 0], points[:, 1], marker="o" if len(points) <= 12 else "", markersize=3, **look)


def _epoch_axis(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def _svg(figure: Figure, title: str, panel: str, position: int) -> Markup:
    """The figure as an element that stands in a page: no prolog, no addresses, ids of its own, the page's colours."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
        out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    prefix = f"{re.sub(r'[^a-z]+', '-', title.lower())}-{position}"
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', rest)
    rest = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{prefix}-", rest)
    rest = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})\b", _variable, rest)
    name = title if panel == title else f"{title}: {panel}"
    return Markup(f'<svg class="chart" role="img" aria-label="{{}}" {box.group(0) if box else ""}>').format(
        name
    ) + Markup(rest)


def _variable(found: re.Match[str]) -> str:
    name = VARIABLES.get(found.group(2))
    return found.group(0) if name is None else f"{found.group(1)}var({name})"
