"""The documents name what is there: a section and tests for every method, and examples that run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pcdistill import cli
from pcdistill.methods import METHODS
from tests.processes import PATIENCE

DOCS = Path(__file__).parents[1] / "docs"


def sections() -> dict[str, str]:
    """Method name -> its section of methods.md; a heading may name several methods."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", (DOCS / "methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        names, _, _ = section.partition(":")
        for name in names.split(" and "):
            found[name.strip()] = section
    return found


@pytest.mark.parametrize("name", sorted(name for name, m in METHODS.items() if m.kind != "pyramids" and name != "ce"))
def test_every_method_has_a_section_with_its_equation_source_and_defaults(name):
    section = sections()[name]
    assert "- **Equation**" in section
    assert "- **Defaults**" in section
    arxiv = re.search(r"\d{4}\.\d{5}", METHODS[name].source)
    if arxiv:
        assert arxiv.group() in section


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"detector"}))
def test_every_method_has_tests_of_its_own_in_the_table(name):
    rows = [row for row in (DOCS / "methods.md").read_text(encoding="utf-8").splitlines() if row.startswith("| [")]
    (row,) = [row for row in rows if name in re.match(r"\| \[(.*?)\]", row)[1].split(", ")]
    assert row.count(";") >= 3, "tests that show so little are no tests"
    for link in re.findall(r"\]\((.*?)\)", row):
        assert (DOCS / link).is_file(), link


def test_the_table_of_tests_is_up_to_date():
    script = DOCS.parent / "scripts" / "methods_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_is_no_section_without_a_method():
    assert set(sections()) <= set(METHODS)


@pytest.mark.slow
def test_a_loss_from_outside_the_package_trains_by_its_path(tmp_path):
    text = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    (tmp_path / "my_losses.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1))
    (tmp_path / "recipe.yaml").write_text(
        "data: {name: digits, limit: 256}\nteacher: {name: cifar/resnet8, epochs: 2}\n"
        "train: {epochs: 1, device: cpu}\nmethod: mine\n" + re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
    )
    argv = [sys.executable, "-m", "pcdistill.cli", "distill", "recipe.yaml", "--out", "out", "--allow", "weak-teacher"]
    env = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    header = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[0]
    assert "train/SquaredError" in header
    wrong = (tmp_path / "recipe.yaml").read_text().replace("scale: 0.5", "scal: 0.5")
    (tmp_path / "wrong.yaml").write_text(wrong)
    argv = ["wrong.yaml" if part == "recipe.yaml" else "other" if part == "out" else part for part in argv]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert 'has no option "scal"; did you mean "scale"' in done.stderr
