"""Tar shards: which samples they hold, by any pattern, and what is refused of them."""

import gc
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pcdistill.classification.data import build_data
from pcdistill.data import shards as module
from pcdistill.data.copies import Copies, copies_in
from pcdistill.data.decoding import Window
from pcdistill.data.loader import Stream
from pcdistill.data.shards import find_shards, make_index, read_shards
from pcdistill.data.sources import open_source
from pcdistill.data.unlabelled import open_unlabelled
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig
from tests.data.packing import pack, picture, shard, shards

pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))


def refused(name) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(name))
    return str(caught.value)


def whole(width, height):
    return [Window((0, 0, width, height), (width, height), (0, 0, width, height))]


def test_samples_come_in_the_order_of_the_shards_with_their_labels_and_pixels(tmp_path):
    shards(tmp_path / "d", [4, 1, 7])
    shards(tmp_path / "d", [2], "val", 12)
    source = open_source(f"wds:{tmp_path}/d/set-{{train,val}}-*.tar")
    assert source.classes == ["0", "1", "2"]
    assert source.train.labels.tolist() == [n % 3 for n in range(12)]
    assert source.test.labels.tolist() == [0, 1]
    items = source.train.items
    assert [items.content(i) for i in range(12)] == [picture(n) for n in range(12)]
    assert items.name(4).startswith("00004 of ")
    assert items.name(4).endswith("set-train-0001.tar")
    (pixels,) = items.read(5, whole)
    assert pixels[5 % 3].float().mean() > 140
    assert "no test split" in source.origins["test"]


@pytest.mark.parametrize(
    "pattern", ["d", "d/*.tar", "d/set-train-{0000..0002}.tar", "d/set-train-0000.tar::d/set-train-000[12].tar"]
)
def test_patterns_name_the_same_shards(tmp_path, monkeypatch, pattern):
    shards(tmp_path / "d", [3, 3, 3])
    monkeypatch.chdir(tmp_path)
    found = open_source(f"wds:{pattern}")
    assert found.train.labels.tolist() == [n % 3 for n in range(9)]
    assert found.test is None


def test_words_that_all_shards_share_make_no_split(tmp_path):
    shards(tmp_path / "test", [3, 3], "val")
    assert len(open_source(f"wds:{tmp_path}/test").train.labels) == 6


def test_folders_may_name_the_splits(tmp_path):
    for folder, first in (("train", 0), ("valid", 6), ("test", 9)):
        shard(tmp_path / "d" / folder / "0.tar", range(first, first + 3 + 3 * (first == 0)))
    source = open_source(f"wds:{tmp_path}/d")
    assert [len(split.labels) for split in (source.train, source.val, source.test)] == [6, 3, 3]


def test_class_names_are_the_labels_or_those_of_a_file(tmp_path):
    names = {0: "dog", 1: "cat", 2: "007"}
    shard(tmp_path / "a" / "0.tar", range(6), names)
    assert open_source(f"wds:{tmp_path}/a").classes == ["007", "cat", "dog"]
    (tmp_path / "a" / "classes.txt").write_text("dog\ncat\n007\n")
    source = open_source(f"wds:{tmp_path}/a")
    assert source.classes == ["dog", "cat", "007"]
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    shard(tmp_path / "b" / "0.tar", range(6))
    (tmp_path / "b" / "classes.txt").write_text("red\ngreen\nblue\n")
    assert open_source(f"wds:{tmp_path}/b").classes == ["red", "green", "blue"]


