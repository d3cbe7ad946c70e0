"""The verdict over runs of several comparisons: `python verdict.py kd=FOLDER/METHOD NAME=FOLDER/METHOD ...`.

Each argument names the runs of one method (FOLDER/METHOD/seed-0 and so on) anew; "kd" is what the others are tested
against. The seeds must be the same.
"""

import json
import sys
from pathlib import Path

from pcdistill import report


def main(arguments: list[str]) -> None:
    results = []
    for argument in arguments:
        name, _, folder = argument.partition("=")
        for file in sorted(Path(folder).glob("seed-*/result.json")):
            results.append({**json.loads(file.read_text(encoding="utf-8")), "method": name})
    print(report.format_table(report.compare_rows(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
