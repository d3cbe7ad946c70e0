"""Copies of shards that lie elsewhere: fetched once, within what the disk may hold, by any number of processes."""

import os
import threading

import pytest

from pcdistill.data.copies import LIMIT, SUFFIXES, Copies, copies_in
from pcdistill.errors import InputError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def elsewhere(tmp_path):
    """Five files of 1000 bytes, each of its own letter."""
    system = fsspec.filesystem("memory")
    for letter in "abcde":
        system.pipe_file(f"/copies/{letter}.tar", letter.encode() * 1000)
    yield [f"memory://copies/{letter}.tar" for letter in "abcde"]
    system.rm("/copies", recursive=True)


def test_a_shard_is_fetched_once_and_the_oldest_give_way(tmp_path, elsewhere):
    copies = Copies(tmp_path / "c", 3000)
    for i, url in enumerate(elsewhere):
        assert copies.read(url, 10, 5) == b"abcde"[i : i + 1] * 5
        for age, path in enumerate(sorted((tmp_path / "c").glob("*.tar"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (1000 - age, 1000 - age))
        assert len(list((tmp_path / "c").glob("*.tar"))) == min(i + 1, 3)
    fsspec.filesystem("memory").pipe_file("/copies/e.tar", b"z" * 1000)
    assert copies.read(elsewhere[4], 0, 3) == b"eee"
    assert copies.read(elsewhere[0], 0, 3) == b"aaa"


def test_copies_of_every_kind_give_way(tmp_path):
    copies = Copies(tmp_path / "c", 100)
    for i, suffix in enumerate(SUFFIXES * 2):
        with copies.made(str(i), suffix, lambda file: file.write(b"x" * 90)) as file:
            assert len(file.read()) == 90
        (path,) = (tmp_path / "c").glob("*.*")
        assert path.suffix == suffix
        os.utime(path, (1000 + i, 1000 + i))


def test_a_shard_larger_than_the_limit_is_read_all_the_same(tmp_path, elsewhere):
    copies = Copies(tmp_path / "c", 10)
    assert [copies.read(url, 0, 1) for url in elsewhere] == [b"a", b"b", b"c", b"d", b"e"]
    assert len(list((tmp_path / "c").glob("*.tar"))) == 1


def test_many_at_once_get_the_right_bytes(tmp_path, elsewhere):
    copies, found = Copies(tmp_path / "c", 2500), []

    def reads(shift):
        found.extend(
            copies.read(elsewhere[(i + shift) % 5], 500, 2) == b"abcde"[(i + shift) % 5 :][:1] * 2 for i in range(20)
        )

    threads = [threading.Thread(target=reads, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_the_limit_must_be_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv(LIMIT, "2.5")
    assert copies_in(tmp_path).limit == 2.5 * 2**30
    for wrong in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(InputError, match=LIMIT):
            copies_in(tmp_path)
