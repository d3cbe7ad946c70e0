"""Write the table of docs/reliability.md from the counts that `make test-faults` left in build/faults."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "reliability.md", ROOT / "build" / "faults"
BEGIN, END = "<!-- counts -->\n", "<!-- end of counts -->\n"
LOSS = "logits of "
COLUMNS = ("tried", "refused", "worked", "lost")


def table(folder: Path) -> str:
    """A row for every part, one for all losses, and the sum."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    losses = [row for row in parts if row["part"].startswith(LOSS)]
    rows = [row for row in parts if row not in losses]
    if losses:
        rows.append({"part": f"logits of {len(losses)} losses", **_sum(losses)})
    rows.append({"part": "all", **_sum(parts)})
    lines = [f"| Part | {' | '.join(COLUMNS)} |", "| --- | --: | --: | --: | --: |"]
    lines += [f"| {row['part']} | {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _sum(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in COLUMNS}


def main(folder: Path) -> int:
    """Put the table between its marks; 1 where nothing was counted."""
    if not any(folder.glob("*.json")):
        print(f"{folder} holds no counts; run `make test-faults` first", file=sys.stderr)
        return 1
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(folder) + "\n" + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else COUNTS))
