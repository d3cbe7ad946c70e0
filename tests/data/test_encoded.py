"""Shards and tables as batches: split over ranks and workers without doubling or loss, and resumed to the same."""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate, islice

import pytest
import torch

from pcdistill import cli
from pcdistill.classification.data import build_data
from pcdistill.data.loader import Stream
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig
from tests.data.packing import grouped, parquet, picture, shards

UNEVEN = (5, 1, 9, 2, 7, 1, 16)  # 41 images
CONFIG = DataConfig(image_size=8, batch_size=12, eval_batch_size=5, val_fraction=0.2, workers=0)


def wds(folder):
    pytest.importorskip("webdataset")
    first = shards(folder / "d", UNEVEN)
    shards(folder / "d", (4, 3), "val", first)
    return f"wds:{folder}/d"


def memory(folder):
    fsspec = pytest.importorskip("fsspec")
    name = wds(folder)
    system = fsspec.filesystem("memory")
    for path in (folder / "d").glob("*.tar"):
        system.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    return name.replace(f"{folder}/d", f"memory://{str(folder)[1:]}")


def hf(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.disable_progress_bars()
    for split, numbers in (("train", range(41)), ("test", range(41, 48))):
        content = {"image": [picture(n) for n in numbers], "label": [n % 3 for n in numbers]}
        (folder / "p").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(content, features=features).to_parquet(folder / "p" / f"{split}.parquet")
    datasets.enable_progress_bars()
    return f"hf:{folder}/p"


def parquets(folder):
    """Under a URL, in uneven row groups of two files."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("datasets")
    parquet(folder / "q" / "train-00000-of-00002.parquet", grouped(UNEVEN[:4]))
    parquet(folder / "q" / "train-00001-of-00002.parquet", grouped(UNEVEN[4:], 17))
    parquet(folder / "q" / "test-00000-of-00001.parquet", grouped((3, 4), 41))
    system = fsspec.filesystem("memory")
    for path in (folder / "q").glob("*.parquet"):
        system.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    return f"hf:memory://{str(folder)[1:]}"


KINDS = {"wds": wds, "wds elsewhere": memory, "hf": hf, "hf elsewhere": parquets}


@pytest.fixture(params=KINDS)
def name(request, tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr("pcdistill.data.parquet.FEWEST", 1)
    if request.param == "hf":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return KINDS[request.param](tmp_path)


def built(name, rank=0, world=1, workers=0, seed=3):
    return build_data(replace(CONFIG, name=name, workers=workers), Stream(seed=seed, rank=rank, world_size=world))


def told(batches, epoch=0, start=0):
    return [(batch.index.tolist(), batch.target.tolist(), batch.images) for batch in batches.epoch(epoch, start)]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_an_epoch_is_split_over_ranks_and_workers_without_doubling_or_loss(name, workers):
    whole = built(name)
    count = whole.train.num_samples
    steps = count // CONFIG.batch_size
    assert (count, len(whole.train)) == (33, steps)
    expected = told(whole.train, 1)
    for world in (1, 2, 3, 4):
        ranks = [built(name, rank, world, workers) for rank in range(world)]
        shares = [told(data.train, 1) for data in ranks]
        assert {len(share) for share in shares} == {steps}
        for step in range(steps):
            index = [i for share in shares for i in share[step][0]]
            assert index == expected[step][0]
            assert torch.equal(torch.cat([share[step][2] for share in shares]), expected[step][2])
        taken = [i for share in shares for index, _, _ in share for i in index]
        assert len(set(taken)) == len(taken) == steps * CONFIG.batch_size
        for split, size in (("train_eval", 33), ("val", 8), ("test", 7)):
            seen = [i for data in ranks for index, _, _ in told(getattr(data, split)) for i in index]
            assert sorted(seen) == list(range(size)), split


def test_an_epoch_goes_on_in_the_middle_with_the_same_samples(name):
    data = built(name)
    epochs = [told(data.train, epoch) for epoch in range(3)]
    for epoch, whole in enumerate(epochs):
        for start in range(len(whole) + 1):
            assert same(told(built(name).train, epoch, start), whole[start:])
    assert epochs[0][0][0] != epochs[1][0][0]
    assert told(built(name, seed=4).train)[0][0] != epochs[0][0][0]


def test_labels_and_pixels_belong_together(name):
    data = built(name)
    for batch in data.train_eval.epoch(0):
        brightest = batch.images.mean((2, 3)) * torch.tensor(data.std) + torch.tensor(data.mean)
        assert torch.equal(brightest.argmax(1), batch.target)


def test_the_teacher_cache_knows_another_set_or_order(name, tmp_path):
    first, again = built(name), built(name)
    assert first.train.signature == again.train.signature
    assert built(name, seed=4).train.signature != first.train.signature
    assert first.contents == again.contents


@pytest.mark.parametrize("kind", ["wds elsewhere", "hf elsewhere"])
def test_what_lies_elsewhere_is_taken_window_by_window(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr("pcdistill.data.loader.WINDOW", 2)
    monkeypatch.setattr("pcdistill.data.parquet.FEWEST", 1)
    data = built(KINDS[kind](tmp_path))
    order = data.train._order(0)
    assert sorted(order.tolist()) == list(range(33))
    groups = [int(data.train.groups[i]) for i in order]
    firsts = list(dict.fromkeys(groups))
    for number, group in enumerate(firsts):
        places = [i for i, one in enumerate(groups) if one == group]
        beside = firsts[number - number % 2 : number - number % 2 + 2]
        assert set(groups[places[0] : places[-1] + 1]) <= set(beside)
    assert firsts != sorted(firsts)
    if kind == "wds elsewhere":
        local = built(f"wds:{tmp_path}/d")
        assert local.fingerprint == data.fingerprint
        assert local.contents["data.train.order"] != data.contents["data.train.order"]


def test_a_broken_sample_ends_the_epoch_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    data = built(wds(tmp_path))
    for path in (tmp_path / "d").glob("*train*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=r"the image 000\d\d of .*\.tar cannot be read"):
        next(islice(data.train.epoch(0), 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wds", "hf", "hf elsewhere"])
def test_commands_take_them_from_check_to_student(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = KINDS[kind](tmp_path)
    cli.main(["check-data", data, "--samples", "3"])
    said = capsys.readouterr().out
    assert "3 classes" in said
    assert "37 images" in said
    models = [
        "--teacher",
        "cifar/resnet8",
        "--teacher-epochs",
        "1",
        "--student",
        "cifar/resnet8",
        "--allow",
        "weak-teacher",
    ]
    small = ["--epochs", "1", "--set", "data.image_size=8", "--batch-size", "12", "--workers", "0", "--device", "cpu"]
    cli.main(["distill", "--data", data, *models, *small, "--quiet", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "student.safetensors").is_file()
    allow = ["--allow", "weak-teacher"]
    weights = ["--teacher-weights", str(tmp_path / "run" / "teacher" / "teacher.safetensors")]
    cli.main(
        ["cache", "--data", data, *models[:2], *weights, *allow, *small, "--quiet", "--out", str(tmp_path / "cached")]
    )
    cached = ["--teacher-cache", str(tmp_path / "cached"), *models[4:]]
    cli.main(["distill", "--data", data, *cached, *small, "--quiet", "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "student.safetensors").is_file()


@pytest.mark.parametrize("kind", ["wds elsewhere", "hf elsewhere"])
def test_unlabelled_images_elsewhere_are_taken_window_by_window_too(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr("pcdistill.data.loader.WINDOW", 2)
    monkeypatch.setattr("pcdistill.data.parquet.FEWEST", 1)
    name = KINDS[kind](tmp_path)
    config = replace(CONFIG, name=name, unlabelled=name, unlabelled_batch=41, batch_size=10)
    if kind == "wds elsewhere":  # the record tells another order
        local = replace(config, unlabelled=f"wds:{tmp_path}/d")
        key = "data.unlabelled.images"
        assert build_data(local, Stream()).contents[key] != build_data(config, Stream()).contents[key]
    ends, firsts = list(accumulate(UNEVEN)), []
    for batch in build_data(config, Stream(seed=3)).train.epoch(0):  # each step is a pass
        index = (batch.index[10:] - 33).tolist()
        assert sorted(index) == list(range(41))
        groups = [bisect_right(ends, sample) for sample in index]
        order = list(dict.fromkeys(groups))
        for number, group in enumerate(order):
            places = [i for i, one in enumerate(groups) if one == group]
            beside = order[number - number % 2 : number - number % 2 + 2]
            assert set(groups[places[0] : places[-1] + 1]) <= set(beside)
        firsts.append(order)
    assert len(firsts) == 3
    assert firsts[0] != firsts[1]
