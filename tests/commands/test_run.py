"""A run with its baseline: trained on the same batches, resumed, refused early, and seen by the page."""

import json

import pytest

from pcdistill.commands.run import run_with_baseline
from pcdistill.engine.console import Console
from pcdistill.engine.fingerprint import KEPT
from pcdistill.errors import InputError
from tests.commands.test_pages import pages, small

QUIET = Console(quiet=True)


@pytest.mark.slow
def test_a_baseline_stands_beside_and_decides_the_verdict(tmp_path):
    out = tmp_path / "run"
    text = run_with_baseline(small(), out, console=QUIET)
    assert "trained alone" in text
    both = [json.loads((path / "result.json").read_text()) for path in (out, out / "alone")]
    assert [one["method"] for one in both] == ["kd", "none"]
    with_it, without = (
        {k: v for k, v in one["contents"].items() if k != KEPT and not k.startswith("teacher.")} for one in both
    )
    assert with_it == without  # the same data, and the same student to begin with
    page = (out / "report.html").read_text()
    assert "student alone" in page
    assert "McNemar" in page or "right on the same of the" in page
    before = pages(out)
    assert run_with_baseline(small(), out, console=QUIET) == text
    assert pages(out) == before


def test_a_baseline_that_makes_no_sense_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="this recipe has no teacher"):
        run_with_baseline(small(method="none"), tmp_path, console=QUIET)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "result.json").write_text(json.dumps({"digest": "another", "status": "done"}))
    with pytest.raises(InputError, match="holds the result of another recipe"):
        run_with_baseline(small(), tmp_path, console=QUIET)
    assert not (tmp_path / "recipe.yaml").exists()