def test_json_tells_a_label_too_and_other_files_are_not_looked_at(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    files = []
    for n in range(6):
        files += [(f"x/{n}.PNG", picture(n)), (f"x/{n}.json", json.dumps({"label": n % 3, "note": [n]}).encode())]
        files += [(f"x/{n}.pyd", pickle.dumps(Bomb())), (f"x/{n}.seg.pickle", b"\x80")]
    pack(tmp_path / "0.tar", [("__info__", b"x"), ("README", b"x"), *files])
    source = open_source(f"wds:{tmp_path}/0.tar")
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.train.items.content(3) == picture(3)


CASES = {
    "no label": ([("a.png", picture(0))], "sample a of the shard .*has no label"),
    "no image": ([("a.cls", b"0"), ("a.txt", b"0")], "sample a of the shard .*no image, only cls, txt"),
    "two images": ([("a.png", picture(0)), ("a.jpg", b"0"), ("a.cls", b"0")], "several images"),
    "twice": ([("a.cls", b"0"), ("a.cls", b"1"), ("a.png", b"0")], "holds a.cls twice"),
    "empty label": ([("a.png", picture(0)), ("a.cls", b" ")], ".cls is empty"),
    "bytes": ([("a.png", picture(0)), ("a.cls", b"\xff\xfe")], "no text in UTF-8"),
    "long": ([("a.png", picture(0)), ("a.cls", bytes(2**20 + 1))], "which is no label"),
    "no JSON": ([("a.png", picture(0)), ("a.json", b"{")], "a of the shard .*not valid JSON"),
    "no key": ([("a.png", picture(0)), ("a.json", b'{"size": 3}')], "must have one of label, cls, class"),
    "truth": ([("a.png", picture(0)), ("a.json", b'{"label": true}')], "a whole number or a name"),
    "a list": ([("a.png", picture(0)), ("a.json", b"[1]")], "a whole number or a name"),
    "nothing": ([], "hold no samples"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_that_is_none_is_refused_by_name(tmp_path, case):
    files, sentence = CASES[case]
    pack(tmp_path / "0.tar", files)
    with pytest.raises(InputError, match=sentence):
        open_source(f"wds:{tmp_path}/0.tar")


def test_a_label_out_of_range_is_refused_with_its_sample(tmp_path):
    shard(tmp_path / "d" / "0.tar", range(6))
    (tmp_path / "d" / "classes.txt").write_text("a\nb\n")
    assert "00002 of" in refused(f"wds:{tmp_path}/d")
    assert "must be 0 to 1" in refused(f"wds:{tmp_path}/d")
    shard(tmp_path / "e" / "train.tar", range(6), {0: "a", 1: "b", 2: "c"})
    shard(tmp_path / "e" / "val.tar", range(3), {0: "a", 1: "b", 2: "z"})
    assert 'has the label "z"' in refused(f"wds:{tmp_path}/e")


def test_what_names_no_shards_is_refused(tmp_path):
    shards(tmp_path, [3])
    assert "there is no shard" in refused(f"wds:{tmp_path}/set-train-{{0000..0003}}.tar")
    assert "there is no shard" in refused(f"wds:{tmp_path}/nothing-*.tar")
    assert "twice" in refused(f"wds:{tmp_path}/*.tar::{tmp_path}/set-train-0000.tar")
    assert "is no pattern" in refused(f"wds:{tmp_path}/{{0..")
    assert "WDS_NOWHERE" in refused("wds:${NOWHERE}/0.tar").upper()
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    assert "no.tar cannot be read" in refused(f"wds:{tmp_path}/no.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    assert "not compressed" in refused(f"wds:{tmp_path}/z.tar")
    shards(tmp_path / "f", [3], "val")
    shards(tmp_path / "f", [3], "test")
    assert "no shard is for training" in refused(f"wds:{tmp_path}/f")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path, share):
    content = shard(tmp_path / "w.tar", range(5)).read_bytes()
    # Two blocks of zeros end an archive; Python fills it up to 20.
    with tarfile.open(tmp_path / "w.tar") as archive:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in archive)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: int(share * (end + 1))])
    with pytest.raises(InputError, match=r"cut\.tar"):
        make_index(cut, copies_in(tmp_path))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = shard(tmp_path / "w.tar", range(5))
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"damaged at byte {offset}"):
        make_index(path, copies_in(tmp_path))


def test_an_index_is_made_once_and_anew_when_its_shard_has_changed(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        module, "make_index", lambda place, *rest, **k: made.append(place) or make_index(place, *rest, **k)
    )
    path = shard(tmp_path / "d" / "0.tar", range(6))
    first = open_source(f"wds:{path}")
    again = open_source(f"wds:{path}")
    assert len(made) == 1
    assert first.train.items.fingerprint() == again.train.items.fingerprint()
    assert torch.equal(first.train.labels, again.train.labels)
    shard(path, range(9))
    assert len(open_source(f"wds:{path}").train.labels) == 9
    assert len(made) == 2
    for kept in (tmp_path / "root" / "indexes").glob("*.npz"):
        kept.write_bytes(b"damaged")
    assert len(open_source(f"wds:{path}").train.labels) == 9
    assert len(made) == 3


def test_a_folder_that_cannot_be_written_to_costs_no_more_than_time(tmp_path):
    (tmp_path / "root").write_text("a file where the folder should be")
    shard(tmp_path / "0.tar", range(6))
    assert len(read_shards(f"{tmp_path}/0.tar", tmp_path / "root").parts["train"].items) == 6


