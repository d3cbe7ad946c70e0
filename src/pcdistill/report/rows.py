"""Results of many runs -> one row per method: counts, mean and interval over seeds, difference to KD and verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pcdistill.report._format import (
    SPLITS,
    beyond,
    difference_and_interval,
    mean_and_interval,
    number,
    p_value,
    short_metric,
)
from pcdistill.stats import MARGIN, Kind, Paired, Summary, Verdict, holm, paired_test, summary, verdicts

BASELINE = "kd"
NO_PAIR = Paired(math.nan, math.nan, math.nan, 0)
EPOCHS = ("best", "last")
ORDER: tuple[Kind, ...] = ("better", "no difference", "cannot tell", "worse")


@dataclass(frozen=True)
class Failure:
    """A run that gives no value: its seed, its status, and why, as far as the run said."""

    seed: int
    status: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One method, or the teacher, over its seeds.

    `best` and `last` summarise the metric at the epoch that was best on validation and at the final epoch, over the
    runs that finished; `*_values` are the same by seed. `*_difference` is method - KD over the seeds both finished, and
    `*_p_holm` its p-value corrected for the number of methods compared; `*_verdict` says in words what they allow to
    say. Without a KD row, or for KD, they are empty. `baseline` is what stands in KD's place in other comparisons.
    """

    name: str
    kind: Literal["teacher", "method"]
    metric: str
    split: str
    runs: int
    failures: tuple[Failure, ...]
    best_values: dict[int, float]
    last_values: dict[int, float]
    best: Summary
    last: Summary
    best_difference: Paired = NO_PAIR
    last_difference: Paired = NO_PAIR
    best_p_holm: float = math.nan
    last_p_holm: float = math.nan
    best_verdict: Verdict | None = None
    last_verdict: Verdict | None = None
    kept: str = "best"
    baseline: str = BASELINE
    seconds: float = math.nan
    images_per_second: float = math.nan

    @property
    def finished(self) -> int:
        """Runs that gave a value."""
        return self.runs - len(self.failures)


def compare_rows(results: Sequence[dict[str, Any]], *, margin: float = MARGIN, baseline: str = BASELINE) -> list[Row]:
    """Group runs by method: the teacher first, then none, then kd, then the others by name.

    Values are the test set's if every finished run has them, otherwise validation's for all: the two are never mixed.
    Runs that were stopped, or whose metric is not a finite number, stay in `runs` and are listed in `failures`.

    Args:
        results: what result.json holds, one per run.
        margin: the difference that the verdicts take for one that matters, above 0, in points of the metric.
        baseline: the method that the others are tested against.

    Raises:
        ValueError: the runs have different metrics, a method and seed occur twice, or the margin is not above 0.
    """
    if not results:
        return []
    metrics = sorted({str(result.get("metric", "top1")) for result in results})
    if len(metrics) > 1:
        raise ValueError(f"results must have one metric, got {', '.join(metrics)}")
    metric, split = metrics[0], common_split(results)
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(str(result.get("method", "unknown")), []).append(result)
    names = sorted(groups, key=lambda name: (name != "none", name != baseline, name))
    rows = [_method_row(name, groups[name], metric, split) for name in names]
    teachers = [replace(row, baseline=baseline) for row in _teacher_rows(results, metric, split)]
    return teachers + _with_differences(rows, margin, baseline)


def format_table(rows: Sequence[Row]) -> str:
    """The verdicts, the rows as a Markdown table with aligned columns, and under it what the figures are."""
    if not rows:
        return "no runs"
    notes = [f"- {note}" for note in table_notes(rows)]
    head, *lost = failure_notes(rows) or [""]
    if lost:
        notes += [f"- {head}", *(f"  - {note}" for note in lost)]
    found = [f"- {one.sentence(name, rows[0].baseline)}" for name, one in ranked_verdicts(rows)]
    said = [f"Verdict, {verdict_head(rows)}:", "", *found, ""] if found else []
    return "\n".join([*said, *aligned(table_cells(rows)), "", *notes])


def verdict_head(rows: Sequence[Row]) -> str:
    """What the verdicts are on."""
    return f"{SPLITS.get(rows[0].split, rows[0].split)} {short_metric(rows[0].metric)} of the {kept_epoch(rows)} epoch"


