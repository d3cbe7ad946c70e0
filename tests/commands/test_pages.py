"""`pcdistill report`: pages come out of a folder as the runs wrote them."""

import pytest

from pcdistill.commands.compare import Plan, compare
from pcdistill.commands.pages import remake_pages
from pcdistill.commands.run import run_with_report
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.recipe import make_recipe

QUIET = Console(quiet=True)


def small(**values):
    return make_recipe(
        {
            "method": "kd",
            "teacher": {"name": "cifar/resnet8x4", "epochs": 1, "kwargs": {}},
            "student": {"name": "cifar/resnet8"},
            "data": {"name": "digits", "limit": 128, "batch_size": 64},
            "train": {"epochs": 1, "device": "cpu"},
            "allow": ["weak-teacher"],
            **values,
        }
    )


def pages(folder):
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.name in ("report.html", "README.md", "table.md")
    }


@pytest.mark.slow
def test_a_run_and_a_comparison_get_the_pages_that_they_had(tmp_path):
    run, many = tmp_path / "run", tmp_path / "many"
    run_with_report(small(method="none"), run)
    compare(small(), Plan(["none", "kd"], 2, margin=2.0, jobs=1), many, console=QUIET, command="pcdistill compare")
    for folder in (run, many):
        before = pages(folder)
        for path in remake_pages(folder):
            assert path.is_file()
        assert pages(folder) == before
        (folder / "report.html").unlink()
        remake_pages(folder)
        assert pages(folder) == before
    assert (run / "answers.npz").is_file()


def test_a_folder_without_either_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a run nor a comparison"):
        remake_pages(tmp_path)
    (tmp_path / ".pcdistill").write_text("search\n")
    with pytest.raises(InputError, match="holds a search that has not come to its comparison"):
        remake_pages(tmp_path)
