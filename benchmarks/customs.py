"""What the field's customs would have said of comparisons that are there: one seed, best epoch on the images reported.

python benchmarks/customs.py COMPARISON... [--margin 0.5]

COMPARISON is what `pcdistill compare --out` wrote. Every two of its methods are compared as papers do, by one run of
each, for all pairs of seeds, and held against the verdict over all seeds of the two. Only validation is measured in
every epoch: for the custom of the best epoch it stands in for the test set that papers choose on.

"Told apart" are pairs with a verdict "better" or "worse" on the test set. The mean over seeds holds the single runs
too, so the shares of wrong winners are a little too low.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from _bench import machine, report

from pcdistill.report._folder import read_run
from pcdistill.stats import MARGIN, summary, verdicts


@dataclass(frozen=True)
class Run:
    """A finished run: its metric in percent.

    `chosen` is on test at the epoch that was best on validation, `peak` the highest on validation over all epochs.
    `flattered` is what choosing by the images reported adds to a figure: best minus last epoch on validation, less the
    same on test, which the choice has not seen.
    """

    chosen: float
    peak: float
    flattered: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="+")
    parser.add_argument("--margin", type=float, default=MARGIN, help="points (default %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [{"comparison": path.name, **customs(read_runs(path), args.margin)} for path in args.comparison]
    report(rows, machine("cpu"), " ".join(["python", *sys.argv]), args.json)


def read_runs(comparison: Path) -> dict[str, dict[int, Run]]:
    """Method -> seed -> run, of the runs that finished and have a test set."""
    found: dict[str, dict[int, Run]] = {}
    for path in sorted(comparison.rglob("seed-*/result.json")):
        run = read_run(path.parent)
        result, metric = run.result, run.result.get("metric", "top1")
        if result.get("status") != "done" or not result["best"].get("test"):
            continue
        at = {(e, split): result[e][split][metric] for e, split in product(("best", "last"), ("val", "test"))}
        columns = (f"val/{metric}", f"val_ema/{metric}")
        measured = [row[column] for row in run.rows for column in columns if column in row]
        method = str(path.parent.parent.relative_to(comparison))
        found.setdefault(method, {})[result["seed"]] = Run(
            chosen=at["best", "test"],
            peak=max([at["best", "val"], *measured]),
            flattered=at["best", "val"] - at["last", "val"] - (at["best", "test"] - at["last", "test"]),
        )
    return found


def customs(runs: dict[str, dict[int, Run]], margin: float) -> dict[str, Any]:
    """One comparison's row: how often one run of each of two methods misleads, in percent of all such choices."""
    pairs = {}
    for a, b in combinations(runs, 2):
        seeds = sorted(runs[a].keys() & runs[b].keys())
        pairs[f"{a} {b}"] = ([runs[a][s] for s in seeds], [runs[b][s] for s in seeds])
    said = verdicts(
        {name: ([r.chosen for r in a], [r.chosen for r in b]) for name, (a, b) in pairs.items()}, margin=margin
    )
    clear = [name for name, one in said.items() if one.kind in ("better", "worse")]
    over = summary([run.flattered for of_method in runs.values() for run in of_method.values()])
    row: dict[str, Any] = {
        "methods": len(runs),
        "seeds": max((len(of_method) for of_method in runs.values()), default=0),
        "pairs": len(pairs),
        "told apart": len(clear),
    }
    for custom, value in (("one seed", "chosen"), ("one seed, best epoch", "peak")):
        wrong, claimed = [], []
        for name, (a, b) in pairs.items():
            gains = [getattr(x, value) - getattr(y, value) for x, y in product(a, b)]
            if name in clear:
                wrong += [gain * said[name].difference < 0 for gain in gains]
            else:
                claimed += [abs(gain) > margin for gain in gains]
        row[f"wrong winner, {custom} (%)"] = _percent(wrong)
        row[f"not told apart, but a winner by > {margin:g}, {custom} (%)"] = _percent(claimed)
    row["best epoch flatters by (points)"] = f"{over.mean:.2f} ± {over.ci95:.2f}"
    return row


def _percent(found: list[bool]) -> float | str:
    return 100 * sum(found) / len(found) if found else ""


if __name__ == "__main__":
    main()
