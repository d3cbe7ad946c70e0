"""By how many points the last epoch's test accuracy differs from that of the epoch that validation chose.

Usage: python docs/results/evidence/last_epoch.py TABLE.md...

A table is one that `pcdistill compare` wrote, or has its columns: method, runs, best epoch, last epoch.
"""

import argparse
import re
from pathlib import Path

ROW = re.compile(r"^\| *([\w-][^|]*?) *\| *(\d+) *\| *([\d.]+)[^|]*\| *([\d.]+)[^|]*\|", re.MULTILINE)


def differences(table: Path) -> list[tuple[int, float]]:
    """For every method's row: runs, and last minus best in points."""
    rows = ROW.findall(table.read_text(encoding="utf-8"))
    return [(int(runs), float(last) - float(best)) for name, runs, best, last in rows if not name.startswith("teacher")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path)
    print("| table | rows | runs | mean | lowest | highest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for table in parser.parse_args().tables:
        found = differences(table)
        points = [by for _, by in found]
        mean = sum(runs * by for runs, by in found) / sum(runs for runs, _ in found)
        runs = sum(runs for runs, _ in found)
        print(f"| {table.stem} | {len(found)} | {runs} | {mean:+.2f} | {min(points):+.2f} | {max(points):+.2f} |")


if __name__ == "__main__":
    main()
