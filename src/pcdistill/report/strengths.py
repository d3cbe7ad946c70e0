"""A comparison at equal strength: every method at every strength, and each at the one that was best on validation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcdistill.report._format import SPLITS, mean_and_interval, short_metric
from pcdistill.report.rows import BASELINE, aligned, common_split, compare_rows, format_table, kept_epoch_of, value_at
from pcdistill.stats import MARGIN, Summary, summary


def has_strengths(results: Sequence[dict[str, Any]]) -> bool:
    """Whether any run was made at a strength."""
    return any(strength_of(result) is not None for result in results)


def strength_of(result: dict[str, Any]) -> float | None:
    """How many times as hard as the labels the run's distillation pulled; None where a weight was given."""
    found = result.get("strength")
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def best_strengths(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Method to the strength at which its mean on validation is highest, the smallest of equals.

    The test set takes no part. A strength at which no run finished is passed over.
    """
    best: dict[str, tuple[float, float]] = {}
    for method, by_strength in _groups(results).items():
        for strength, runs in sorted(by_strength.items()):
            found = _over_seeds(runs, "val")
            if math.isfinite(found.mean) and (method not in best or found.mean > best[method][0]):
                best[method] = found.mean, strength
    return {method: strength for method, (_, strength) in best.items()}


def shown_strengths(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Method to the strength that stands for it: its best, or, where no run of it finished, the smallest."""
    return {**{method: min(found) for method, found in _groups(results).items()}, **best_strengths(results)}


def at_best(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that a comparison of methods is made of: each method's at its best strength, and those without one."""
    shown = shown_strengths(results)
    return [r for r in results if strength_of(r) is None or strength_of(r) == shown.get(str(r.get("method")))]


def by_strength(results: Sequence[dict[str, Any]]) -> dict[str, dict[float, Summary]]:
    """Method to strength to the reported metric over seeds, on the test set where all runs have one."""
    split = common_split(results)
    return {
        method: {strength: _over_seeds(runs, split) for strength, runs in sorted(found.items())}
        for method, found in _groups(results).items()
    }


def strength_cells(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Head and body of the table of methods by strengths; a star marks the strength that validation chose."""
    found, best = by_strength(results), best_strengths(results)
    metric = str(results[0].get("metric", "top1"))
    strengths = sorted({strength for row in found.values() for strength in row})
    head = ["method", *(f"strength {strength:g}" for strength in strengths)]
    body = []
    for method, row in found.items():
        cells = [method]
        for strength in strengths:
            star = " *" if best.get(method) == strength else ""
            cells.append(mean_and_interval(row[strength], metric) + star if strength in row else "")
        body.append(cells)
    return [head, *body]


def comparison_text(results: Sequence[dict[str, Any]], *, margin: float = MARGIN, baseline: str = BASELINE) -> str:
    """Verdict and table of a comparison; at several strengths each method at its best, and all of them below."""
    text = format_table(compare_rows(at_best(results), margin=margin, baseline=baseline))
    if not has_strengths(results):
        return text
    notes = [f"- {note}" for note in strength_notes(results)]
    return "\n".join([text, "", "At equal strength:", "", *aligned(strength_cells(results)), "", *notes])


def strength_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the table of strengths is, as sentences."""
    split, metric = common_split(results), str(results[0].get("metric", "top1"))
    return [
        f"{SPLITS.get(split, split)} {short_metric(metric)} of the kept epoch, mean ± half width of the 95 % interval "
        "over seeds.",
        "Strength s: the gradient of the distillation is s times that of the labels, where the term acts. "
        "The labels' weight is 1.",
        "*: the strength with the highest mean on validation; the test set takes no part in the choice. "
        "The verdict and the table of methods are at these strengths.",
    ]


def _groups(results: Sequence[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    groups: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        strength = strength_of(result)
        if strength is not None:
            groups.setdefault(str(result.get("method")), {}).setdefault(strength, []).append(result)
    return groups


def _over_seeds(runs: Sequence[Mapping[str, Any]], split: str) -> Summary:
    """The kept epoch's metric over the runs that finished."""
    values = [value_at(dict(r), kept_epoch_of(r), split, str(r.get("metric", "top1"))) for r in runs]
    return summary([value for value in values if value is not None])
