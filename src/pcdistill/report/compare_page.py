"""One page, one Markdown table and one CSV for a comparison of methods over seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcdistill.engine.console import duration
from pcdistill.report._folder import replace_file
from pcdistill.report._format import (
    FEW,
    MISSING,
    SPLITS,
    count,
    mean_and_interval,
    metric_name,
    number,
    seeds_of_interval,
    shown,
)
from pcdistill.report._page import render
from pcdistill.report.boxes import compare_boxes
from pcdistill.report.plots import Chart, method_curves, seed_dots, strength_lines
from pcdistill.report.rows import (
    BASELINE,
    EPOCHS,
    ORDER,
    Row,
    compare_rows,
    failure_notes,
    kept_epoch,
    ranked_verdicts,
    reason_of,
    seed_of,
    table_notes,
    test_cells,
    test_columns,
    value_at,
    verdict_head,
)
from pcdistill.report.strengths import (
    at_best,
    by_strength,
    comparison_text,
    has_strengths,
    strength_cells,
    strength_notes,
    strength_of,
)
from pcdistill.stats import MARGIN, Summary

Curves = Mapping[tuple[str, int], Sequence[Mapping[str, float]]]


def write_compare_report(
    out_dir: Path,
    results: Sequence[dict[str, Any]],
    curves: Curves,
    command: str,
    *,
    margin: float = MARGIN,
    baseline: str = BASELINE,
    drawn: Mapping[str, Path] | None = None,
    missing_only: bool = False,
) -> tuple[Path, Path, Path]:
    """Write report.html, table.md and results.csv of a comparison.

    Args:
        out_dir: folder to write to; made if it is not there.
        results: what result.json holds, one per run, finished or not.
        curves: (method, seed) to the rows of that run's metrics.csv.
        command: what the user typed.
        margin: as in :func:`pcdistill.report.compare_rows`.
        baseline: as there.
        drawn: method to the folder of a run, whose images with boxes are shown.
        missing_only: leave the files that are there as they are.

    Returns:
        Paths of the page, the table and the CSV.

    Raises:
        ValueError: as :func:`pcdistill.report.compare_rows`.
    """
    out_dir, rows = Path(out_dir), compare_rows(at_best(results), margin=margin, baseline=baseline)
    text = comparison_text(results, margin=margin, baseline=baseline)
    page, table, values = (out_dir / name for name in ("report.html", "table.md", "results.csv"))
    if not (missing_only and page.exists()):
        replace_file(page, _page(rows, results, curves, command, drawn or {}))
    if not (missing_only and table.exists()):
        replace_file(table, _markdown(text, results, command))
    if not (missing_only and values.exists()):
        replace_file(values, _csv(rows, results))
    return page, table, values


def _page(
    rows: Sequence[Row],
    results: Sequence[dict[str, Any]],
    curves: Curves,
    command: str,
    drawn: Mapping[str, Path],
) -> str:
    methods = [row for row in rows if row.kind == "method"]
    metric = methods[0].metric if methods else "top1"
    by_method = {row.name: [curves[key] for key in sorted(curves) if key[0] == row.name] for row in methods}
    return render(
        "compare.html.j2",
        title=_title(methods, results),
        subtitle=f"{len(results)} runs: {', '.join(row.name for row in methods)}" if methods else "no runs",
        sentences=_sentences(rows),
        header=_header(results),
        warned=failure_notes(rows),
        verdict_head=verdict_head(rows) if rows else "",
        verdicts=ranked_verdicts(rows) if rows else [],
        rows=[_html_row(row, rows) for row in rows],
        tests=bool(rows and test_columns(rows)),
        kept=kept_epoch(rows) if rows else "best",
        metric=f"{SPLITS[methods[0].split]} {metric_name(metric)}" if methods else "",
        baseline=rows[0].baseline if rows else BASELINE,
        table_notes=table_notes(rows) if rows else [],
        strengths=strength_cells(results) if has_strengths(results) else [],
        strength_notes=strength_notes(results) if has_strengths(results) else [],
        strength_plot=_strength_plot(results, metric),
        dots=seed_dots(rows),
        curves=method_curves(by_method, metric),
        curve_notes=_curve_notes(metric, len([1 for runs in by_method.values() if any(runs)])),
        seeds=_seed_cells(rows, results),
        seed_columns=_seed_columns(rows),
        command=command,
        boxes=compare_boxes(drawn),
    )


def _strength_plot(results: Sequence[dict[str, Any]], metric: str) -> Chart | None:
    """Accuracy over strengths, where there are several."""
    found = by_strength(results) if has_strengths(results) else {}
    return strength_lines(found, metric) if len({s for row in found.values() for s in row}) > 1 else None


def _sentences(rows: Sequence[Row]) -> list[str]:
    """The comparison's outcome: what is better, what is not told apart, and which mean is the highest."""
    found = ranked_verdicts(rows) if rows else []
    top = _highest(rows)
    if not found:
        return (
            [] if top is None else [f"{top.name} has the highest mean, but there is no pair of seeds to test it with."]
        )
    baseline, groups = rows[0].baseline, {kind: [n for n, v in found if v.kind == kind] for kind in ORDER}
    parts = []
    if groups["better"]:
        first = found[0]
        tail = f" and {len(groups['better']) - 1} more are" if len(groups["better"]) > 1 else " is"
        parts.append(f"{first[0]}{tail} better than {baseline}, by {first[1].difference:.2f} points")
    if groups["worse"]:
        parts.append(f"{_listed(groups['worse'])} {_is(groups['worse'])} worse than {baseline}")
    if groups["no difference"]:
        said = groups["no difference"]
        parts.append(f"{_listed(said)} {_is(said)} as good as {baseline} within {found[0][1].margin:g} points")
    if groups["cannot tell"]:
        said = groups["cannot tell"]
        parts.append(f"{_listed(said)} cannot be told from {baseline}, better or worse")
    first_sentence = "; ".join(parts)
    sentences = [f"{first_sentence} ({verdict_head(rows)})."]
    if top is not None and top.name not in groups["better"][:1]:
        sentences.append(f"The highest mean is that of {top.name}; the order of means alone shows nothing.")
    few = max((row.finished for row in rows if row.kind == "method"), default=0)
    if few <= FEW:
        sentences.append(f"No method has more than {few} finished seed{'' if few == 1 else 's'}: intervals are rough.")
    return sentences