def test_fingerprints_follow_the_contents_and_not_the_place(tmp_path):
    shards(tmp_path / "a", [4, 5])
    shards(tmp_path / "b", [4, 5])
    shards(tmp_path / "c", [5, 4])
    prints = [open_source(f"wds:{tmp_path}/{name}").train.items.fingerprint() for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    stream = Stream()
    data = [
        build_data(DataConfig(name=f"wds:{tmp_path}/{name}", image_size=8, val_fraction=0.4), stream) for name in "ab"
    ]
    assert data[0].fingerprint == data[1].fingerprint
    assert data[0].contents == data[1].contents


def test_a_shard_that_shrinks_under_a_run_is_told(tmp_path):
    path = shard(tmp_path / "0.tar", range(6))
    items = open_source(f"wds:{path}").train.items
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match="00005 of .*cut off after the run had begun"):
        items.content(5)


def test_a_damaged_image_is_told_by_key_and_shard(tmp_path):
    path = pack(
        tmp_path / "0.tar", [("a.png", picture(0)[:40]), ("a.cls", b"0"), ("b.png", picture(1)), ("b.cls", b"1")]
    )
    with pytest.raises(InputError, match=r"the image a of .*0\.tar cannot be read"):
        open_source(f"wds:{path}").train.items.read(0, whole)


def test_shards_lie_on_what_fsspec_opens(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    shards(tmp_path, [4, 3])
    system = fsspec.filesystem("memory")
    try:
        for path in tmp_path.glob("*.tar"):
            system.pipe_file(f"/there/{path.name}", path.read_bytes())
        system.pipe_file("/there/classes.txt", b"a\nb\nc\n")
        for pattern in ("memory://there", "memory://there/set-*.tar", "memory://there/set-train-{0000..0001}.tar"):
            source = open_source(f"wds:{pattern}")
            assert source.classes == ["a", "b", "c"]
            assert source.train.labels.tolist() == [n % 3 for n in range(7)]
            assert source.train.items.content(5) == picture(5)
        assert "there is no shard" in refused("wds:memory://there/set-train-0007.tar")
    finally:
        system.rm("/there", recursive=True)


def test_a_remote_shard_that_was_written_anew_is_fetched_anew(tmp_path):
    system = pytest.importorskip("fsspec").filesystem("memory")
    try:
        for sizes, first in (([4], 0), ([4], 9)):
            shards(tmp_path, sizes, first=first)
            system.pipe_file("/anew/0.tar", (tmp_path / "set-train-0000.tar").read_bytes())
            items = open_source("wds:memory://anew/0.tar").train.items
            expected = [Image.open(io.BytesIO(picture(first + n))) for n in range(4)]
            assert [items.read(n, whole)[0].tolist() for n in range(4)] == [
                torch.from_numpy(np.array(one)).permute(2, 0, 1).tolist() for one in expected
            ]
    finally:
        system.rm("/anew", recursive=True)


def test_a_second_start_fetches_no_shard_for_its_index(tmp_path, monkeypatch):
    system = pytest.importorskip("fsspec").filesystem("memory")
    shards(tmp_path, [4, 3])
    try:
        for path in tmp_path.glob("*.tar"):
            system.pipe_file(f"/again/{path.name}", path.read_bytes())
        assert len(open_source("wds:memory://again").train.labels) == 7
        monkeypatch.setattr(Copies, "made", None)  # what fetches
        assert len(open_source("wds:memory://again").train.labels) == 7
        monkeypatch.undo()
        monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
        for path in (tmp_path / "root" / "shards").glob("*.tar"):
            path.unlink()
        open_source("wds:memory://again").train.items.prepare(range(7))
        assert len(list((tmp_path / "root" / "shards").glob("*.tar"))) == 2
    finally:
        system.rm("/again", recursive=True)


def test_unlabelled_shards_need_no_labels(tmp_path):
    pack(tmp_path / "0.tar", [(f"{n}.png", picture(n)) for n in range(5)])
    split = open_unlabelled(f"wds:{tmp_path}/0.tar")
    assert len(split.items) == 5
    assert set(split.labels.tolist()) == {-100}


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wds:x.tar needs webdataset.*pcdistill\[streams\]"):
        find_shards("x.tar")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_samples(tmp_path):
    """Its own reader, as the reference of what a sample is."""
    import webdataset

    shards(tmp_path, [4, 1, 6])
    names = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    expected = [
        (sample["png"], sample["cls"]) for sample in webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    ]
    gc.collect()  # it leaves files open
    found = read_shards(f"{tmp_path}/*.tar", tmp_path / "root").parts["train"]
    assert [(found.items.content(i), found.labels[i].encode()) for i in range(len(found.items))] == expected


def test_a_tar_of_other_formats_is_read(tmp_path):
    name = "deep/" * 40 + "a"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as archive:
            folder = tarfile.TarInfo("deep")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for kind, content in (("png", picture(0)), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        index = make_index(tmp_path / "0.tar", copies_in(tmp_path))
        assert list(index.keys) == [name]
        assert np.array_equal(index.sizes, [len(picture(0))])
