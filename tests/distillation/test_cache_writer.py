"""A cache by several processes, in shards, under a URL: the same bytes whoever made it, and however often killed."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pcdistill.commands.cache import make_cache
from pcdistill.distillation import cache_store as stored
from pcdistill.distillation import cache_writer as writing
from pcdistill.distillation.cache_files import cache_folder
from pcdistill.distillation.cache_store import CacheInfo, Layout, TeacherCache, read_state
from pcdistill.distillation.cache_writer import share
from pcdistill.errors import InputError
from pcdistill.recipe import load_recipe
from pcdistill.remote import place_of
from tests.processes import PATIENCE, environment, program, wait_until

MODEL = """
import torch
from torch import nn

def big(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
PROGRAM = """
import os, sys, time
from pathlib import Path

Path(sys.argv[2] + ".pids").mkdir(exist_ok=True)
(Path(sys.argv[2] + ".pids") / str(os.getpid())).touch()
from pcdistill.commands.cache import make_cache
from pcdistill.distillation import cache_store, cache_writer
from pcdistill.distillation.cache_store import CacheInfo
from pcdistill.recipe import load_recipe

cache_store.SHARD_ROWS = 64
cache_writer.SAVE_SECONDS = 0.0
pause, encode = float(sys.argv[3]), CacheInfo.encode

def slowly(self, logits):
    time.sleep(pause)
    return encode(self, logits)

CacheInfo.encode = slowly
make_cache(load_recipe(sys.argv[1]), Path(sys.argv[2]), epochs=3)
"""


def recipe(folder: Path, **values):
    (folder / "mine.py").write_text(MODEL)
    return load_recipe(
        None,
        values={
            "data.name": "digits",
            "data.limit": 200,
            "data.batch_size": 32,
            "teacher.name": f"{folder / 'mine.py'}:big",
            "teacher.pretrained": True,
            "method": "kd",
            "train.device": "cpu",
            "allow": ["weak-teacher"],
            **values,
        },
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch(processes: int, folder: Path, out: Path, pause: float = 0.0) -> subprocess.Popen[bytes]:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "recipe.yaml").write_text(recipe(folder).to_yaml())
    run = (str(folder / "program.py"),)
    argv = program(folder / "recipe.yaml", out, pause, processes=processes, run=run)
    return subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said.decode()


@pytest.mark.slow
def test_one_two_and_three_processes_and_a_kill_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 64)
    monkeypatch.setattr(writing, "SAVE_SECONDS", 0.0)
    make_cache(recipe(tmp_path), tmp_path / "one", epochs=3)
    whole = files(tmp_path / "one")
    assert {name for name in whole if name.endswith(".bin")} == {
        f"epoch-000{epoch}-0000{part}.bin" for epoch in range(3) for part in range(3)
    }
    for before, after in ((2, 3), (3, 1)):
        out = tmp_path / f"killed-{before}"
        process = launch(before, tmp_path, out, pause=0.4)
        wait_until(lambda out=out, most=before: sum(path.suffix == ".bin" for path in out.glob("*")) > most, process)
        # The launcher's processes are in sessions of their own.
        for pid in (process.pid, *(int(path.name) for path in Path(f"{out}.pids").iterdir())):
            with suppress(ProcessLookupError):
                while True:  # what a killed process left is only taken away when it is gone
                    os.kill(pid, signal.SIGKILL)
                    time.sleep(0.02)
                    process.poll()
        process.communicate()
        assert set(files(out)) != set(whole)
        if after == 1:
            make_cache(recipe(tmp_path), out, epochs=3)
        else:
            finish(launch(after, tmp_path, out))
        assert files(out) == whole


def stop_after(monkeypatch, count):
    encode, seen = CacheInfo.encode, []

    def die(self, logits):
        seen.append(1)
        if len(seen) > count:
            raise KeyboardInterrupt
        return encode(self, logits)

    monkeypatch.setattr(CacheInfo, "encode", die)
    return lambda: monkeypatch.setattr(CacheInfo, "encode", encode)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_under_a_url_it_has_the_bytes_of_a_local_one_also_after_a_kill(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 64)
    monkeypatch.setattr(writing, "SAVE_SECONDS", 0.0)
    made = recipe(tmp_path)
    make_cache(made, tmp_path / "local", epochs=2, storage=storage)
    local = {name: data for name, data in files(tmp_path / "local").items() if name != ".pcdistill"}
    url = f"memory://caches/{storage}"
    again = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        make_cache(made, url, epochs=2, storage=storage)
    with pytest.raises(InputError, match="is not finished: 0 of 2 epochs"):
        TeacherCache(url)
    again()
    make_cache(made, url, epochs=2, storage=storage)
    folder = cache_folder(url)
    assert {name: folder.system.cat_file(f"{folder.path}/{name}") for name in folder.sizes()} == local
    here, there = TeacherCache(tmp_path / "local"), TeacherCache(url)
    for epoch in range(3):
        for first in (0, 50, 150):  # 50: rows of two files
            places = torch.arange(first, first + 32)
            assert torch.equal(here.logits(epoch, places), there.logits(epoch, places))
    folder.system.pipe_file(f"{folder.path}/epoch-0001-00001.bin", b"other")
    with pytest.raises(InputError, match=r"memory://caches/.*epoch-0001-00001\.bin is damaged"):
        TeacherCache(url).logits(1, torch.arange(64, 96))


