"""`pcdistill report`: pages come out of a folder as the runs wrote them."""

import json

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


def test_a_search_is_the_comparison_that_its_record_names(tmp_path, monkeypatch):
    """Not of other trials that were compared before; the strength of one of the two is no axis."""
    places = {f"{name}/seed-{seed}": called for seed in (3, 4) for name, called in (("default", "d"), ("trial-2", "t"))}
    for place in (*places, "trial-1/seed-3"):
        (tmp_path / place).mkdir(parents=True)
        seed = int(place[-1])
        result = {"method": "kd", "seed": seed, "strength": 4.0, "status": "done"}
        (tmp_path / place / "result.json").write_text(json.dumps(result))
        (tmp_path / place / "metrics.csv").write_text("epoch\n1\n")
    (tmp_path / ".pcdistill").write_text("search\n")
    record = {"names": places, "command": "typed", "margin": 2.0, "baseline": "d"}
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    seen = {}

    def write(out, results, curves, command, **options):
        seen.update(results=results, curves=list(curves), command=command, **options)
        return ()

    monkeypatch.setattr("pcdistill.report.write_compare_report", write)
    remake_pages(tmp_path)
    assert seen["results"] == [{"method": called, "seed": int(p[-1]), "status": "done"} for p, called in places.items()]
    assert sorted(seen["curves"]) == [("d", 3), ("d", 4), ("t", 3), ("t", 4)]
    assert seen["drawn"] == {"d": tmp_path / "default/seed-3", "t": tmp_path / "trial-2/seed-3"}
    assert (seen["command"], seen["margin"], seen["baseline"]) == ("typed", 2.0, "d")


def test_a_folder_without_either_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a run nor a comparison"):
        remake_pages(tmp_path)
    (tmp_path / ".pcdistill").write_text("search\n")
    with pytest.raises(InputError, match="holds a search without the record of its comparison"):
        remake_pages(tmp_path)
