"""The notebooks of docs/notebooks run in an empty folder, and hold what their cells printed when they last did."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

from pcdistill import cli

SOURCE = Path(cli.__file__).parents[1]
NOTEBOOKS = sorted((SOURCE.parent / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 20_000
SHORTER = {"epochs=12": "epochs=4", "range(4)": "range(2)", "--epochs 6": "--epochs 2"}  # of a test


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_shows_what_it_printed(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"/(tmp|home|root|work)/", text), "a path of the machine that made it"
    nbformat.validate(nbformat.reads(text, as_version=4))
    cells = code_cells(path)
    assert all(cell.execution_count for cell in cells)
    assert sum(bool(cell.outputs) for cell in cells) >= 3
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the kernel's client; the notebook runs in another process
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    commands = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join((commands, os.environ["PATH"])))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell, stored in zip((c for c in notebook.cells if c.cell_type == "code"), code_cells(path), strict=True):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        assert "Traceback" not in printed
        assert not re.search(r"^pcdistill: ", printed, re.MULTILINE), printed  # how a command's error begins
        assert bool(cell.outputs) == bool(stored.outputs), cell.source
