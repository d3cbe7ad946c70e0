"""Thousands of wrong inputs: each is refused in a sentence, or works."""

import io
import json
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill import cli, models
from pcdistill.data.decoding import Picture
from pcdistill.distillation.cache_store import TeacherCache
from pcdistill.distillation.objective import build_loss
from pcdistill.engine.checkpoint import load_checkpoint, save_checkpoint
from pcdistill.errors import InputError
from pcdistill.losses.base import needs_of
from pcdistill.methods import METHODS
from pcdistill.recipe import load_recipe, make_recipe
from tests import test_types as types
from tests.faults import Tally, annotations, files, recipes, throw
from tests.faults.counts import record, share

pytestmark = pytest.mark.faults
LOGITS = sorted(name for name, method in METHODS.items() if method.kind == "logits")
READERS = {
    "coco": (annotations.write_coco, annotations.coco_files, "coco"),
    "voc": (annotations.write_voc, annotations.voc_files, "voc"),
    "yolo": (annotations.write_yolo, annotations.yolo_files, "yolo"),
    "yolo labels": (annotations.write_yolo_labels, annotations.yolo_labels, "yolo"),
}


def keep(part: str, tally: Tally) -> None:
    record(part, Counter(tally.counts))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_recipe_files(tmp_path):
    file = tmp_path / "mine.yaml"

    def check(text, tally):
        file.write_text(text, encoding="utf-8", errors="replace")
        types.accepted(lambda: load_recipe(file), tally)

    keep("recipe files", throw(recipes.documents(), check, share(1200)))


def test_recipes_from_python():
    def check(tree, tally):
        types.accepted(lambda: make_recipe(tree), tally)

    keep("recipes from Python", throw(recipes.trees(), check, share(1000)))


def test_overrides():
    def check(texts, tally):
        types.accepted(lambda: load_recipe("digits", texts), tally)

    keep("overrides", throw(recipes.overrides(), check, share(1500)))


def test_command_lines(capsys):
    def check(argv, tally):
        code = 0
        try:
            cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr().err
        assert code in (0, 2), told
        assert bool(code) == any(not line.startswith("warning: ") for line in told.splitlines()), told
        assert "Traceback" not in told
        tally.counts.update(("tried", "refused" if code else "worked"))

    keep("command lines", throw(recipes.command_lines(), check, share(300)))


@pytest.mark.parametrize("kind", READERS)
def test_annotation_files(kind, tmp_path):
    write, damaged, reader = READERS[kind]
    place, file = write(tmp_path)

    def check(raw, tally):
        file.write_bytes(raw)
        found = annotations.outcome(place, reader)
        tally.counts.update(("tried", "worked" if found == "read" else "refused"))

    keep(f"annotations, {kind}", throw(damaged(), check, share(500)))


def test_array_files(tmp_path):
    file = tmp_path / "mine.npz"

    def check(raw, tally):
        file.write_bytes(raw)
        tally.judge(lambda: next(iter(types.data_of(str(file), batch_size=4).train.epoch(0))))

    with types.limited_memory(4 << 30):
        keep("array files", throw(files.archives(), check, share(600)))


def bytes_of(raw: bytes) -> st.SearchStrategy[bytes]:
    """Damaged bytes of a file: cut off, flipped bits, pieces of others."""
    return st.composite(lambda draw: files.damaged(draw, raw))() | st.binary(max_size=60)


def test_bytes_of_checkpoints(tmp_path):
    """A damaged checkpoint is refused, or is the same state: nothing else is let in."""
    file, state = tmp_path / "last.pt", {"w": torch.arange(6.0), "epoch": 3, "digest": "x"}
    save_checkpoint(file, state)

    def check(raw, tally):
        file.write_bytes(raw)
        found = tally.judge(lambda: load_checkpoint(file))
        assert found is None or (found["epoch"] == 3 and torch.equal(found["w"], state["w"]))

    keep("bytes of checkpoints", throw(bytes_of(file.read_bytes()), check, share(1500)))


def test_bytes_of_weights(tmp_path):
    """A damaged weights file is refused, or holds the same weights."""
    file, model = tmp_path / "w.safetensors", torch.nn.Linear(3, 2)
    models.save_weights(model, file, {"classes": ["a", "b"]})
    wanted = model.weight.detach().clone()

    def check(raw, tally):
        file.write_bytes(raw)
        if tally.judge(lambda: models.load_weights(model, file)) is not None:
            assert torch.equal(model.weight, wanted)

    keep("bytes of weights", throw(bytes_of(file.read_bytes()), check, share(1500)))


def test_cache_json(tmp_path):
    def check(raw, tally):
        (tmp_path / "cache.json").write_bytes(raw)
        tally.judge(lambda: TeacherCache(tmp_path))

    keep("cache.json", throw(files.json_texts(types.CACHE), check, share(500)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_bytes_of_images(form, tmp_path):
    out, file = io.BytesIO(), tmp_path / "image"
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(out, form)

    def check(raw, tally):
        file.write_bytes(raw)
        tally.judge(lambda: Picture(file).decode())

    keep(f"images, {form}", throw(bytes_of(out.getvalue()), check, share(300)))


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_every_loss(name):
    """Finite logits of any scale have a finite value and gradient; others a sentence, or a value that is not finite."""
    numbers = st.tuples(st.integers(0, 5), st.integers(-3, 4), st.sampled_from((None, float("nan"), float("inf"))))

    def check(drawn, tally):
        n, scale, wrong, seed = drawn
        torch.manual_seed(0)
        loss = build_loss(name, {}, context={"num_classes": 10})  # anew: some have a memory
        rows, g = n * needs_of(loss).views, torch.Generator().manual_seed(seed)
        student, teacher = (10.0**scale * torch.randn(rows, 10, generator=g) for _ in range(2))
        if wrong is not None and rows:
            student[0, 0] = wrong
        target = torch.randint(10, (rows,), generator=g)
        tally.counts["tried"] += 1
        try:
            value = loss(student.requires_grad_(), teacher, target)
            value.backward()
        except (InputError, ValueError) as error:
            said = str(error)
            if not said or "\n" in said:
                raise
            tally.counts["refused"] += 1
            return
        if wrong is None or not rows:
            assert value.isfinite()
            assert student.grad is None or student.grad.isfinite().all()
        tally.counts["worked"] += 1

    inputs = st.builds(lambda first, seed: (*first, seed), numbers, st.integers(0, 10**6))
    keep(f"logits of {name}", throw(inputs, check, share(60)))


def test_results_of_other_types(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps({"method": "kd"}))

    def check(raw, tally):
        (tmp_path / "result.json").write_bytes(raw)
        tally.judge(lambda: types.read_summary(tmp_path / "result.json"))

    keep("result.json", throw(files.json_texts(types.RESULT), check, share(800)))


@pytest.mark.parametrize(
    ("part", "at", "count"),
    [
        ("files of a run's folder", types.at_a_runs_folder, 300),
        ("bench.json", types.at_what_bench_measured, 600),
        ("metadata of weights", types.at_metadata_of_weights, 400),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_pages_are_made_of(part, at, count, tmp_path):
    keep(part, at(share(count), tmp_path))
