"""The demo is a comparison of its own recipe: what the user typed reaches it."""

import pytest

from pcdistill.commands import demo as module
from pcdistill.engine.console import Console


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_every_option_reaches_the_comparison(tmp_path, monkeypatch, task):
    seen = {}

    def compare(recipe, plan, out, *, console, command):
        seen.update(recipe=recipe, plan=plan, out=out, command=command)
        return "table"

    monkeypatch.setattr(module, "compare", compare)
    options = {"overrides": ["train.epochs=3"], "jobs": 2, "threads": 1, "command": "typed"}
    assert module.demo(task, 4, tmp_path, console=Console(quiet=True), **options) == "table"
    assert (seen["plan"].seeds, seen["plan"].jobs, seen["plan"].threads) == (4, 2, 1)
    assert list(seen["plan"].methods) == module.METHODS_OF[task]
    assert (seen["recipe"].task, seen["recipe"].train.epochs) == (task, 3)
    assert (seen["out"], seen["command"]) == (tmp_path, "typed")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "images"), [("classification", 128), ("detection", 16)])
def test_a_short_one_ends_in_a_table_of_all_methods(tmp_path, task, images):
    short = ["train.epochs=1", "teacher.epochs=1", f"data.limit={images}", "train.device=cpu", "allow=[weak-teacher]"]
    how = {"overrides": short, "jobs": 1, "threads": 1, "command": None}
    text = module.demo(task, 1, tmp_path, console=Console(quiet=True), **how)
    for name in ("teacher: ", *module.METHODS_OF[task]):
        assert f"\n| {name}" in text
    assert (tmp_path / "report.html").is_file()
