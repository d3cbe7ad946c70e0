"""Types before use: whatever stands in a recipe, a command line, an array file or a result is refused or works."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from pcdistill import cli, models
from pcdistill.commands.folder import read_recipe, settle_contents
from pcdistill.commands.run import result_text
from pcdistill.data.preprocess import Preprocess
from pcdistill.data.unlabelled import open_unlabelled
from pcdistill.distillation.cache_store import TeacherCache
from pcdistill.distillation.objective import check_losses, method_options
from pcdistill.engine.loop import with_times
from pcdistill.errors import InputError
from pcdistill.methods import METHODS
from pcdistill.models.heads import with_head
from pcdistill.plain import parse_yaml
from pcdistill.recipe import load_recipe, make_recipe
from pcdistill.report import (
    comparison_text,
    read_metrics,
    read_speed,
    read_summary,
    speed_cells,
    speed_notes,
    write_model_card,
    write_run_report,
)
from pcdistill.report.production import production_code
from tests.faults import Tally, files, recipes, throw
from tests.helpers import data_of

QUICK = 60  # inputs; tests/faults throws many more
CACHE = {
    "format": "pcdistill-cache-1",
    "info": {"teacher": "a", "stream": "b", "seed": 0, "epochs": 2, "batches": 3, "rows": 4, "classes": 10, "views": 1},
    "checksums": ["a" * 32, "b" * 32],
    "rows": 0,
}
VALUES = {"top1": 50.0, "top5": 90.0, "loss": 1.5}
RESULT = {
    **{"status": "done", "task": "classification", "method": "kd", "seed": 0, "data": "digits", "metric": "top1"},
    **{"digest": "0" * 12, "kept": "best", "epochs": 2, "seconds": 3.0, "images_per_second": 9.0, "notes": []},
    "teacher": {"name": "cifar/resnet20", "parameters": 10, "macs": 20, "val": VALUES, "test": VALUES},
    "student": {"name": "cifar/resnet8", "parameters": 5, "macs": 9},
    "best": {"epoch": 1, "val": VALUES, "test": VALUES},
    "last": {"epoch": 2, "val": VALUES, "test": VALUES},
    "contents": {"student.start": "a" * 32, "student.kept": "b" * 32},
}
BENCH = {
    "image_size": 32,
    "batch_size": 4,
    "machine": {"cpu": "x"},
    "left_out": ["the teacher"],
    "rows": [
        {"who": "student", "model": "m", "program": "torch", "p50_ms": 1.0, "p95_ms": 2.0, "images_per_second": 9.0}
    ],
}
METADATA = {
    **{"classes": ["a", "b"], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "image_size": 32, "short_side": None},
    **{"category_ids": [1, 7], "head": {"method": "simkd", "stage": "x", "in_channels": 4, "out_channels": 4}},
}


def works(recipe) -> None:
    """What every accepted recipe can do."""
    recipe.digest()
    assert make_recipe(parse_yaml(recipe.to_yaml(), "text")) == recipe
    if recipe.task == "classification":
        check_losses(recipe, 10)


def accepted(make, tally: Tally) -> None:
    recipe = tally.judge(make)
    if recipe is not None:
        tally.judge(lambda: works(recipe))


@pytest.mark.slow
def test_recipe_files(tmp_path):
    file = tmp_path / "mine.yaml"

    def check(text, tally):
        file.write_text(text, encoding="utf-8", errors="replace")
        accepted(lambda: load_recipe(file), tally)

    tally = throw(recipes.documents(), check, QUICK)
    assert tally.counts["refused"] > QUICK / 3


@pytest.mark.parametrize("text", recipes.NASTY)
def test_texts_that_are_no_plain_tree(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    Tally().judge(lambda: load_recipe(tmp_path / "mine.yaml"))


@pytest.mark.slow
def test_trees_from_python():
    throw(recipes.trees(), lambda tree, tally: accepted(lambda: make_recipe(tree), tally), QUICK)


@pytest.mark.slow
def test_overrides():
    def check(texts, tally):
        accepted(lambda: load_recipe("digits", texts), tally)

    throw(recipes.overrides(), check, QUICK)


@pytest.mark.slow
def test_command_lines(capsys):
    def check(argv, tally):
        code = None
        try:
            cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr().err
        assert code in (None, 2), told
        said = [line for line in told.splitlines() if not line.startswith("warning: ")]
        assert (code is None) == (not said), told
        assert "Traceback" not in told
        tally.counts.update(("tried", "worked" if code is None else "refused"))

    throw(recipes.command_lines(), check, QUICK)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_options_of_a_loss_are_of_their_types(method):
    tally = Tally()
    for option in method_options(method):
        for value in (0, -1, 1e300, True, None, "", "2e0", [], [1], ["a"], {}, {"a": 1}):
            tree = {"losses": [{"method": "ce"}, {"method": method, option.name: value}]}
            recipe = tally.judge(lambda tree=tree: make_recipe(tree))
            if recipe is not None and METHODS[method].kind != "pyramids":
                tally.judge(lambda recipe=recipe: check_losses(recipe, 10))
            if recipe is not None and (value == {} or (option.type == "number" and value is True)):
                with pytest.raises(InputError, match=option.name):
                    check_losses(recipe, 10)


@contextmanager
def limited_memory(size: int):
    """No more address space than so many bytes above what is in use now."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_array_files(tmp_path):
    file = tmp_path / "mine.npz"

    def read():
        data = data_of(str(file), batch_size=4)
        return next(iter(data.train.epoch(0)))

    def check(raw, tally):
        file.write_bytes(raw)
        tally.judge(read)
        tally.judge(lambda: open_unlabelled(str(file)))

    with limited_memory(4 << 30):
        throw(files.archives(), check, QUICK)


