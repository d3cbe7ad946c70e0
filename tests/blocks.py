"""Code blocks out of the documents, and the commands that a shell makes of them."""

import re
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Every document with code, but for the list of error sentences, which holds none.
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if path.name != "errors.md"
)
FORMULAS = "docs/methods.md"  # its indented blocks are equations
BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<fenced>.*?)^(?P=fence)[ ]*$"
    r"|(?<=\n\n)(?P<indented>(?:    [^\n]*\n|\n(?=(?:\n)*    ))+)",
    re.MULTILINE | re.DOTALL,
)
LISTED = re.compile(r"^(?:[-*]|\d+\.) ", re.MULTILINE)
# Words are written apart by unit separators, commands by record separators: neither stands in a document.
RECORDER = """
command_not_found_handle() { printf '%s\\x1f' "$@" >> "$RECORD"; printf '\\x1e' >> "$RECORD"; }
PATH=/nothing
"""


@dataclass(frozen=True)
class Block:
    """A block of code: `language` is shell for an indented one and for a fence that names none."""

    document: str
    line: int
    language: str
    text: str


def blocks_of(document: str) -> list[Block]:
    """The document's blocks, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        body = match["fenced"] if match["fence"] else match["indented"]
        language = match["language"].strip() if match["fence"] else "formula" if document == FORMULAS else ""
        line = text.count("\n", 0, match.start()) + 1
        language = "shell" if language in ("", "bash", "sh") else language
        found.append(Block(document, line, language, textwrap.dedent(body).strip("\n") + "\n"))
    return found


def commands_of(text: str, folder: Path) -> list[list[str]]:
    """What a shell would run of a script, in order: variables, loops, quotes and patterns are bash's own.

    Nothing is run: no program is on the path, and what is looked for is written down.

    Args:
        text: the script.
        folder: where the reader stands.
    """
    record = folder / ".record"
    record.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eu", "-c", RECORDER + text],
        cwd=folder,
        env={"RECORD": str(record), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    assert not done.stderr, f"{text}\n{done.stderr}"
    if not record.exists():
        return []
    written = record.read_text(encoding="utf-8").split("\x1e")[:-1]
    record.unlink()
    return [command.split("\x1f")[:-1] for command in written]
