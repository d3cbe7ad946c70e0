"""Rules of CONTRIBUTING.md that a machine can hold: size of functions, paths in documents, places of tests, prose."""

import ast
import re
from pathlib import Path

import pytest

from tests.prose import length, sentences

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "pcdistill"
TESTS = ROOT / "tests"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in DOCUMENTS[2:] if path.name != "errors.md"),
)

MOST_LINES, MOST_PARAMETERS, MOST_WORDS = 60, 8, 25
LARGER = {  # function: why it may be larger
    "ops/pcd_triton.py:_kernel": "Triton compiles one function, and a call of it is one launch",
    "ops/pcd_tiled.py:_bracket": "as _kernel",
    "ops/pcd_tiled.py:_select": "as _kernel",
    "ops/pcd_tiled.py:_segments": "what a kernel calls takes what the kernel has",
    "ops/pcd_tiled.py:_moments": "as _kernel",
    "ops/pcd_tiled.py:_combine": "as _kernel",
    "ops/pcd_tiled.py:_slope": "as _kernel",
    "ops/pcd_tiled.py:_add": "Triton reduces nine sums at once with a function of eighteen numbers",
}
MANY_PARAMETERS = {"api.py:distill": "every option is a keyword of the one public call"}
LONG_SENTENCES = {"docs/methods.md": 47}  # that are left; the number may only fall
OF_THE_WHOLE = {
    "test_beyond",
    "test_clusters",
    "test_code_blocks",
    "test_digests",
    "test_docs",
    "test_house",
    "test_imports",
    "test_notebooks",
    "test_strength",
    "test_types",
}  # of no single file


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def name_of(path: Path, function: ast.FunctionDef) -> str:
    return f"{path.relative_to(SRC).as_posix()}:{function.name}"


def body_lines(function: ast.FunctionDef) -> int:
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


FOUND = [(name_of(path, function), function) for path in sorted(SRC.rglob("*.py")) for function in functions(path)]


def test_functions_fit_a_screen_and_take_few_parameters():
    assert len(FOUND) > 500
    long = {name for name, function in FOUND if body_lines(function) > MOST_LINES}
    many = {name for name, function in FOUND if parameters(function) > MOST_PARAMETERS}
    many = {name for name in many if not name.startswith("losses/")}
    assert long | many == {*LARGER, *MANY_PARAMETERS}
    assert not long & set(MANY_PARAMETERS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_of_a_document_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    rooms = r"(?:src|tests|docs|benchmarks|scripts|\.ci)/"
    for name in re.findall(rf"`({rooms}[\w./-]*)`", text):
        if not re.search("NAME|my_method", name):  # stand for a file that the reader will write
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_architecture_begins_with_what_a_reader_wants():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE)[0] == "I want to ..."
    assert len(re.findall(r"`src/pcdistill/[\w./]+`", text)) > 30


def test_tests_stand_where_the_file_stands_that_they_test():
    for path in sorted(TESTS.rglob("test_*.py")):
        room, file = path.parent.relative_to(TESTS), path.stem.removeprefix("test_")
        if (path.stem in OF_THE_WHOLE and path.parent == TESTS) or room.parts == ("faults",):
            continue
        parent = ROOT / room if room.parts[:1] in (("benchmarks",), ("scripts",)) else SRC / room
        assert any((parent / f"{name}.py").exists() for name in (file, f"_{file}")), path.relative_to(ROOT)


def test_tests_take_public_names_alone():
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcdistill"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.relative_to(ROOT)} imports {private}"


@pytest.mark.parametrize("name", PROSE)
def test_sentences_are_short(name):
    long = [s for s in sentences((ROOT / name).read_text(encoding="utf-8")) if length(s) > MOST_WORDS]
    assert len(long) <= LONG_SENTENCES.get(name, 0), "\n".join(f"{length(s)} words: {s}" for s in long)
