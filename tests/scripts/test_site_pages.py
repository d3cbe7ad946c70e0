"""The site's pages: one for each method, and no link that leads nowhere; built where mkdocs is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import site_pages

from pcdistill.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("site")
    site_pages.lay(build)
    return build


def test_every_documented_method_has_a_page_with_its_equation(built):
    sections = re.findall(r"^## ([\w-]+(?: and [\w-]+)*):", (ROOT / "docs/methods.md").read_text(), flags=re.MULTILINE)
    assert len(sections) > 30
    for names in sections:
        first = names.split(" and ")[0]
        assert first in METHODS
        text = (built / "pages" / "methods" / f"{first}.md").read_text()
        assert text.startswith(f"# {names}: ")
        assert "- **Equation**" in text


def test_every_link_of_every_page_leads_to_a_page(built):
    pages = built / "pages"
    found = 0
    for page in pages.rglob("*.md"):
        text = site_pages.CODE.sub("", page.read_text(encoding="utf-8"))
        for _, target in site_pages.LINK.findall(text):
            if "://" not in target and not target.startswith("#"):
                found += 1
                assert (page.parent / target.partition("#")[0]).is_file(), f"{page.relative_to(pages)}: {target}"
    assert found > 50


def test_every_document_is_in_the_navigation_and_every_page_of_it_is_there(built):
    config = (built / "mkdocs.yml").read_text()
    named = set(re.findall(r'"([\w/-]+\.md)"', config))
    pages = {path.relative_to(built / "pages").as_posix() for path in (built / "pages").rglob("*.md")}
    assert named <= pages
    left_out = {name for name in pages - named if not name.startswith("results/evidence/")}
    assert not left_out


def test_a_notebook_is_a_page_with_what_its_cells_printed(built):
    text = (built / "pages" / "notebooks" / "better-student.md").read_text()
    assert text.startswith("# A better student in five minutes")
    assert "```python\nimport torch" in text
    assert re.search(r"```text\n.*teacher: [\d,]+ parameters", text)
    assert "](own-photographs.md)" in text
    assert "](../questions.md)" in text


def test_links_to_files_that_the_site_lacks_become_their_paths():
    text = "[tests](../tests/test_api.py) and `[no](link.md)` and [KD](methods.md#kd-knowledge) and [out](https://x.y)"
    found = site_pages.site_links(text, "docs/a.md", "deep/b.md", {"methods.md": "methods/index.md"})
    assert found == (
        "tests (`tests/test_api.py`) and `[no](link.md)` and [KD](../methods/index.md) and [out](https://x.y)"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(built):
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(built / "mkdocs.yml")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (built / "site" / "methods" / "pcd.html").is_file()
