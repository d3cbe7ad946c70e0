"""What is imported is declared, with bounds; what is optional is named, with its extra, where it is missing."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pcdistill.errors import InputError
from pcdistill.extras import EXTRA_OF, need

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_WORK = {"all", "dev", "docs"}  # no package of theirs is imported by name
HOSTED = {"wandb", "trackio", "mlflow"}  # services of others
IN_CORE_ON_GPUS = {"triton"}  # torch brings it where there is CUDA
PARTS = {"pydantic_core", "markupsafe", "psutil"}  # pydantic, jinja2 and accelerate bring them
DISTRIBUTION = {"mlflow": "mlflow-skinny"}  # where it has another name
# Imported out of a string, by torch or by Accelerate.
BY_NAME = {"tensorboard", "wandb", "trackio", "mlflow", "transformers", "onnxscript"}
SECOND_CHOICE = {"pycocotools"}  # taken where the first is not there


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(requirement: str) -> str:
    return canonical(re.match(r"[\w.-]+", requirement)[0])


def imports() -> dict[str, set[str]]:
    """Packages of others that the source imports: where."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    return {name: where for name, where in found.items() if name not in sys.stdlib_module_names | {"pcdistill"}}


@pytest.mark.slow
def test_every_import_is_declared_in_the_core_or_as_an_extra():
    core = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    brings = packages_distributions()
    found = imports()
    assert len(found) > 15
    for name, where in found.items():
        if name in EXTRA_OF.keys() | IN_CORE_ON_GPUS | SECOND_CHOICE | PARTS:
            continue
        assert {canonical(one) for one in brings[name]} & core, f"{name}, imported by {where}, is not declared"


@pytest.mark.slow
def test_nothing_is_declared_that_is_not_imported():
    brings = packages_distributions()
    used = {canonical(one) for name in imports() for one in brings.get(name, [])}
    assert {distribution(requirement) for requirement in PROJECT["dependencies"]} <= used
    assert EXTRA_OF.keys() <= imports().keys() | BY_NAME


def test_the_extras_are_those_of_the_sentences():
    declared = {name: {distribution(one) for one in wanted} for name, wanted in EXTRAS.items()}
    told: dict[str, set[str]] = {}
    for package, extra in EXTRA_OF.items():
        told.setdefault(extra, set()).add(canonical(DISTRIBUTION.get(package, package)))
    assert {name: found for name, found in declared.items() if name not in FOR_WORK} == told
    assert EXTRAS["all"] == [f"pcdistill[{','.join(sorted(told.keys() - HOSTED))}]"]


@pytest.mark.parametrize(
    "requirement", [*PROJECT["dependencies"], *(one for name in EXTRAS if name != "dev" for one in EXTRAS[name])]
)
def test_every_requirement_has_a_lower_bound(requirement):
    assert ">=" in requirement or requirement.startswith("pcdistill[")


def test_the_classifiers_name_the_pythons_that_are_allowed():
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">=3.{named[0]}"


@pytest.mark.parametrize("package", sorted(EXTRA_OF))
def test_a_missing_package_is_one_sentence_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        need(package, what="this")
    assert str(caught.value) == (
        f"this needs {package}, which is not installed: pip install 'pcdistill[{EXTRA_OF[package]}]'"
    )


def test_what_is_there_is_not_asked_for():
    need("onnx", "onnxruntime", what="ONNX")
