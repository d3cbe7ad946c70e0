"""The verdict over runs of several comparisons: `python verdict.py 'NAME=FOLDER/METHOD/seed-*' ...`.

Each argument names the runs whose folders fit a pattern; "kd" is what the others are tested against, seed by seed.
"""

import json
import sys
from pathlib import Path

from pcdistill import report


def main(arguments: list[str]) -> None:
    results = []
    for argument in arguments:
        name, _, pattern = argument.partition("=")
        for file in sorted(Path().glob(f"{pattern}/result.json")):
            results.append({**json.loads(file.read_text(encoding="utf-8")), "method": name})
    print(report.format_table(report.compare_rows(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
