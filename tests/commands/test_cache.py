"""The teacher's cache: the same images and logits as live, a killed build continued, and every misfit refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from pcdistill.classification import task as prepare
from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.cli import main
from pcdistill.commands.cache import make_cache
from pcdistill.commands.session import run
from pcdistill.data.loader import Batch
from pcdistill.distillation import cache_store as stored
from pcdistill.distillation import cache_writer as writing
from pcdistill.distillation.cache_replay import CachedBatches, resolve_cache
from pcdistill.distillation.cache_store import CacheInfo, TeacherCache, epoch_file
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError
from pcdistill.losses import kd_loss, pcd_loss
from pcdistill.recipe import load_recipe
from tests.helpers import data_of

BASE = {
    "data.name": "digits",
    "data.limit": 200,
    "data.batch_size": 32,
    "student.name": "cifar/resnet8",
    "student.kwargs": {"widths": [4, 4, 8, 8]},
    "teacher.name": "cifar/resnet8",
    "teacher.epochs": 3,
    "train.epochs": 3,
    "train.device": "cpu",
    "allow": ["weak-teacher"],
}


def recipe(**values):
    return load_recipe(None, values={**BASE, **{key.replace("__", "."): value for key, value in values.items()}})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(recipe(method="none", student__kwargs={}, data__limit=600), out)
    return str(out / "student.safetensors")


@pytest.fixture(scope="module")
def cache(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "kd"
    make_cache(recipe(method="kd", teacher__weights=weights), out, epochs=2)
    return out


def test_each_pass_of_the_teacher_is_a_step_of_its_own(weights, tmp_path, monkeypatch):
    """CUDA graphs write over what the pass before returned, so each begins with a mark; none is on a CPU itself."""
    events = []
    forward = Teacher.forward
    monkeypatch.setattr(Placement, "begin_step", lambda _: events.append("step"))
    monkeypatch.setattr(Teacher, "forward", lambda *args: (events.append("pass"), forward(*args))[1])
    make_cache(recipe(method="kd", teacher__weights=weights), tmp_path / "cache", epochs=2)
    assert events.count("step") == 2 * (200 // 32)
    first = events.index("step")
    assert set(events[:first]) == {"pass"}  # the teacher is evaluated before
    assert events[first:] == ["step", "pass"] * (2 * (200 // 32))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"data__views": 2}, {"data__mixup": 0.4, "data__cutmix": 1.0}], ids=str)
def test_a_replay_has_the_images_to_the_bit_and_the_logits_to_float16(options, weights, tmp_path):
    made = recipe(method="kd", teacher__weights=weights, **options)
    make_cache(made, tmp_path / "cache", epochs=2)
    extra = {key.removeprefix("data__"): value for key, value in options.items()}
    data = data_of("digits", batch_size=32, limit=200, **extra)
    teacher = prepare.build_teacher(made.teacher, data=data)
    replay = CachedBatches(data.train, TeacherCache(tmp_path / "cache"))
    for epoch in (0, 1, 2):  # the third repeats the first
        for live, again in zip(data.train.epoch(epoch % 2), replay.epoch(epoch), strict=True):
            assert torch.equal(live.images, again.images)
            assert torch.equal(live.target, again.target)
            exact = teacher(live.images)
            # Rounded to float16, of logits that batch normalisation folded into convolutions gave.
            torch.testing.assert_close(again.teacher_logits, exact, rtol=2**-11, atol=1e-4)
            assert torch.equal(again.teacher_logits, again.teacher_logits.half().float())
    late = next(iter(replay.epoch(1, start=3)))
    assert torch.equal(late.teacher_logits, list(replay.epoch(1))[3].teacher_logits)


@pytest.mark.slow
def test_processes_get_their_own_rows(weights, tmp_path):
    made = recipe(method="mlkd", teacher__weights=weights)
    make_cache(made, tmp_path / "cache", epochs=1)
    opened = TeacherCache(tmp_path / "cache")
    whole = next(iter(CachedBatches(data_of("digits", batch_size=32, limit=200, views=2).train, opened).epoch(0)))
    for rank in (0, 1):
        data = data_of("digits", batch_size=32, limit=200, views=2, rank=rank, world_size=2)
        part = next(iter(CachedBatches(data.train, opened, rank=rank, world_size=2).epoch(0)))
        rows = [*range(16 * rank, 16 * rank + 16), *range(32 + 16 * rank, 48 + 16 * rank)]
        assert torch.equal(part.images, whole.images[rows])
        assert torch.equal(part.teacher_logits, whole.teacher_logits[rows])


@pytest.mark.slow
def test_training_from_the_cache_runs_no_teacher_and_learns_as_with_it(weights, cache, tmp_path, monkeypatch):
    """What is promised: no teacher in training, a first step as with it, and learning; rounding grows from there."""
    made = recipe(method="pcd", teacher__weights=weights, train__epochs=2)
    replayed = recipe(method="pcd", teacher__weights=weights, train__epochs=2, teacher__cache=str(cache))
    first: dict[str, list[float]] = {"live": [], "cached": []}
    forward, distil = Teacher.forward, ClassificationDistiller.forward
    calls: list[int] = []

    def record(self, batch):
        result = distil(self, batch)
        first["live" if batch.teacher_logits is None else "cached"].append(float(result["loss"].detach()))
        return result

    monkeypatch.setattr(ClassificationDistiller, "forward", record)
    run(made, tmp_path / "live")
    monkeypatch.setattr(Teacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    result = run(replayed, tmp_path / "cached")
    assert 32 not in calls  # evaluations come in other sizes
    assert len(first["live"]) == len(first["cached"]) == 12
    assert first["cached"][0] == pytest.approx(first["live"][0], rel=1e-4)
    losses = _losses(result.out)
    assert losses[1] < losses[0]
    # Another seed of the student replays the same stream.
    other = recipe(method="kd", teacher__weights=weights, teacher__cache=str(cache), train__seed=5, train__epochs=1)
    assert run(other, tmp_path / "five").summary["status"] == "done"


def _losses(out):
    lines = (out / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


def test_a_killed_build_continues_to_the_same_bytes(weights, cache, tmp_path, monkeypatch):
    made, out = recipe(method="kd", teacher__weights=weights), tmp_path / "cache"
    encode, seen = CacheInfo.encode, []

    def die(self, logits):
        seen.append(1)
        if len(seen) == 10:  # in the second epoch of six batches
            raise KeyboardInterrupt
        return encode(self, logits)

    monkeypatch.setattr(CacheInfo, "encode", die)
    monkeypatch.setattr(writing, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make_cache(made, out, epochs=2)
    beside = [json.loads((out / f"epoch-000{epoch}.json").read_text()) for epoch in (0, 1)]
    assert beside[0]["whole"] is not None
    assert beside[1]["whole"] is None
    assert 0 < beside[1]["rows"] < 6 * 32
    with pytest.raises(InputError, match="is not finished: 1 of 2 epochs"):
        TeacherCache(out)
    with open(epoch_file(out, 1), "ab") as file:
        file.write(b"torn")  # what a kill may leave behind the last safe row
    monkeypatch.setattr(CacheInfo, "encode", encode)
    make_cache(made, out, epochs=2)
    for epoch in (0, 1):
        assert epoch_file(out, epoch).read_bytes() == epoch_file(cache, epoch).read_bytes()
    assert {file.name for file in out.iterdir()} == {file.name for file in cache.iterdir()}
    before = (out / "cache.json").read_text()
    make_cache(made, out, epochs=2)  # nothing is left to do
    assert (out / "cache.json").read_text() == before


@pytest.mark.slow
def test_misfits_are_refused(weights, cache, tmp_path):
    def attempt(**values):
        run(
            recipe(**{"method": "kd", "teacher__weights": weights, "teacher__cache": str(cache), **values}),
            tmp_path / "x",
        )

    with pytest.raises(InputError, match=r"from other batches: data, split.*data\.seed \(the cache's is 0\)"):
        attempt(data__seed=3)
    with pytest.raises(InputError, match="from other batches"):
        attempt(data__batch_size=16)
    with pytest.raises(InputError, match="from other batches"):
        attempt(data__augment="none")
    with pytest.raises(InputError, match="1 view.s. of each image, this run has 10 and 2"):
        attempt(method="mlkd")
    with pytest.raises(InputError, match=r"fitnet compares features; teacher\.cache holds logits alone"):
        attempt(method="fitnet")
    with pytest.raises(InputError, match=r"has no cache\.json; `pcdistill cache` makes one"):
        attempt(teacher__cache=str(tmp_path))
    run(recipe(method="none", student__kwargs={}, train__epochs=1), tmp_path / "other")
    with pytest.raises(InputError, match="from another teacher"):
        attempt(teacher__weights=str(tmp_path / "other" / "student.safetensors"))
    with pytest.raises(InputError, match="holds another cache .epochs 2 -> 3"):
        make_cache(recipe(method="kd", teacher__weights=weights), cache, epochs=3)
    with pytest.raises(InputError, match="top_k must be from 1 to 9 for 10 classes, got 10"):
        make_cache(recipe(method="kd", teacher__weights=weights), tmp_path / "k", epochs=1, top_k=10)


def test_a_comparison_takes_the_cache_where_it_fits_and_its_stream_everywhere(cache):
    for method, used in (("pcd", True), ("none", False), ("mlkd", False), ("fitnet", False)):
        fitted = resolve_cache(recipe(method=method, teacher__cache=str(cache), train__seed=4))
        assert (fitted.teacher.cache is not None) == used
        assert fitted.data.seed == 0
    (cache.parent / "for-7").symlink_to(cache)
    own = resolve_cache(recipe(method="pcd", teacher__cache=str(cache.parent / "for-{seed}"), train__seed=7))
    assert own.teacher.cache == str(cache.parent / "for-7")


@pytest.mark.slow
def test_a_cache_for_each_seed_is_taken_by_every_command(cache, weights, tmp_path, monkeypatch, capsys):
    for seed in (0, 1, 2):
        (tmp_path / f"c-{seed}").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    keys = {key: value for key, value in BASE.items() if key != "allow"}
    words = [f"--set={key}={json.dumps(value)}" for key, value in keys.items()]
    teacher = ["--set", f"teacher.weights={weights}", "--allow", "weak-teacher", "--teacher-cache", "c-{seed}"]
    main(["distill", "digits", *words, *teacher, "--method", "kd", "--seed", "1"])
    main(["distill", "digits", *words, *teacher, "--method", "kd", "--seed", "1"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["distill-digits-resnet8-kd-seed1"]
    main(["compare", "digits", *words, *teacher, "--methods", "none,kd", "--seeds", "2", "--jobs", "1"])
    assert (tmp_path / "runs" / "compare-digits-resnet8" / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "c-2").unlink()
    with pytest.raises(SystemExit):
        main(["tune", "digits", *words, *teacher, "--methods", "kd", "--final-seeds", "2"])
    assert "c-2 is not a teacher cache" in capsys.readouterr().err  # before anything is trained


def test_damage_is_noticed(cache, weights, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    file = epoch_file(tmp_path / "cache", 1)
    changed = bytearray(file.read_bytes())
    changed[100] ^= 1
    file.write_bytes(changed)
    opened = TeacherCache(tmp_path / "cache")
    opened.logits(0, torch.arange(4))
    with pytest.raises(InputError, match=r"epoch-0001\.bin is damaged"):
        opened.logits(1, torch.arange(4))
    (tmp_path / "cache" / "cache.json").write_text('{"format": "pcdistill-cache-1"}')
    with pytest.raises(InputError, match=r"cache\.json: info: field required.*; it is damaged"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.slow
def test_any_changed_byte_of_cache_json_is_refused_or_changes_nothing(cache, tmp_path):
    (tmp_path / "cache").mkdir()
    whole, known = (cache / "cache.json").read_bytes(), stored.read_state(cache)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 7)
        for raw in (changed, whole[:place]):
            (tmp_path / "cache" / "cache.json").write_bytes(raw)
            try:
                assert stored.read_state(tmp_path / "cache") == known
            except InputError as error:
                assert "cache.json" in str(error)  # noqa: PT017


def test_logits_that_float16_cannot_hold_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "forward", lambda self, x: torch.full((len(x), 10), 1e5))
    with pytest.raises(InputError, match="NaN or beyond float16's 65504 in epoch 1, batch 1"):
        make_cache(recipe(method="kd", teacher__weights=weights), tmp_path / "cache", epochs=1)


@pytest.mark.parametrize(("offset", "refused"), [(0.0, False), (100.0, False), (2000.0, True), (30000.0, True)])
def test_logits_that_float16_would_blur_are_refused(offset, refused):
    """Against the softmax of what comes back: what passes is within float16's rounding, what is refused is not."""
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)) + offset
    back = info(10).decode(info(10).encode(logits))
    lost = float(kd_loss(back, logits, temperature=1.0))
    assert (writing.coarseness(logits) > 0) == refused == (lost > 1e-3)
    assert writing.coarseness(1000 * (logits - offset) + offset) == 0  # they differ by as much more


