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
