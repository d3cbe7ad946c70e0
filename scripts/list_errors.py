"""Write docs/errors.md, every sentence that the package raises or stops with, from the source; --check only compares.

The page is there to be read: by whoever looks for a message, and once in a while for its English.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pcdistill"
PAGE = ROOT / "docs" / "errors.md"
RAISED = ("InputError", "PcdistillError", "TrainingStopped", "Interrupted", "ValueError", "TypeError", "RuntimeError")
COLLECTED = (
    "mistakes.add",
    "warn",
    "self.console.warn",
    "console.warn",
    "console.warn_once",
)  # calls that tell a sentence without raising
HEAD = """# Error sentences

Made by `python scripts/list_errors.py`; a test compares it with the source. `{...}` is filled in when it happens.
From a recipe, the sentence begins with the file, or with the key. Several mistakes of a recipe are told together.
"""


@functools.cache
def sentences(path: Path) -> tuple[str, ...]:
    """The sentence of every place in a file, in order."""
    return tuple(_sentences(path))


def _sentences(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        assigned = _assigned(scope)
        for node in _own(scope):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            known = RAISED if isinstance(node, ast.Raise) else COLLECTED
            if name in known:
                for text in _texts(call.args[0], assigned):
                    if re.search("[a-z]", re.sub(r"\{.*?\}", "", text)):  # else it passes on another's sentence
                        yield text


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for path in sorted(SOURCE.rglob("*.py")):
        found = list(dict.fromkeys(sentences(path)))
        if found:
            parts.append(f"\n## {path.relative_to(SOURCE)}\n\n" + "".join(f"- {_plain(text)}\n" for text in found))
    return "".join(parts)


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope in the order of the source, without those of the functions in it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own(child)


def _assigned(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """What a function's names are set to."""
    found: dict[str, list[ast.expr]] = {}
    for node in _own(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def _texts(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> list[str]:
    """The sentences that an expression can give."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name) and node.id in assigned:
        return [text for value in assigned.pop(node.id) for text in _texts(value, assigned)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, assigned), *_texts(node.orelse, assigned)]
    if isinstance(node, ast.BinOp):
        return [left + right for left in _texts(node.left, assigned) for right in _texts(node.right, assigned)]
    if not isinstance(node, ast.JoinedStr):
        return ["{" + ast.unparse(node) + "}"]
    return ["".join(_piece(part) for part in node.values)]


def _piece(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return "{" + ast.unparse(part.value) + "}"


def _plain(text: str) -> str:
    """One line that Markdown leaves as it is."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/errors.md is not up to date: run this script")


if __name__ == "__main__":
    main()
