"""What scripts/new_method.py writes, in a copy of the repository: tests that pass, and a method that trains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"logits": "centred-error", "features": "embedding-error", "pyramids": "level-error"}
TRAINS = '''
import torch

from pcdistill.distillation.objective import build_objective, check_losses, method_options
from pcdistill.recipe import load_recipe
from tests.losses import feature_checks, pyramid_checks

FEATURES = {"student": feature_checks.make_features(seed=1), "teacher": feature_checks.make_features(seed=2)}
PYRAMIDS = {"student": pyramid_checks.make_pyramid(2), "teacher": pyramid_checks.make_pyramid(3, seed=1)}


def steps(name, context, student, teacher, inputs):
    """Two values of the term, a step of gradient descent between them."""
    recipe = load_recipe("default", values={"method": name})
    check_losses(recipe, 5)
    (term,) = [term for term in recipe.losses if term.method == name]
    objective = build_objective([term], num_classes=5, context=context).double()
    (loss,) = objective.losses
    values = []
    for _ in range(2):
        value = loss(student, teacher, None)
        values.append(value.item())
        trained = [*inputs, *objective.parameters()]
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
        with torch.no_grad():
            for x, g in zip(trained, gradients, strict=True):
                if g is not None:
                    x -= 0.1 * g
    assert values[1] < values[0], name
    assert next(option.name for option in method_options(name)) == "scale"


def test_each_trains_a_step():
    z_s, z_t = (feature_checks.randn(4, 5, seed=seed) for seed in (0, 1))
    steps("centred-error", {}, z_s.requires_grad_(), z_t, [z_s])
    h = FEATURES["student"].pooled.double().requires_grad_()
    student = FEATURES["student"]._replace(pooled=h)
    teacher = FEATURES["teacher"]._replace(pooled=FEATURES["teacher"].pooled.double())
    steps("embedding-error", FEATURES, student, teacher, [h])
    levels = [x.requires_grad_() for x in PYRAMIDS["student"].levels]
    steps("level-error", PYRAMIDS, PYRAMIDS["student"], PYRAMIDS["teacher"], levels)
'''


def call(root: Path, *argv: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
    for name in ("src", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for kind, name in KINDS.items():
        argv = ("--kind", kind, "--source", "arXiv 2401.00001", "--title", "an error of ours")
        done = call(root, "scripts/new_method.py", name, *argv)
        assert done.returncode == 0, done.stderr
        assert f"tests/losses/test_{name.replace('-', '_')}.py" in done.stdout.splitlines()
    return root


@pytest.mark.slow
def test_what_is_written_passes_its_own_tests_and_trains(copy):
    (copy / "tests" / "test_trains.py").write_text(TRAINS.lstrip())
    files = [f"tests/losses/test_{name.replace('-', '_')}.py" for name in KINDS.values()]
    done = call(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_trains.py", *files)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_what_is_written_is_documented_as_the_documents_demand_and_public(copy):
    wanted = "section or table or public or (meaning and error)"
    files = ("tests/test_docs.py", "tests/losses/test_options.py", "tests/distillation/test_objective.py")
    done = call(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", wanted)
    assert done.returncode == 0, done.stdout[-3000:]
    listed = call(copy, "-m", "pcdistill.cli", "list", "methods", "--search", "error").stdout
    assert listed.count("an error of ours") == 3
    text = (copy / "docs" / "methods.md").read_text()
    order = [text.index(f"## {name}: an error of ours") for name in KINDS.values()]
    assert order == sorted(order)
    assert text.index("# Feature methods") < order[1] < text.index("# Pyramid methods") < order[2]


def test_what_is_written_keeps_the_style(copy):
    pytest.importorskip("ruff")
    for argv in (("check", "."), ("format", "--check", ".")):
        done = call(copy, "-m", "ruff", *argv)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("KD", "--kind", "logits"), "a name must be lower-case words with hyphens"),
        (("kd", "--kind", "logits"), "src/pcdistill/losses/kd.py, .* exists already"),
        (("new-one", "--kind", "logits", "--title", 'a "b"'), "one line without quotes"),
        (("new-one", "--kind", "boxes"), "invalid choice: 'boxes'"),
    ],
)
def test_a_wrong_call_is_refused_and_writes_nothing(copy, argv, says):
    before = (copy / "src/pcdistill/methods.py").read_text()
    done = call(copy, "scripts/new_method.py", *argv)
    assert done.returncode != 0
    assert re.search(says, done.stderr)
    assert (copy / "src/pcdistill/methods.py").read_text() == before
