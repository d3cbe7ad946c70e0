"""A comparison for a terminal: verdicts, and tables whose columns fit it; pipes and files get Markdown."""

import io
from collections.abc import Sequence
from typing import Any

from pcdistill.report.rows import (
    BASELINE,
    compare_rows,
    failure_notes,
    ranked_verdicts,
    table_cells,
    table_notes,
    verdict_head,
)
from pcdistill.report.strengths import at_best, has_strengths, strength_cells, strength_notes
from pcdistill.stats import MARGIN

COLOURS = {"better": "green", "worse": "red"}


def terminal_text(
    results: Sequence[dict[str, Any]], *, margin: float = MARGIN, baseline: str = BASELINE, width: int | None = None
) -> str:
    """What :func:`pcdistill.report.comparison_text` says, wrapped at words, with colours unless NO_COLOR is set.

    Args:
        results: what the runs' result.json hold.
        margin: of the verdicts.
        baseline: the method that the others are compared with.
        width: columns; None asks the terminal.
    """
    from rich.console import Console
    from rich.text import Text

    rows = compare_rows(at_best(results), margin=margin, baseline=baseline)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style))

    verdicts = ranked_verdicts(rows)
    if verdicts:
        say(f"Verdict, {verdict_head(rows)}:", "bold")
    for name, one in verdicts:
        say(f"- {one.sentence(name, rows[0].baseline)}", COLOURS.get(one.kind, ""))
    console.print(_table(_fewer_columns(table_cells(rows)) if rows else [["no runs"]]))
    for note in [*table_notes(rows), *failure_notes(rows)] if rows else []:
        say(f"- {note}", "dim")
    if has_strengths(results):
        say("\nAt equal strength:", "bold")
        console.print(_table(strength_cells(results)))
        for note in strength_notes(results):
            say(f"- {note}", "dim")
    return stream.getvalue().rstrip("\n")


def _fewer_columns(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without what a narrow table can do without: equal numbers of runs, and p where the corrected one stands."""
    head = cells[0]
    methods = {line[1] for line in cells[1:] if not line[0].startswith("teacher: ")}
    without = {"runs"} if len(methods) == 1 else set()
    without |= {"p"} if "p (Holm)" in head else set()
    return [[cell for title, cell in zip(head, line, strict=True) if title not in without] for line in cells]


def _table(cells: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, title in enumerate(cells[0]):
        least = max((len(line[number]) for line in cells[1:]), default=0) if number else None  # no value is broken
        table.add_column(title, justify="right" if number else "left", overflow="fold", min_width=least)
    for line in cells[1:]:
        table.add_row(*(Text(cell, "cyan" if not i else "") for i, cell in enumerate(line)))
    return table
