"""Files that are whole or not there: writes that fail, parts that are left, checksums that find any change."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pcdistill.errors import InputError
from pcdistill.files import atomic_file, atomic_write, clear_parts, home_followed, sealed_json, unsealed_json


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, call):
    atomic_write(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_interrupted_block_leaves_nothing(tmp_path):
    def interrupted():
        with atomic_file(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_back_is_found_when_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    import builtins

    true_open = builtins.open

    class Losing:
        """A disk that turns a byte over."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(bytes([data[0] ^ 1]) + data[1:])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opening(path, mode="r", *more, **options):
        file = true_open(path, mode, *more, **options)
        return Losing(file) if "w" in mode else file

    monkeypatch.setattr(builtins, "open", opening)
    with pytest.raises(OSError, match="cannot be read back"):
        atomic_write(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        atomic_write(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


def test_parts_of_dead_writers_are_cleared_and_nothing_else(tmp_path):
    dead = dead_pid()
    ours = [f".last.pt.{dead}.part", f".student.safetensors.{dead}.tmp", f".result.json.{os.getpid()}.part"]
    others = [f".last.pt.{os.getppid()}.part", "last.pt.part", f"last.pt.{dead}.part", ".hidden", f".last.{dead}.part2"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.{dead}.part").mkdir()
    (tmp_path / f".link.{dead}.part").symlink_to(tmp_path / ".hidden")
    cleared = clear_parts(tmp_path)
    assert sorted(path.name for path in cleared) == sorted(ours)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*others, f".folder.{dead}.part", f".link.{dead}.part"}
    assert clear_parts(tmp_path / "none") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MAPPING = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "checksum"), JSON, max_size=4).filter(
    lambda one: not any(isinstance(value, str) and value.startswith("blake2b:") for value in one.values())
)


@pytest.mark.slow
@given(MAPPING)
def test_sealed_json_comes_back_and_stays_json(content):
    text = sealed_json(content)
    assert unsealed_json(text, "f") == json.loads(json.dumps(content))
    assert json.loads(text).keys() == {*content, "checksum"}
    assert unsealed_json(json.dumps(content), "f") == json.loads(json.dumps(content))  # an older one, without


@pytest.mark.slow
@given(MAPPING, st.data())
def test_any_changed_byte_of_sealed_json_is_found_or_changes_nothing(content, data):
    raw = bytearray(sealed_json(content).encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 6))
    cut = data.draw(st.sampled_from([len(raw), place]))
    try:
        found = unsealed_json(bytes(raw[:cut]).decode(errors="replace"), "f")
    except InputError:
        return
    assert found == json.loads(json.dumps(content))


@pytest.mark.parametrize("name", ["~.", "~nobody-is-called-so/a", "~a\0b", "~\udcff", "a/~"])
def test_no_home_is_made_up(name):
    assert home_followed(name) == home_followed(Path(name)) == Path(name)


def test_a_home_is_followed(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/ä b")
    assert home_followed("~/photos") == Path("/homes/ä b/photos")
