"""Write a new method: its loss, reference, test and docs section, and its line in the table of methods.

    python scripts/new_method.py my-method --kind logits --source "arXiv 2401.00001"

What it writes runs and passes its tests; the equation is a squared error, to be replaced in all of the files.
"""

import argparse
import keyword
import re
import sys
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[1]
TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = {"logits": "# Logit methods", "features": "# Feature methods", "pyramids": "# Pyramid methods"}
FILES = {
    "loss.py.txt": "src/pcdistill/losses/{module}.py",
    "reference.py.txt": "tests/references/{module}.py",
    "test.py.txt": "tests/losses/test_{module}.py",
}


def words_for(name: str, source: str, title: str | None) -> dict[str, str]:
    """What the templates are filled with."""
    parts = name.split("-")
    return {
        "name": name,
        "module": "_".join(parts),
        "stem": "".join(part[:1].upper() + part[1:] for part in parts),
        "title": title or " ".join(parts),
        "source": source,
    }


def write_files(kind: str, words: dict[str, str]) -> list[Path]:
    """Loss, reference and test; refuses to write over a file."""
    targets = {template: ROOT / path.format(**words) for template, path in FILES.items()}
    taken = [str(path.relative_to(ROOT)) for path in targets.values() if path.exists()]
    if taken:
        sys.exit(f"new_method: {', '.join(taken)} exists already; choose another name")
    for template, path in targets.items():
        text = (TEMPLATES / kind / template).read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(words), encoding="utf-8")
    return list(targets.values())


def add_export(words: dict[str, str]) -> Path:
    """The line in losses/__init__.py, in alphabetical order."""
    path = ROOT / "src/pcdistill/losses/__init__.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    imports = [line for line in lines if line.startswith("from ")]
    imports = sorted([*imports, f"from pcdistill.losses.{words['module']} import *\n"])
    path.write_text("".join([*(line for line in lines if not line.startswith("from ")), *imports]), encoding="utf-8")
    return path


def add_method(kind: str, words: dict[str, str]) -> Path:
    """The entry of METHODS, behind the last one of its kind."""
    path = ROOT / "src/pcdistill/methods.py"
    text = path.read_text(encoding="utf-8")
    own = "DETECTOR" if kind == "pyramids" else "CE"
    entry = (
        f'    "{words["name"]}": Method(\n'
        f'        "pcdistill.losses.{words["module"]}:{words["stem"]}Loss",\n'
        f'        "{kind}",\n'
        f'        "{words["source"]}",\n'
        f'        "{words["title"]}",\n'
        f'        ({own}, {{"method": "{words["name"]}", "weight": 1.0}}),\n'
        "    ),\n"
    )
    entries = re.findall(r'^    "[\w-]+": Method\(\n.*?^    \),\n', text, flags=re.MULTILINE | re.DOTALL)
    last = [found for found in entries if re.search(rf'^ +.*"{kind}",', found, flags=re.MULTILINE)][-1]
    path.write_text(text.replace(last, last + entry), encoding="utf-8")
    return path


def add_section(kind: str, words: dict[str, str]) -> Path:
    """The section of docs/methods.md, at the end of its kind's part."""
    path = ROOT / "docs/methods.md"
    section = Template((TEMPLATES / kind / "section.md.txt").read_text(encoding="utf-8")).substitute(words)
    before, heading, rest = path.read_text(encoding="utf-8").partition(f"{HEADINGS[kind]}\n")
    part, following, after = rest.partition("\n# ")
    path.write_text(before + heading + part.rstrip("\n") + "\n\n" + section + following + after, encoding="utf-8")
    return path


def main() -> None:
    """Write everything that a method is, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="as in a recipe: lower-case words with hyphens")
    parser.add_argument("--kind", required=True, choices=sorted(HEADINGS), help="what it compares")
    parser.add_argument("--source", default="not published", help='the paper, such as "arXiv 2401.00001"')
    parser.add_argument("--title", help="the method in a few words; by default its name")
    args = parser.parse_args()
    words = words_for(args.name, args.source, args.title)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", args.name) or keyword.iskeyword(words["module"]):
        sys.exit(f"new_method: a name must be lower-case words with hyphens, such as my-method, got {args.name!r}")
    if any(mark in text for text in (args.source, args.title or "") for mark in '"\\\n'):
        sys.exit("new_method: source and title must be one line without quotes and backslashes")
    written = write_files(args.kind, words)
    written += [add_export(words), add_method(args.kind, words), add_section(args.kind, words)]
    import methods_table

    methods_table.main([])
    for path in written:
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
