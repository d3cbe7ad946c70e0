"""The table of docs/scale.md is the one that was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("_bench", None)


def test_the_documents_table_is_the_results(scale):
    rows = json.loads((ROOT / "benchmarks" / "results" / "scale--h100.json").read_text())["rows"]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"{scale.BEGIN}\n{scale.compact(rows)}\n{scale.END}" in page
    assert len(rows) == 27
