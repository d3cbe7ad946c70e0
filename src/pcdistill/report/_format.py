"""Numbers as a reader wants them, and the names of metrics."""

import math
from typing import Any

from pcdistill.stats import Paired, Summary

MISSING = "–"
FEW = 3  # so few seeds leave the spread all but unknown
METRICS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "loss": "loss",
    "map": "AP (%)",
    "map_50": "AP50 (%)",
    "map_75": "AP75 (%)",
    "map_small": "AP small (%)",
    "map_medium": "AP medium (%)",
    "map_large": "AP large (%)",
}
SPLITS = {"val": "validation", "test": "test"}
PERCENT = ("top1", "top5", "map", "map_50", "map_75", "map_small", "map_medium", "map_large")


def sizes_in(image_size: Any) -> str:
    """Which pixels small (below 32 x 32), medium and large (above 96 x 96) are counted in, in words."""
    if image_size is None:
        return "pixels of the images as they are"
    return f"pixels of images whose longer side was scaled down to {image_size} where it was longer"


def metric_name(metric: str) -> str:
    """The metric as a column's head; a name that is not known stands for itself."""
    return METRICS.get(metric, metric)


def short_metric(metric: str) -> str:
    """The metric in running text: without its unit."""
    return metric_name(metric).removesuffix(" (%)")


def number(value: Any) -> float | None:
    """A finite float, or None for anything else; booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def shown(value: Any, metric: str = "top1") -> str:
    """A value of a metric: two decimals for percent, four significant digits otherwise."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{found:.2f}" if metric in PERCENT else f"{found:.4g}"


def count(value: Any) -> str:
    """1234567 -> "1.23 M", with a space that does not break."""
    found = number(value)
    if found is None:
        return MISSING
    for size, letter in ((1e9, "\u00a0G"), (1e6, "\u00a0M"), (1e3, "\u00a0k")):
        if found >= size:
            return f"{found / size:.3g}{letter}"
    return f"{found:g}"


def mean_and_interval(found: Summary, metric: str = "top1") -> str:
    """ "95.12 ± 0.31"; one value stands alone; equal ones, and an interval too wide to be one, say so; none: a dash."""
    if found.n == 0 or math.isnan(found.mean):
        return MISSING
    tail = f" ({passed})" if (passed := beyond(found, metric)) else ""
    return shown(found.mean, metric) + _interval(found, metric) + tail


def difference_and_interval(found: Paired, metric: str = "top1") -> str:
    """ "+0.31 ± 0.22"."""
    if math.isnan(found.mean):
        return MISSING
    sign = "+" if found.mean >= 0 else "-"
    return f"{sign}{shown(abs(found.mean), metric)}{_interval(found, metric)}"


def seeds_of_interval(found: Summary) -> str:
    """ "2 seeds: rough" where the interval is of so few that it is all but a guess; "" otherwise."""
    return f"{found.n} seeds: rough" if found.ci95 > 0 and found.n <= FEW else ""


def beyond(found: Summary, metric: str = "top1") -> str:
    """ "past 100", "past 0" or both where the interval of two or three seeds passes what a percentage can be."""
    if metric not in PERCENT or found.n > FEW or not found.ci95 > 0:
        return ""
    ends = (("0", found.mean - found.ci95 < 0), ("100", found.mean + found.ci95 > 100))
    passed = " and ".join(end for end, is_passed in ends if is_passed)
    return f"past {passed}" if passed else ""


def _interval(found: Summary | Paired, metric: str) -> str:
    """ " ± 0.31"; " (3 equal)" without a spread, which a width of 0 would pass off as certainty; "" for one value."""
    if math.isnan(found.ci95):
        return ""
    if found.ci95 == 0:
        return f" ({found.n} equal)"
    width = shown(found.ci95, metric)
    return f" ± {f'{found.ci95:.1g}' if float(width) == 0 else width}"


def p_value(p: float) -> str:
    """Three decimals; below that, the bound."""
    if math.isnan(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def term_text(term: dict[str, Any]) -> str:
    """A term of the objective with its options: "pcd (strength 4, temperature 4, stages 3)"."""
    options = ", ".join(f"{key} {_plain(value)}" for key, value in term.items() if key != "method")
    name = str(term.get("method")).rsplit(":", 1)[-1]
    return name + (f" ({options})" if options else "")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
