"""Checkpoints that say whether they are whole: any byte changed or cut, states that could not be loaded again."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pcdistill.engine.checkpoint import load_checkpoint, save_checkpoint
from pcdistill.errors import InputError


def state_of(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "student": {"w": torch.randn(7, 5, generator=g), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "epoch": 3,
        "history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": float("inf")}],
        "digest": "abc",
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sealed") / "last.pt"
    save_checkpoint(path, state_of())
    return path.read_bytes()


@pytest.fixture(scope="module")
def unsealed(tmp_path_factory) -> bytes:
    """As older versions wrote it."""
    path = tmp_path_factory.mktemp("unsealed") / "last.pt"
    torch.save({"format": "pcdistill-1", **state_of()}, path)
    return path.read_bytes()


def test_a_checkpoint_comes_back_and_torch_reads_it_too(tmp_path):
    checksum = save_checkpoint(tmp_path / "last.pt", state_of())
    found = load_checkpoint(tmp_path / "last.pt")
    assert found.pop("checksum") == checksum
    assert found.pop("format") == "pcdistill-1"
    assert same(found, state_of())
    assert same(torch.load(tmp_path / "last.pt", weights_only=True), {"format": "pcdistill-1", **state_of()})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_any_changed_byte_is_refused(sealed, tmp_path):
    path = tmp_path / "last.pt"
    places = [*range(0, len(sealed), 11), *range(len(sealed) - 80, len(sealed))]
    for place in places:
        changed = bytearray(sealed)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(InputError, match="is damaged"):
            load_checkpoint(path)
    assert len(places) > 200


@pytest.mark.parametrize("before", ["", "all of it", "a part"])
@pytest.mark.parametrize("form", ["sealed", "unsealed"])
def test_what_is_not_the_file_alone_is_refused(form, before, request, tmp_path):
    """A zip library finds the archive in a longer file, and one whose comment was cut off."""
    path, written = tmp_path / "last.pt", request.getfixturevalue(form)
    for more in (b"\0", b"\0" * 30, written[:9], written[-22:] + b"\0"):
        path.write_bytes(written + more)
        with pytest.raises(InputError, match=r"damaged|was not written by"):
            load_checkpoint(path)
    ends = {len(written)} if form == "unsealed" else range(len(written) - 60, len(written) + 1)
    for end in ends:
        path.write_bytes({"": b"", "all of it": written, "a part": written[:7]}[before] + written[:end])
        if end == len(written) and not before:
            load_checkpoint(path)
            continue
        with pytest.raises(InputError, match=r"damaged|was not written by"):
            load_checkpoint(path)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_damage_is_refused(sealed, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "last.pt"
    first = data.draw(st.integers(0, len(sealed) - 1))
    last = data.draw(st.integers(first + 1, len(sealed)))
    kind = data.draw(st.sampled_from(["cut", "zeros", "lost", "twice", "long"]))
    damaged = {
        "cut": sealed[:first],
        "zeros": sealed[:first] + bytes(last - first) + sealed[last:],
        "lost": sealed[:first] + sealed[last:],
        "twice": sealed[:last] + sealed[first:],
        "long": sealed + sealed[first:last],
    }[kind]
    if damaged == sealed:
        return
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged|was not written by"):
        load_checkpoint(path)


@pytest.mark.slow
def test_damage_of_one_that_an_older_version_wrote_is_refused_or_changes_nothing(unsealed, tmp_path):
    path, refused = tmp_path / "last.pt", 0
    path.write_bytes(unsealed)
    assert load_checkpoint(path)["checksum"] is None
    # Every 7th place, and every bit of the directory at the end: torch believes some of it without a check.
    places = [(place, place % 8) for place in range(0, len(unsealed), 7)]
    places += [(place, bit) for place in range(unsealed.rfind(b"PK\x01\x02") - 250, len(unsealed)) for bit in (0, 4)]
    for place, bit in places:
        changed = bytearray(unsealed)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            found = load_checkpoint(path)
        except InputError:
            refused += 1
        else:
            assert same(found, {"format": "pcdistill-1", **state_of(), "checksum": None})
    assert refused > 100


def test_equal_states_give_equal_bytes_whatever_they_share(tmp_path):
    name = "a-name-that-is-shared"
    other = "".join(["a-name-", "that-is-", "shared"])
    one = [{name: 1.0, "x": name}, {name: 2.0, "x": name}]
    two = [{name: 1.0, "x": name}, {other: 2.0, "x": other}]
    assert name is not other
    save_checkpoint(tmp_path / "a.pt", {**state_of(), "rows": one})
    save_checkpoint(tmp_path / "b.pt", {**state_of(), "rows": two})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


class Own:
    """What weights_only does not load."""


def test_a_state_that_could_not_be_loaded_is_told_when_it_is_written(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of())
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"could not be loaded again: .*test_checkpoint\.Own"):
        save_checkpoint(path, {**state_of(), "objective": {"_extra_state": Own()}})
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_gives_back_other_bytes_is_found_before_the_old_file_goes(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of())
    before = path.read_bytes()

    from pcdistill.engine import checkpoint

    class Turning(checkpoint._Hashing):
        def write(self, data):
            turned = bytes(data)
            if len(turned) == 7 * 5 * 4:  # the weight
                turned = bytes([turned[0] ^ 1]) + turned[1:]
            self.digest.update(data)
            return self.file.write(turned)

    monkeypatch.setattr(checkpoint, "_Hashing", Turning)
    with pytest.raises(OSError, match="cannot be read back"):
        save_checkpoint(path, state_of(1))
    assert path.read_bytes() == before