def test_blurred_logits_are_refused_with_what_to_take(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "forward", lambda self, x: torch.linspace(9000, 9003, 10).repeat(len(x), 1))
    with pytest.raises(InputError, match=r"change them by up to 3.* in epoch 1, batch 1; take --storage int8$"):
        make_cache(recipe(method="kd", teacher__weights=weights), tmp_path / "a", epochs=1)
    make_cache(recipe(method="kd", teacher__weights=weights), tmp_path / "b", epochs=1, storage="int8")


def info(classes=100, top_k=None, temperature=4.0):
    return CacheInfo("t", "s", 0, 1, 1, 8, classes, 1, top_k, temperature)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_the_largest_logits_and_the_probability_of_the_rest(classes, temperature):
    z = 3 * torch.randn(8, classes, generator=torch.Generator().manual_seed(0))
    form = info(classes, 5, temperature)
    again = form.decode(form.encode(z))
    values, places = z.topk(5, dim=1)
    torch.testing.assert_close(again.gather(1, places), values, rtol=1e-3, atol=1e-3)
    p, q = (x.div(temperature).softmax(1) for x in (z, again))
    torch.testing.assert_close(p.gather(1, places), q.gather(1, places), rtol=2e-3, atol=1e-4)
    rest = again.scatter(1, places, torch.nan)
    assert all(len(row[~row.isnan()].unique()) == 1 for row in rest)


