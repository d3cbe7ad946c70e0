"""One page for several students under the same methods: which of them is worth its cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcdistill.report._folder import replace_file
from pcdistill.report._format import SPLITS, count, difference_and_interval, mean_and_interval, metric_name, number
from pcdistill.report._page import render
from pcdistill.report.plots import cost_dots
from pcdistill.report.rows import BASELINE, Row, compare_rows, failure_notes, kept_epoch, ranked_verdicts
from pcdistill.report.strengths import at_best
from pcdistill.stats import MARGIN, Summary

Results = Mapping[str, Sequence[dict[str, Any]]]


def write_students_report(out_dir: Path, results: Results, command: str, *, margin: float = MARGIN) -> Path:
    """Write report.html of a comparison of several students; each has a comparison of its own in a folder beside.

    Args:
        out_dir: folder to write to.
        results: student to what result.json of its runs hold, as :func:`pcdistill.report.write_compare_report` takes
            them.
        command: what the user typed.
        margin: as there.
    """
    tables = {name: compare_rows(at_best(found), margin=margin) for name, found in results.items()}
    points = cost_points(tables, results)
    everything = [result for found in results.values() for result in found]
    first = next((row for rows in tables.values() for row in rows), None)
    metric = first.metric if first else "top1"
    data = next((str(result["data"]) for result in everything if result.get("data")), None)
    page = render(
        "students.html.j2",
        title=f"{len(results)} students" + (f" on {data}" if data else ""),
        subtitle=f"{len(everything)} runs: {', '.join(results)}",
        sentences=_sentences(points, tables, metric),
        header=_header(everything),
        warned=[note for rows in tables.values() for note in failure_notes(rows)],
        costs=cost_dots(points, metric),
        cost_notes=[
            "Up and to the left is better.",
            "The bar is the 95 % confidence interval over seeds; of two or three none is drawn.",
        ],
        head=["student", "method", _where(first), f"against {BASELINE}", "parameters", "MACs"],
        rows=_rows(tables, points),
        table_notes=["± is the half width of the 95 % confidence interval over seeds; of two or three it is rough."],
        verdicts=_verdicts(tables),
        command=command,
    )
    return replace_file(Path(out_dir) / "report.html", page)


def cost_points(tables: Mapping[str, Sequence[Row]], results: Results) -> list[dict[str, Any]]:
    """Accuracy and cost of every student and method, and of the teacher, as :func:`cost_dots` takes them."""
    points: list[dict[str, Any]] = []
    for name, rows in tables.items():
        for row in rows:
            over = _kept(row, rows)
            if not over.n or (row.kind == "teacher" and any(p["method"] == "teacher" for p in points)):
                continue
            who = "teacher" if row.kind == "teacher" else "student"
            model: dict[str, Any] = next((r[who] for r in results[name] if isinstance(r.get(who), dict)), {})
            points.append(
                {
                    "student": row.name.removeprefix("teacher: ") if who == "teacher" else name,
                    "method": "teacher" if who == "teacher" else row.name,
                    "mean": over.mean,
                    "ci95": over.ci95,
                    "n": over.n,
                    "parameters": number(model.get("parameters")),
                    "macs": number(model.get("macs")),
                }
            )
    return points


def _sentences(points: Sequence[Mapping[str, Any]], tables: Mapping[str, Sequence[Row]], metric: str) -> list[str]:
    students = [p for p in points if p["method"] != "teacher"]
    if not students:
        return []
    top = max(students, key=lambda p: float(p["mean"]))
    small = [p for p in students if (p["parameters"] or 0) < (top["parameters"] or 0)]
    said = f"The highest mean is {top['student']}'s with {top['method']}: {top['mean']:.2f} % {metric_name(metric)}"
    found = [f"{said.removesuffix(' (%)')}, {count(top['parameters'])} parameters."]
    if small:
        best = max(small, key=lambda p: float(p["mean"]))
        found.append(
            f"Of the smaller ones {best['student']} with {best['method']} is highest: {best['mean']:.2f} %, "
            f"{float(top['mean']) - float(best['mean']):.2f} points less, {count(best['parameters'])} parameters."
        )
    seeds = {row.finished for rows in tables.values() for row in rows if row.kind == "method"}
    if seeds and max(seeds) < 2:
        found.append("Of one seed each: another may order them otherwise.")
    return found


def _rows(tables: Mapping[str, Sequence[Row]], points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    costs = {(str(p["student"]), str(p["method"])): p for p in points}
    found = []
    for name, rows in tables.items():
        for row in rows:
            if row.kind == "teacher":
                continue
            cost = costs.get((name, row.name), {})
            pair = row.last_difference if kept_epoch(rows) == "last" else row.best_difference
            against = "" if row.name == row.baseline else difference_and_interval(pair, row.metric)
            over = mean_and_interval(_kept(row, rows), row.metric)
            found.append([name, row.name, over, against, count(cost.get("parameters")), count(cost.get("macs"))])
    return found


def _verdicts(tables: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    return [
        (f"{name}: {method} against {rows[0].baseline}", one.words())
        for name, rows in tables.items()
        if rows
        for method, one in ranked_verdicts(rows)
    ]


def _kept(row: Row, rows: Sequence[Row]) -> Summary:
    return row.last if kept_epoch(rows) == "last" else row.best


def _where(row: Row | None) -> str:
    return "" if row is None else f"{SPLITS.get(row.split, row.split)} {metric_name(row.metric)}"


def _header(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    items = []
    for key in ("data", "teacher", "epochs"):
        found = [r.get(key) for r in results if r.get(key) is not None]
        names = dict.fromkeys(str(one.get("name")) if isinstance(one, dict) else str(one) for one in found)
        if names:
            items.append((key, ", ".join(names), ""))
    return items