def ranked_verdicts(rows: Sequence[Row]) -> list[tuple[str, Verdict]]:
    """Every tested method's name and its verdict against KD on the kept epoch; what is better stands first."""
    found = [(row, verdict_of(row, kept_epoch(rows))) for row in rows]
    return sorted(
        ((row.name, one) for row, one in found if one),
        key=lambda pair: (ORDER.index(pair[1].kind), -pair[1].difference if pair[1].n else 0.0),
    )


def verdict_of(row: Row, epoch: str) -> Verdict | None:
    """The verdict against KD at the best or last epoch."""
    return row.last_verdict if epoch == "last" else row.best_verdict


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Head and body of the terminal's table."""
    first = rows[0]
    where = f"{'val' if first.split == 'val' else first.split} {short_metric(first.metric)}"
    kept, tests = kept_epoch(rows), test_columns(rows)
    head = ["method", "runs", f"{where}, best epoch", f"{where}, last epoch"]
    head += [f"against {first.baseline}", *tests] if tests else []
    body = []
    for row in rows:
        runs = f"{row.finished}/{row.runs}" if row.failures else str(row.runs)
        cells = [row.name, runs, mean_and_interval(row.best, row.metric), mean_and_interval(row.last, row.metric)]
        body.append(cells + test_cells(row, kept, tests))
    return [head, *body]


def table_notes(rows: Sequence[Row]) -> list[str]:
    """What the table's figures are, as sentences."""
    first, methods = rows[0], [row for row in rows if row.kind == "method"]
    name, counts = short_metric(first.metric), sorted({row.finished for row in methods})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    notes = [
        f"± is the half width of the 95 % confidence interval of the mean (Student t) over seeds, n = {n} finished "
        "runs per method; a value without ± is of a single run or teacher: nothing is known of its spread.",
        f"Best epoch: the one with the highest {name} on validation, chosen without the test set. "
        "Last epoch: the final one.",
    ]
    notes += _interval_notes(rows)
    if first.split == "val":
        notes.append(
            "Not every run has a test set: the figures are validation's, and those of the best epoch are too high, "
            "because the same images chose the epoch."
        )
    if has_differences(rows):
        notes.append(
            f"Against {first.baseline}: mean of the differences at equal seeds at the {kept_epoch(rows)} epoch, in "
            f"points of {name}; p: two-sided paired t-test"
            + ("; p (Holm): corrected for the number of methods compared." if len(test_columns(rows)) > 1 else ".")
        )
        notes += _verdict_notes(rows)
        for row in methods:
            pairs = difference(row, kept_epoch(rows))[0].n
            if row.name != row.baseline and pairs < row.finished:
                notes.append(f"{row.name} and {row.baseline} have {pairs} seeds in common.")
    elif len(methods) > 1:
        among = any(row.name == row.baseline for row in methods)
        why = f"no run of {first.baseline} gave a value" if among else f"there is no {first.baseline} among the methods"
        notes.append(f"No paired test: {why}.")
    return notes


def _interval_notes(rows: Sequence[Row]) -> list[str]:
    """What stands in place of an interval, or beside one that says little."""
    over = [one for row in rows for one in (row.best, row.last)]
    widths = [one.ci95 for one in over]
    widths += [one.ci95 for row in rows for one in (row.best_difference, row.last_difference)]
    notes = []
    if 0 in widths:
        notes.append(
            "Equal: every seed gave the same value, so there is no spread to make an interval of. "
            "The next seed may still give another."
        )
    if any(beyond(one, rows[0].metric) for one in over):
        notes.append(
            "Past 100 or 0: the interval is wider than what the metric can be, because two or three seeds leave the "
            "spread all but unknown."
        )
    return notes