@pytest.mark.slow
def test_cache_json(tmp_path):
    def check(raw, tally):
        (tmp_path / "cache.json").write_bytes(raw)
        tally.judge(lambda: TeacherCache(tmp_path))

    throw(files.json_texts(CACHE), check, QUICK)


def at_a_runs_folder(count: int, tmp_path) -> Tally:
    """Every file of it holds something else; the pages are made of whatever can be read."""

    def text():
        summary = read_summary(tmp_path / "result.json")
        comparison_text([summary])
        if summary["status"] == "done":
            result_text(summary, tmp_path)

    def check(raw, tally):
        for name in ("result.json", "environment.json", "recipe.yaml", "metrics.csv", "times.json", "config.json"):
            (tmp_path / name).write_bytes(raw)
        for call in (write_run_report, write_model_card, read_recipe):
            tally.judge(lambda call=call: call(tmp_path))
        tally.judge(text)
        tally.judge(lambda: settle_contents(tmp_path, {"student.start": "a" * 32}))
        read_metrics(tmp_path / "metrics.csv")
        with_times([{"epoch": 1}], tmp_path)

    return throw(files.json_texts(RESULT), check, count)


@pytest.mark.slow
def test_a_runs_folder(tmp_path):
    at_a_runs_folder(QUICK, tmp_path)


def at_what_bench_measured(count: int, tmp_path) -> Tally:
    def check(raw, tally):
        (tmp_path / "bench.json").write_bytes(raw)
        found = tally.judge(lambda: read_speed(tmp_path))
        if found is not None:
            speed_cells(found)
            speed_notes(found)

    tally = throw(files.json_texts(BENCH), check, count)
    assert tally.counts["worked"] == tally.counts["tried"]  # a page is made without it
    return tally


@pytest.mark.slow
def test_what_bench_measured(tmp_path):
    at_what_bench_measured(QUICK, tmp_path)


def at_metadata_of_weights(count: int, tmp_path) -> Tally:
    """Whatever stands in a weights file, also in one that carries no checksum."""
    file = tmp_path / "student.safetensors"

    def use():
        found = models.read_metadata(file)
        models.read_classes(file)
        models.read_stats(file, 3)
        made = Preprocess.from_metadata(found)
        if made is not None and made.size < 100 and len(made.mean) in (1, 3):
            made(torch.zeros(3, 8, 8, dtype=torch.uint8))
        for name in ("timm/resnet18", "cifar/resnet8"):
            production_code(name, found, {})
        with_head(torch.nn.Identity(), file)

    def check(raw, tally):
        text = raw.decode(errors="replace")
        save_file({"w": torch.zeros(1)}, file, metadata={"pcdistill": text, "classes": text, "mean": "0"})
        tally.judge(use)
        write_model_card(tmp_path)

    for name, content in (("result.json", RESULT), ("recipe.yaml", {"method": "kd"})):
        (tmp_path / name).write_text(json.dumps(content))
    return throw(files.json_texts(METADATA), check, count)


@pytest.mark.slow
def test_metadata_of_weights(tmp_path):
    at_metadata_of_weights(QUICK, tmp_path)


def test_the_sound_files_are_accepted(tmp_path):
    (tmp_path / "cache.json").write_text(json.dumps(CACHE))
    assert TeacherCache(tmp_path).info.classes == 10
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert read_summary(tmp_path / "result.json") == RESULT
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    assert read_speed(tmp_path) == BENCH
    save_file({}, tmp_path / "w.safetensors", metadata={"pcdistill": json.dumps(METADATA)})
    assert models.read_metadata(tmp_path / "w.safetensors") == METADATA
    save_file({}, tmp_path / "w.safetensors", metadata={"classes": "theirs", "made": "elsewhere"})
    assert models.read_metadata(tmp_path / "w.safetensors") == {"made": "elsewhere"}