def test_a_cache_that_an_earlier_version_left_unfinished_goes_on(tmp_path, monkeypatch):
    made = recipe(tmp_path)
    make_cache(made, tmp_path / "whole", epochs=2)
    whole = files(tmp_path / "whole")
    state = read_state(tmp_path / "whole")
    assert state.format == "pcdistill-cache-1"
    out = tmp_path / "old"
    out.mkdir()
    rows, size = 3 * state.info.rows, state.info.row.itemsize
    (out / "epoch-0000.bin").write_bytes(whole["epoch-0000.bin"])
    (out / "epoch-0001.bin").write_bytes(whole["epoch-0001.bin"][: rows * size] + b"torn")
    tree = stored.unsealed_json(whole["cache.json"].decode(), "")
    tree |= {"checksums": tree["checksums"][:1], "rows": rows}
    (out / "cache.json").write_text(writing.sealed_json(tree, indent=1))
    again = stop_after(monkeypatch, 3)  # no more than the batches that are missing
    make_cache(made, out, epochs=2)
    again()
    assert files(out) == whole


def test_parts_of_another_cache_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 64)
    made = recipe(tmp_path)
    make_cache(made, tmp_path / "whole", epochs=2)
    again = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        make_cache(recipe(tmp_path, **{"data.augment": "none"}), tmp_path / "out", epochs=2)
    again()
    (tmp_path / "out" / "cache.json").unlink()
    make_cache(made, tmp_path / "out", epochs=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_int8_comes_back_within_half_a_step():
    form = CacheInfo("t", "s", 0, 1, 1, 8, 100, 1, storage="int8")
    z = 5 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    z[0] = 3.0  # a row of equal logits
    step = (z.amax(1) - z.amin(1)) / 255
    found = form.decode(form.encode(z))
    assert ((found - z).abs() <= 0.5001 * step[:, None] + 1e-6).all()
    assert torch.equal(found[0], z[0])
    assert form.row.itemsize == 108


def test_where_files_are_cut_follows_from_what_is_stored():
    small = CacheInfo("t", "s", 0, 30, 781, 64, 100, 1)
    assert Layout.of(small).shard is None  # CIFAR-100: a file for each epoch, as before
    large = CacheInfo("t", "s", 0, 2, 5004, 256, 1000, 1)  # ImageNet
    layout = Layout.of(large)
    assert layout.parts == 39
    assert max(layout.size(number) for number in range(len(layout))) <= 2**26
    assert sum(layout.size(number) for number in range(len(layout))) == 2 * 5004 * 256 * 2000
    assert len({layout.name(number) for number in range(len(layout))}) == len(layout) == 78
    wide = CacheInfo("t", "s", 0, 1, 10, 4096, 100_000, 1)  # a batch is more than a file should be
    assert Layout.of(wide).parts == 10


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_are_all_of_the_work_once(processes):
    work = [(number, 0) for number in range(11)]
    assert [one for rank in range(processes) for one in share(work, rank, processes)] == work


def test_urls_are_known_also_as_paths():
    assert place_of(Path("s3://bucket/key")) == "s3://bucket/key"
    assert place_of("memory://x") == "memory://x"
    assert place_of("file:///tmp/x") == Path("/tmp/x")
    assert place_of(Path("file:///tmp/x")) == Path("/tmp/x")
    assert place_of("runs/x") == Path("runs/x")
    with pytest.raises(InputError, match="nosuch://x cannot be opened: Protocol not known"):
        cache_folder("nosuch://x")


def test_a_form_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(InputError, match="storage int8 is of all logits"):
        make_cache(recipe(tmp_path), tmp_path / "x", epochs=1, top_k=3, storage="int8")
    with pytest.raises(InputError, match="storage must be float16 or int8, got int4"):
        make_cache(recipe(tmp_path), tmp_path / "x", epochs=1, storage="int4")