def _verdict_notes(rows: Sequence[Row]) -> list[str]:
    """By which rules the verdicts were given."""
    found = [one for row in rows if (one := verdict_of(row, kept_epoch(rows)))]
    if not found:
        return []
    several = len(found) > 1
    corrected = " after Holm's correction" if several else ""
    whole = ", however many methods there are" if several else ""
    notes = [
        f"Verdict: better or worse if the paired t-test's p{corrected} is below 0.05; in brackets the 95 % interval. "
        f"At most 5 of 100 tables without any true difference name one{whole}.",
        f"No difference greater than {found[0].margin:g} points: two one-sided t-tests{corrected}, p below 0.05. "
        "The margin is an option (--margin).",
    ]
    if any(one.kind == "cannot tell" for one in found):
        notes.append(
            "Not seen: with a probability below 80 %, by the spread of these seeds' differences. The fewer seeds, the "
            "rougher the number."
        )
    return notes


def failure_notes(rows: Sequence[Row]) -> list[str]:
    """Every run that is not among the table's figures, and what that does to them."""
    failed = [(row.name, failure) for row in rows for failure in row.failures]
    if not failed:
        return []
    started = sum(row.runs for row in rows if row.kind == "method")
    head = (
        f"{len(failed)} of {started} runs gave no value. They are counted but not averaged, so that their methods can "
        "look better than they are:"
    )
    return [head, *(f"{name}, seed {one.seed}: {one.status}: {one.reason}" for name, one in failed)]


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Markdown lines with columns padded to one width; the first column to the left, the others to the right."""
    safe = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in cells]
    widths = [max(3, *(len(line[i]) for line in safe)) for i in range(len(safe[0]))]  # a rule has three characters
    lines = []
    for line in safe:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return lines


def test_columns(rows: Sequence[Row]) -> list[str]:
    """The p-values worth a column: none without KD, the corrected one only where there is more than one comparison."""
    if not has_differences(rows):
        return []
    compared = [row for row in rows if row.kind == "method" and row.name != row.baseline]
    return ["p", "p (Holm)"] if len(compared) > 1 else ["p"]


def test_cells(row: Row, epoch: str, tests: Sequence[str]) -> list[str]:
    """A row's difference to KD and its p-values; empty for the teacher and for KD."""
    if not tests:
        return []
    if row.kind == "teacher" or row.name == row.baseline:
        return [""] * (1 + len(tests))
    found, corrected = difference(row, epoch)
    return [difference_and_interval(found, row.metric), p_value(found.p), p_value(corrected)][: 1 + len(tests)]


def has_differences(rows: Sequence[Row]) -> bool:
    """Whether any method could be compared with KD."""
    return any(row.best_difference.n or row.last_difference.n for row in rows)


def kept_epoch(rows: Sequence[Row]) -> Literal["best", "last"]:
    """The epoch whose weights the runs kept; its difference to KD is the one in the short table."""
    kept = {row.kept for row in rows if row.kind == "method"}
    return "last" if kept == {"last"} else "best"


def difference(row: Row, epoch: str) -> tuple[Paired, float]:
    """The difference to KD at the best or last epoch, and its corrected p."""
    if epoch == "last":
        return row.last_difference, row.last_p_holm
    return row.best_difference, row.best_p_holm


def common_split(results: Sequence[dict[str, Any]]) -> str:
    """The test set, if every finished run was evaluated on it, with whatever outcome; else validation."""
    last = [result["last"] for result in results if isinstance(result.get("last"), dict)]
    return "test" if last and all(isinstance(at.get("test"), dict) for at in last) else "val"


def value_at(result: dict[str, Any], epoch: str, split: str, metric: str) -> float | None:
    """A run's metric at its best or last epoch, None where the result has no finite number."""
    at = result.get(epoch)
    found = at.get(split) if isinstance(at, dict) else None
    return number(found.get(metric)) if isinstance(found, dict) else None


def kept_epoch_of(result: Mapping[str, Any]) -> Literal["best", "last"]:
    """The epoch whose weights a run kept."""
    return "last" if result.get("kept") == "last" else "best"


def seed_of(result: dict[str, Any]) -> int:
    """The run's seed."""
    seed = result.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def reason_of(result: dict[str, Any]) -> str:
    """Why a run has no value, in its own words."""
    notes = result.get("notes")
    return " ".join(str(note) for note in notes) if isinstance(notes, list) and notes else "no reason given"