def _highest(rows: Sequence[Row]) -> Row | None:
    """The method whose mean is highest at the kept epoch."""
    methods = [row for row in rows if row.kind == "method" and row.finished]
    return max(methods, key=lambda row: _kept(row, rows).mean, default=None)


def _kept(row: Row, rows: Sequence[Row]) -> Summary:
    return row.last if kept_epoch(rows) == "last" else row.best


def _listed(names: Sequence[str]) -> str:
    shown_names = list(names[:3]) + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    return " and ".join([", ".join(shown_names[:-1]), shown_names[-1]] if len(shown_names) > 1 else shown_names)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _title(methods: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    data = dict(_setting(results)).get("data")
    count_of = f"{len(methods)} methods" if len(methods) != 1 else f"{methods[0].name} over seeds"
    return f"Comparison: {count_of}" + (f" on {data}" if data else "")


def _curve_notes(metric: str, methods: int) -> list[str]:
    notes = [
        f"Mean of val/{metric} over seeds; the band is the 95 % confidence interval of the mean, over the runs that "
        "reached the epoch. Of two or three seeds no band is drawn: it would fill the frame.",
    ]
    if methods > 6:
        notes.append(
            f"Dashed grey: {BASELINE}. The axes fit the second half of training; earlier values may lie below."
        )
    return notes


def _html_row(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    cells = [(f"{row.finished} of {row.runs}" if row.failures else str(row.runs), "")]
    for epoch in EPOCHS:
        over = row.best if epoch == "best" else row.last
        value, _, passed = mean_and_interval(over, row.metric).partition(" (past")
        cells.append((value, seeds_of_interval(over) + (f", past{passed.removesuffix(')')}" if passed else "")))
        tests = [cell.replace("-", "−") for cell in test_cells(row, epoch, test_columns(rows))]
        cells += (
            [(tests[0], ""), (tests[1], f"Holm: {tests[2]}" if tests[2:] and tests[2] not in ("", MISSING) else "")]
            if tests
            else []
        )
    seconds = number(row.seconds)
    cells.append(("" if row.kind == "teacher" else MISSING if seconds is None else duration(seconds), ""))
    top = _highest(rows)
    best = "highest mean" if top is not None and row.name == top.name and row.kind == "method" else ""
    look = "teacher" if row.kind == "teacher" else "kept" if best else ""
    return {"name": row.name, "cells": cells, "look": look, "best": best}


def _setting(results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What all runs share; where they do not share it, every value is named."""
    found: list[tuple[str, str]] = []
    for name in ("data", "teacher", "student", "epochs"):
        values = []
        for result in results:
            value = result.get(name)
            value = value.get("name") if isinstance(value, dict) else value
            if value is not None and str(value) not in values:
                values.append(str(value))
        if values:
            found.append((name, ", ".join(values)))
    seeds = sorted({seed_of(result) for result in results})
    if seeds:
        run = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
        found.append(("seeds", f"{seeds[0]} to {seeds[-1]}" if run else ", ".join(map(str, seeds))))
    return found


def _header(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    sizes = {}
    for who in ("teacher", "student"):
        models = [result[who] for result in results if isinstance(result.get(who), dict)]
        if models and number(models[0].get("parameters")) is not None:
            macs = f", {count(models[0]['macs'])}\u00a0MACs" if number(models[0].get("macs")) is not None else ""
            sizes[who] = f"{count(models[0]['parameters'])}\u00a0parameters{macs}"
    items = [(name, value, sizes.get(name, "")) for name, value in _setting(results)]
    seconds = sum(number(result.get("seconds")) or 0.0 for result in results)
    if seconds:
        items.append(("time, all runs", duration(seconds), ""))
    return items


def _markdown(text: str, results: Sequence[dict[str, Any]], command: str) -> str:
    facts = [f"- {name}: {value}" for name, value in _setting(results)]
    made = ["", "```", command, "```"] if command else []
    return "\n".join(["# Comparison", "", *facts, "", text, *made, ""])


def _seed_columns(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    where, name = SPLITS.get(rows[0].split, rows[0].split), metric_name(rows[0].metric)
    return ["method", "seed", "status", "best epoch", f"best: {where} {name}", f"last: {where} {name}", "time"]


def _name_of(result: dict[str, Any]) -> str:
    strength = strength_of(result)
    return str(result.get("method", "unknown")) + (f", strength {strength:g}" if strength is not None else "")


def _seed_cells(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[list[str]]:
    cells = []
    for result in _ordered(rows, results):
        best = result.get("best")
        seconds = number(result.get("seconds"))
        values = [shown(value_at(result, epoch, rows[0].split, rows[0].metric), rows[0].metric) for epoch in EPOCHS]
        cells.append(
            [
                _name_of(result),
                str(seed_of(result)),
                str(result.get("status", "unknown")),
                str(best.get("epoch", MISSING)) if isinstance(best, dict) else MISSING,
                *values,
                MISSING if seconds is None else duration(seconds),
            ]
        )
    return cells


def _csv(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    """One line per run, every number that it has, at full precision."""
    lines = [_csv_line(result) for result in _ordered(rows, results)]
    columns = list(
        dict.fromkeys(["method", "seed", "status", *(key for line in lines for key in line if key != "notes"), "notes"])
    )
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(result: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {key: result.get(key, "") for key in ("method", "seed", "status", "data", "kept", "epochs")}
    if strength_of(result) is not None:
        line["strength"] = strength_of(result)
    for who in ("teacher", "student"):
        if isinstance(result.get(who), dict):
            line[who] = result[who].get("name", "")
    for who in ("teacher", *EPOCHS):
        values = result.get(who)
        if not isinstance(values, dict):
            continue
        if "epoch" in values:
            line[f"{who}/epoch"] = values["epoch"]
        for split in SPLITS:
            found = values.get(split)
            if isinstance(found, dict):
                line.update(
                    {f"{who}/{split}/{key}": value for key, value in found.items() if number(value) is not None}
                )
    line.update(seconds=result.get("seconds", ""), images_per_second=result.get("images_per_second", ""))
    line["notes"] = reason_of(result) if result.get("notes") else ""
    return line


def _ordered(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {row.name: position for position, row in enumerate(rows)}
    return sorted(
        results, key=lambda r: (order.get(str(r.get("method", "unknown")), 0), strength_of(r) or 0.0, seed_of(r))
    )
