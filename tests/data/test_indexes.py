"""Indexes are made once, by whichever process comes first, on one machine or several, and survive kills."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pcdistill.data.indexes import SHARED, kept_indexes, state_of
from pcdistill.errors import InputError

PLACES = [Path(f"{n}.tar") for n in range(12)]
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def kept(folder, made=None, places=PLACES):
    """The indexes, and a list of those that were made."""
    made = [] if made is None else made

    def make(place, state):
        made.append(place)
        return {"name": np.array(str(place)), "state": np.array(state)}

    found = kept_indexes(places, folder, lambda place: f"s{place.stem}", make, ("name", "state"))
    assert [(str(one["name"]), state) for state, one in found] == [(str(p), f"s{p.stem}") for p in places]
    return made


def test_an_index_is_made_once_and_again_where_it_is_damaged(tmp_path):
    assert sorted(kept(tmp_path)) == sorted(PLACES)
    assert kept(tmp_path) == []
    (tmp_path / "s3.npz").write_bytes(b"damaged")
    assert kept(tmp_path) == [PLACES[3]]
    np.savez(tmp_path / "s4.npz", name=np.array("whole, and of something else"))
    assert kept(tmp_path) == [PLACES[4]]
    assert kept(tmp_path, places=[PLACES[1], PLACES[1]]) == []


def test_a_folder_that_cannot_be_written_to_costs_time_alone(tmp_path):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert len(kept(tmp_path / "file")) == len(PLACES)


def _process(folder, notes, together):
    class Notes(list):
        def append(self, place):
            with open(notes, "a") as file:  # one write, of few bytes
                file.write(f"{os.getpid()} {place}\n")
            time.sleep(0.1)

    together.wait()
    kept(folder, Notes())


def test_processes_of_a_machine_share_the_work(tmp_path):
    fork = multiprocessing.get_context("fork")
    given = (tmp_path / "i", tmp_path / "notes", fork.Barrier(3))
    processes = [fork.Process(target=_process, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert sorted(place for _, place in lines) == sorted(map(str, PLACES))
    assert len({pid for pid, _ in lines}) > 1


def _killed(folder):
    class Deadly(list):
        def append(self, place):
            if place == PLACES[5]:
                os._exit(9)

    kept(folder, Deadly())


def test_a_killed_process_leaves_its_index_to_the_next(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert PLACES[5] in kept(tmp_path)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_machines_share_indexes(tmp_path, monkeypatch, kind):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    place = str(tmp_path / "shared") if kind == "folder" else "memory://indexes/of/all"
    monkeypatch.setenv(SHARED, place)
    try:
        assert len(kept(tmp_path / "one")) == len(PLACES)
        assert kept(tmp_path / "two") == []
        if kind == "folder":
            (tmp_path / "shared" / "s2.npz").write_bytes(b"damaged")
        else:
            system.pipe_file("/indexes/of/all/s2.npz", b"damaged")
        assert kept(tmp_path / "three") == [PLACES[2]]
        assert kept(tmp_path / "four") == []
    finally:
        if kind == "url":
            system.rm("/indexes", recursive=True)


def test_a_place_for_all_machines_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(SHARED, str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"{SHARED}: indexes cannot be kept in"):
        kept(tmp_path / "one")
    monkeypatch.setenv(SHARED, "nosuch://x")
    with pytest.raises(InputError, match="Protocol not known"):
        kept(tmp_path / "two")


def test_the_state_changes_with_the_file_and_the_facts(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    first = state_of(path, 1)
    assert first == state_of(path, 1) != state_of(path, 2)
    path.write_bytes(b"12")
    assert state_of(path, 1) != first
    with pytest.raises(OSError, match="No such file"):
        state_of(tmp_path / "b")