def test_the_error_of_pcd_under_top_k_falls_to_that_of_float16():
    generator = torch.Generator().manual_seed(0)
    z_t, z_s = (3 * torch.randn(64, 100, generator=generator) for _ in range(2))
    exact = pcd_loss(z_s, z_t)
    errors = []
    for k in (10, 50, 99, None):
        form = info(100, k)
        errors.append(float((pcd_loss(z_s, form.decode(form.encode(z_t))) / exact - 1).abs()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_the_fingerprint_follows_all_that_decides_the_logits():
    def teacher(**options):
        torch.manual_seed(0)
        return Teacher(nn.Conv2d(3, 4, 1), **options)

    stats = {"student_stats": ([0.0] * 3, [1.0] * 3), "teacher_stats": ([0.5] * 3, [1.0] * 3)}
    changed = teacher()
    with torch.no_grad():
        changed.model.bias[0] += 1e-6
    found = {
        stored.fingerprint(one)
        for one in (teacher(), changed, teacher(class_map=[1, 0]), teacher(**stats), teacher(image_size=64))
    }
    assert len(found) == 5
    assert stored.fingerprint(teacher()) in found


def test_rows_are_as_small_as_they_can_be():
    assert info(100).row.itemsize == 200
    assert info(100, 10).row.itemsize == 42
    assert info(100_000, 10).row == np.dtype([("values", "<f2", (10,)), ("places", "<u4", (10,)), ("rest", "<f2")])
    assert {field.name for field in dataclasses.fields(CacheInfo)} >= {"teacher", "stream"}
    assert Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1)).teacher_logits is None