def _method_row(name: str, results: Sequence[dict[str, Any]], metric: str, split: str) -> Row:
    values: dict[str, dict[int, float]] = {epoch: {} for epoch in EPOCHS}
    failures, seen, finished = [], set(), []
    for result in sorted(results, key=seed_of):
        seed, status = seed_of(result), str(result.get("status", "unknown"))
        if seed in seen:
            raise ValueError(f"results must have each method and seed once, got {name}, seed {seed} twice")
        seen.add(seed)
        found = {epoch: value_at(result, epoch, split, metric) for epoch in EPOCHS}
        if status != "done":
            failures.append(Failure(seed, status, reason_of(result)))
        elif None in found.values():
            failures.append(
                Failure(seed, "no number", f"{metric} on {SPLITS.get(split, split)} is not a finite number")
            )
        else:
            finished.append(result)
            for epoch, value in found.items():
                values[epoch][seed] = float(value or 0.0)
    return Row(
        name=name,
        kind="method",
        metric=metric,
        split=split,
        runs=len(results),
        failures=tuple(failures),
        best_values=values["best"],
        last_values=values["last"],
        best=summary(list(values["best"].values())),
        last=summary(list(values["last"].values())),
        kept="last" if finished and all(result.get("kept") == "last" for result in finished) else "best",
        seconds=_mean_of(finished, "seconds"),
        images_per_second=_mean_of(finished, "images_per_second"),
    )


def _teacher_rows(results: Sequence[dict[str, Any]], metric: str, split: str) -> list[Row]:
    """One row per teacher's name. Equal values everywhere are one teacher; others are summarised over seeds."""
    values: dict[str, dict[int, float]] = {}
    for result in results:
        teacher = result.get("teacher")
        found = teacher.get(split) if isinstance(teacher, dict) else None
        value = number(found.get(metric)) if isinstance(found, dict) else None
        if isinstance(teacher, dict) and value is not None:
            values.setdefault(str(teacher.get("name", "unnamed")), {})[seed_of(result)] = value
    rows = []
    for name, by_seed in values.items():
        if len(set(by_seed.values())) == 1:
            by_seed = dict([next(iter(by_seed.items()))])
        over_seeds = summary(list(by_seed.values()))
        rows.append(
            Row(
                name=f"teacher: {name}",
                kind="teacher",
                metric=metric,
                split=split,
                runs=len(by_seed),
                failures=(),
                best_values=by_seed,
                last_values=by_seed,
                best=over_seeds,
                last=over_seeds,
            )
        )
    return rows


def _with_differences(rows: list[Row], margin: float, baseline: str) -> list[Row]:
    """Add every method's paired difference to the baseline at both epochs, and the verdict on it."""
    rows = [replace(row, baseline=baseline) for row in rows]
    base = next((row for row in rows if row.name == baseline), None)
    if base is None or len(rows) < 2:
        return rows
    best_pairs = {row.name: _common(row.best_values, base.best_values) for row in rows if row is not base}
    last_pairs = {row.name: _common(row.last_values, base.last_values) for row in rows if row is not base}
    best = {name: paired_test(*pair) for name, pair in best_pairs.items()}
    last = {name: paired_test(*pair) for name, pair in last_pairs.items()}
    best_said, last_said = verdicts(best_pairs, margin=margin), verdicts(last_pairs, margin=margin)
    best_holm = holm({name: found.p for name, found in best.items()})
    last_holm = holm({name: found.p for name, found in last.items()})
    return [
        row
        if row is base
        else replace(
            row,
            best_difference=best[row.name],
            last_difference=last[row.name],
            best_p_holm=best_holm[row.name],
            last_p_holm=last_holm[row.name],
            best_verdict=best_said[row.name],
            last_verdict=last_said[row.name],
        )
        for row in rows
    ]


def _common(values: dict[int, float], base: dict[int, float]) -> tuple[list[float], list[float]]:
    """Both methods' values at the seeds that both finished."""
    common = sorted(values.keys() & base.keys())
    return [values[seed] for seed in common], [base[seed] for seed in common]


def _mean_of(results: Sequence[dict[str, Any]], key: str) -> float:
    found = [value for value in (number(result.get(key)) for result in results) if value is not None]
    return summary(found).mean
