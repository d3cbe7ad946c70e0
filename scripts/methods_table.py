"""Write the table of docs/methods.md that says what the tests of every method show; --check only compares."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table of tests: scripts/methods_table.py writes it -->\n", "<!-- end of the table -->\n"


def tests_in(path: Path) -> list[str]:
    """The test functions of a file as sentences, in their order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [name.removeprefix("test_").replace("_", " ") for name in names if name.startswith("test_")]


def table() -> str:
    """One row for every test file of tests/losses that belongs to methods, in the order of the table of methods."""
    sys.path.insert(0, str(ROOT / "src"))
    from pcdistill.methods import METHODS

    methods: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        methods.setdefault(method.path.split(":")[0].rsplit(".", 1)[-1], []).append(name)
    rows = ["| Method | Reference | What its tests show |", "| --- | --- | --- |"]
    for module, names in methods.items():
        tests = ROOT / "tests" / "losses" / f"test_{module}.py"
        if tests.exists():
            reference = ROOT / "tests" / "references" / f"{module}.py"
            loops = f"[loops](../{reference.relative_to(ROOT)})" if reference.exists() else ""
            link = f"[{', '.join(names)}](../{tests.relative_to(ROOT)})"
            rows.append(f"| {link} | {loops} | {'; '.join(tests_in(tests))} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Rewrite the table, or with --check exit with 1 where it is not what the tests say."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = before + BEGIN + table() + END + after
    if "--check" in arguments:
        if wanted != text:
            print(
                "docs/methods.md: the table of tests is not up to date; run scripts/methods_table.py", file=sys.stderr
            )
        return int(wanted != text)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
