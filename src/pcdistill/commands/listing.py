"""`pcdistill list`: names that can be used. Only models, detectors and options need torch."""

import fnmatch
from collections.abc import Sequence
from typing import TextIO

from pcdistill.methods import METHODS
from pcdistill.recipe import ALONE, RECIPES, recipe_names


def listed(what: str) -> list[tuple[str, str]]:
    """Name and one line of text, for each of the "methods", "recipes", "data", "models" or "detectors"."""
    if what == "methods":
        rows = [(ALONE, "the student alone")]
        return rows + [(name, f"{m.summary} [{m.kind}; {m.source}]") for name, m in METHODS.items()]
    if what == "recipes":
        return [(name, _first_comment(name)) for name in recipe_names()]
    if what == "data":
        from pcdistill.data import DATASETS

        return list(DATASETS.items())
    from pcdistill.commands.tasks import TASKS

    task = "detection" if what == "detectors" else "classification"
    return [(name, "") for name in TASKS[task]().model_names()]


def fitting(rows: Sequence[tuple[str, str]], pattern: str) -> list[tuple[str, str]]:
    """The rows whose name contains the pattern, or fits it where it has a * or ?; capitals do not count."""
    small = pattern.lower()
    if not any(character in small for character in "*?["):
        return [row for row in rows if small in row[0].lower()]
    return [
        row
        for row in rows
        if fnmatch.fnmatchcase(row[0].lower(), small) or fnmatch.fnmatchcase(row[0].lower().partition("/")[2], small)
    ]


def summarised(rows: Sequence[tuple[str, str]], what: str) -> list[tuple[str, str]]:
    """How many names each zoo has, for a person: all of them fill thirty screens."""
    zoos: dict[str, list[str]] = {}
    for name, _ in rows:
        zoo, _, inner = name.partition("/")
        zoos.setdefault(zoo, []).append(inner)
    found = [(f"{zoo}/", f"{len(names):,}: {', '.join(names[:6])}, ...") for zoo, names in zoos.items()]
    return [*found, ("", f"a part of a name lists those that have it: pcdistill list {what} resnet18")]


def print_rows(rows: Sequence[tuple[str, str]], stream: TextIO) -> None:
    """Two columns that fit a terminal, in whole words; a line for each name where the stream is none."""
    if not stream.isatty():
        for name, text in rows:
            print(f"{name:<24} {text}".rstrip(), file=stream)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    Console(file=stream, highlight=False).print(table)


def options_listed(method: str) -> list[tuple[str, str]]:
    """Name and meaning of every option of a method's loss.

    Raises:
        InputError: there is no such method.
    """
    from pcdistill.distillation.objective import method_options

    return [
        (o.name, f"{o.type}, default {o.default}: {o.about}") if o.default else (o.name, f"{o.type}: {o.about}")
        for o in method_options(method)
    ]


def _first_comment(name: str) -> str:
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
