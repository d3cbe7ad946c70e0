"""Every benchmark in turn, then docs/performance.md with its tables and plot: what `make bench` runs.

python benchmarks/run_all.py [--device cpu]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from _bench import table

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
BENCHMARKS = ("loss", "step", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-page", action="store_true", help="write the page from the results that are there")
    args = parser.parse_args()
    if not args.only_page:
        for name in BENCHMARKS:
            out = RESULTS / f"{name}--{args.device}.json"
            command = [sys.executable, f"bench_{name}.py", "--device", args.device, "--json", str(out.resolve())]
            subprocess.run(command, cwd=HERE, check=True)
    write_page()


def write_page() -> None:
    """docs/performance.md: the text that stands, and under each marker the newest tables."""
    text = PAGE.read_text(encoding="utf-8")
    for name in BENCHMARKS:
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}--*.json"))]
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = before + start + "\n\n" + "\n\n".join(map(section, found)) + "\n\n" + end + after
    PAGE.write_text(text, encoding="utf-8")
    for path in RESULTS.glob("loss--*.json"):
        plot(json.loads(path.read_text()), PAGE.with_name(f"performance-{path.stem}.svg"))


def section(result: dict[str, Any]) -> str:
    """One run of one benchmark: command, machine, table."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return f"`{result['command']}`\n\n{machine}\n\n{table(result['rows'])}"


def plot(result: dict[str, Any], out: Path) -> None:
    """Time over KD's against S, a panel for each number of classes, a line for each way to compute PCD."""
    rows = [row for row in result["rows"] if row.get("x_kd") and row["loss"] != "torch KD"]
    classes = sorted({row["C"] for row in rows})
    figure, panels = plt.subplots(1, len(classes), figsize=(4 * len(classes), 3.4), sharey=True, squeeze=False)
    for panel, c in zip(panels[0], classes, strict=True):
        for name in dict.fromkeys(row["loss"] for row in rows):
            points = sorted((row["S"], row["x_kd"]) for row in rows if row["C"] == c and row["loss"] == name)
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"{c} classes", xlabel="stages S", yscale="log")
    panels[0][0].set_ylabel("time of forward and backward / KD's")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": "pcdistill"}):  # the same plot, the same file
        figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
