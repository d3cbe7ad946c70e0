"""Lay the pages of the site in build/pages, with build/mkdocs.yml: docs/, a page for each method, and the API.

    python scripts/site_pages.py [FOLDER]     # then: mkdocs build --strict --config-file build/mkdocs.yml

The documents stay as they are read in a clone. What differs on the site is made here: methods.md is cut into pages,
notebooks become pages with the outputs that are stored in them, and links to files outside docs/ become their paths, as
the site does not hold those files.
"""

import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHODS = "methods.md"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK_OR_CODE = re.compile(f"{LINK.pattern}|{CODE.pattern}", CODE.flags)  # in code nothing is a link
# The navigation: title of a group -> pages of docs/ in the order that a reader wants them.
GROUPS = {
    "Start": (
        "first-steps.md",
        "notebooks/better-student.ipynb",
        "notebooks/own-photographs.ipynb",
        "questions.md",
        "usability.md",
    ),
    "Guides": (
        "data.md",
        "comparing.md",
        "strength.md",
        "tuning.md",
        "detection.md",
        "beyond-the-loss.md",
        "production.md",
        "own-trainer.md",
        "pages.md",
        "performance.md",
        "scale.md",
        "clusters.md",
        "teachers.md",
        "errors.md",
        "reliability.md",
    ),
    "Results": (
        "results/evidence.md",
        "results/digits.md",
        "results/cifar100-sample.md",
        "results/imagefolder.md",
        "results/bccd.md",
        "results/detr.md",
    ),
    "Contributing": ("adding-a-method.md", "architecture.md"),
}
# Modules that are public, by page of the API.
API = {
    "Training": ("pcdistill.api",),
    "Students": ("pcdistill.commands.push", "pcdistill.commands.student"),
    "Your own loss": ("pcdistill.losses.base",),
    "Detectors": ("pcdistill.detection.detectors.base", "pcdistill.detection.detectors.table"),
    "Verdicts": ("pcdistill.stats",),
    "Errors": ("pcdistill.errors",),
}


def method_sections(text: str) -> tuple[str, dict[str, tuple[str, str]], str]:
    """Cut methods.md: what stands before the first method, page name -> (title, text), and what stands after."""
    parts = re.split(r"^(#{1,2} .*)$", text, flags=re.MULTILINE)
    head, found, rest = parts[0], {}, ""
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        named = re.match(r"## ([\w-]+(?: and [\w-]+)*): (.*)", title)
        if named:
            found[named[1].split(" and ")[0]] = (f"{named[1]}: {named[2]}", body)
        elif title.startswith("# ") and not found:
            head += title + body
        else:
            rest += title.replace("# ", "## ", 1) + body if title.startswith("# ") else title + body
    return head, found, rest


def site_links(text: str, page: str, at: str, moved: dict[str, str]) -> str:
    """A page's text with the links that hold on the site.

    Args:
        text: Markdown.
        page: where it stands in the repository.
        at: where it stands on the site.
        moved: page of docs/ -> page of the site, of those that stand elsewhere.
    """

    def held(match: re.Match[str]) -> str:
        label, target = match.groups()
        if target is None:
            return match[0]
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        stands = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        name = stands.removeprefix("docs/")
        if name == stands or not (name.endswith(".md") or name in moved):
            return f"{label} (`{stands}`)" if label.strip("`") != stands else f"`{stands}`"
        there = posixpath.relpath(moved.get(name, name), posixpath.dirname(at) or ".")
        return f"[{label}]({there}{'#' + anchor if anchor and name not in moved else ''})"

    return LINK_OR_CODE.sub(held, text)


def notebook_text(text: str) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        shown = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
        if shown:
            parts.append("```text\n" + "".join("".join(lines) for lines in shown).strip("\n") + "\n```")
    return "\n\n".join(parts) + "\n"


def lay_notebooks(pages: Path, moved: dict[str, str]) -> None:
    """A page for each notebook."""
    for path in sorted(DOCS.rglob("*.ipynb")):
        name = path.relative_to(DOCS).as_posix()
        text = site_links(notebook_text(path.read_text(encoding="utf-8")), f"docs/{name}", moved[name], moved)
        (pages / moved[name]).parent.mkdir(parents=True, exist_ok=True)
        (pages / moved[name]).write_text(text, encoding="utf-8")


def lay_methods(pages: Path, moved: dict[str, str]) -> list[str]:
    """The pages of the methods, and the page that lists them; their names."""
    head, found, rest = method_sections((DOCS / METHODS).read_text(encoding="utf-8"))
    (pages / "methods").mkdir()
    for name, (title, body) in found.items():
        text = site_links(f"# {title}\n{body}", f"docs/{METHODS}", f"methods/{name}.md", moved)
        (pages / "methods" / f"{name}.md").write_text(text, encoding="utf-8")
    rows = "".join(f"- [{title}]({name}.md)\n" for name, (title, _) in found.items())
    head, rest = (site_links(part, f"docs/{METHODS}", "methods/index.md", moved) for part in (head, rest))
    (pages / "methods" / "index.md").write_text(f"{head.rstrip()}\n\n{rows}\n{rest}", encoding="utf-8")
    return list(found)


def lay_api(pages: Path) -> list[str]:
    """A page for each part of the API, which mkdocstrings fills from the docstrings; their titles."""
    (pages / "api").mkdir()
    losses = sorted(path.stem for path in (ROOT / "src/pcdistill/losses").glob("[a-z]*.py"))
    parts = {**API, "Losses": tuple(f"pcdistill.losses.{name}" for name in losses if name not in ("base", "options"))}
    for title, modules in parts.items():
        text = f"# {title}\n\n" + "".join(f"::: {module}\n\n" for module in modules)
        (pages / "api" / f"{slug(title)}.md").write_text(text, encoding="utf-8")
    return list(parts)


def slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def navigation(methods: list[str], api: list[str], moved: dict[str, str]) -> list[object]:
    """mkdocs' nav."""
    groups: list[object] = ["index.md"]
    for title, names in GROUPS.items():
        groups.append({title: [moved.get(name, name) for name in names if (DOCS / name).is_file()]})
    groups.insert(3, {"Methods": ["methods/index.md", *(f"methods/{name}.md" for name in methods)]})
    return [*groups, {"API": [{title: f"api/{slug(title)}.md"} for title in api]}]


def lay(build: Path) -> None:
    """All pages and the configuration, in place of what was there."""
    pages = build / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    notebooks = (path.relative_to(DOCS) for path in DOCS.rglob("*.ipynb"))
    moved = {METHODS: "methods/index.md", **{n.as_posix(): n.with_suffix(".md").as_posix() for n in notebooks}}
    for path in sorted(DOCS.rglob("*.md")):
        name = path.relative_to(DOCS).as_posix()
        if name not in moved:
            (pages / name).parent.mkdir(parents=True, exist_ok=True)
            text = site_links(path.read_text(encoding="utf-8"), f"docs/{name}", name, moved)
            (pages / name).write_text(text, encoding="utf-8")
    lay_notebooks(pages, moved)
    shutil.copytree(DOCS / "images", pages / "images")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (pages / "index.md").write_text(site_links(readme, "README.md", "index.md", moved), encoding="utf-8")
    nav = navigation(lay_methods(pages, moved), lay_api(pages), moved)
    config = f"INHERIT: {posixpath.relpath(ROOT / 'mkdocs.yml', build)}\n"
    config += f"docs_dir: {pages.resolve()}\nsite_dir: {(build / 'site').resolve()}\nnav: {json.dumps(nav)}\n"
    (build / "mkdocs.yml").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    lay(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build")
