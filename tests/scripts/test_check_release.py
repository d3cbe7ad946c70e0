"""What the check of a release finds wrong with an archive, without building one."""

import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from scripts import check_release

ROOT = Path(__file__).parents[2]
FILES = {"src/pcdistill/__init__.py", "src/pcdistill/py.typed", "tests/test_api.py", "examples/a.py", "README.md"}


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    monkeypatch.setattr(check_release, "committed", lambda: FILES)


def wheel(folder: Path, names, text: str = "See docs/a.md.") -> Path:
    path = folder / "pcdistill-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("pcdistill-0.1.0.dist-info/METADATA", text)
    return path


def sdist(folder: Path, names) -> Path:
    path = folder / "pcdistill-0.1.0.tar.gz"
    (folder / "empty").touch()
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(folder / "empty", f"pcdistill-0.1.0/{name}")
    return path


def test_whole_archives_pass(tmp_path):
    check_release.check_wheel(wheel(tmp_path, ["pcdistill/__init__.py", "pcdistill/py.typed"]))
    check_release.check_sdist(sdist(tmp_path, FILES))


@pytest.mark.parametrize(
    ("names", "text", "sentence"),
    [
        (["pcdistill/__init__.py"], "", "lacks ['pcdistill/py.typed']"),
        (["pcdistill/__init__.py", "pcdistill/py.typed", "tests/a.py"], "", "has ['tests/a.py'] beside it"),
        (["pcdistill/__init__.py", "pcdistill/py.typed"], "[a](docs/a.md)", "lead nowhere on a package page"),
    ],
)
def test_a_wheel_that_lacks_has_more_or_links_nowhere_fails(tmp_path, names, text, sentence):
    with pytest.raises(check_release.CheckFailed, match=re.escape(sentence)):
        check_release.check_wheel(wheel(tmp_path, names, text))


@pytest.mark.parametrize("name", ["tests/test_api.py", "examples/a.py", "README.md"])
def test_an_sdist_without_a_committed_file_fails(tmp_path, name):
    with pytest.raises(check_release.CheckFailed, match=f"lacks 1 committed files: {re.escape(name)}"):
        check_release.check_sdist(sdist(tmp_path, FILES - {name}))


def test_an_sdist_needs_no_files_of_the_clone_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(check_release, "committed", lambda: FILES | {".ci/run", "src/pcdistill/a/.gitignore"})
    check_release.check_sdist(sdist(tmp_path, FILES))


def test_the_sentence_of_a_command_that_fails_holds_what_it_printed():
    with pytest.raises(check_release.CheckFailed, match=r"exit code 3, not 0\nsaid"):
        check_release.done("sh", "-c", "echo said; exit 3")


def test_the_versions_are_one():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert f'__version__ = "{version}"' in (ROOT / "src/pcdistill/__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
