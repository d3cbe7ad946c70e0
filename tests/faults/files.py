"""Files with mistakes in them: arrays, and JSON of other types than the program writes."""

import copy
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np
from hypothesis import strategies as st

SIZES = (0, 1, 2, 3, 8, 40)
IMAGES = ("uint8", "int16", "float32", "float64", "bool", ">u2", "O", "U3", "S3", "M8[s]", "c16", "V2")
LABELS = ("int64", "uint8", "int32", ">i4", "uint64", "float32", "bool", "O", "U3", "M8[s]")


@st.composite
def archives(draw: Any) -> bytes:
    """What may stand under the name of an .npz file: sound arrays, or wrong ones, or no archive at all."""
    arrays = draw(array_sets())
    out = io.BytesIO()
    kind = draw(st.sampled_from(("npz", "npz", "npz", "compressed", "npy", "members", "lie", "text")))
    if kind in ("npz", "compressed"):
        (np.savez if kind == "npz" else np.savez_compressed)(out, **arrays)
    elif kind == "npy":
        np.save(out, next(iter(arrays.values())), allow_pickle=True)
    elif kind == "members":  # an archive whose members are no arrays
        with zipfile.ZipFile(out, "w") as archive:
            for name in arrays:
                archive.writestr(draw(st.sampled_from((name, f"{name}.npy", f"../{name}.npy"))), draw(st.binary()))
    elif kind == "lie":  # a header that tells of more than there is
        with zipfile.ZipFile(out, "w") as archive:
            for name in arrays:
                shape = draw(st.sampled_from(("(10,)", "(1000000000000, 8, 8)", "(-1, 8)", "(2, 'a')", "10**30", "()")))
                head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
                raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
                archive.writestr(f"{name}.npy", raw + b"\0" * 10)
    else:
        out.write(draw(st.binary() | st.text().map(str.encode)))
    return damaged(draw, out.getvalue()) if draw(st.integers(0, 3)) == 0 else out.getvalue()


def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes cut off, or with some of them changed."""
    raw = bytearray(data)
    if not raw or draw(st.booleans()):
        return bytes(raw[: draw(st.integers(0, len(raw)))])
    for place in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(raw)


@st.composite
def array_sets(draw: Any) -> dict[str, np.ndarray]:
    """Arrays by the names that a data set has, right or with some mistakes."""
    wrong = draw(st.integers(0, 3)) > 0
    found: dict[str, np.ndarray] = {}
    parts = draw(st.sampled_from((("train",), ("train", "test"), ("train", "val", "test"), ("test",))))
    for part in parts:
        count = draw(st.sampled_from(SIZES)) if wrong else 40
        found[f"x_{part}"] = images(draw, count, wrong=wrong)
        found[f"y_{part}"] = labels(draw, draw(st.sampled_from((count, count, count, count + 1))), wrong=wrong)
    if draw(st.booleans()):
        names = draw(st.sampled_from((["a", "b"], ["a", "a"], ["a"], [1, 2], [0.5, 1], [None, {}], [b"a", b"\xff"])))
        found["classes"] = np.array(names)
    for name in list(found):
        if wrong and draw(st.integers(0, 9)) == 0:
            found[draw(st.sampled_from(("x", "X_train", "arr_0", "x_val")))] = found.pop(name)
    return found


def images(draw: Any, count: int, *, wrong: bool) -> np.ndarray:
    """[N, 8, 8] uint8, or of another type, shape or order."""
    if not wrong or draw(st.booleans()):
        return np.arange(count * 64, dtype=np.uint8).reshape(count, 8, 8)
    shape = draw(
        st.sampled_from(((count, 8, 8, 3), (count, 3, 8, 8), (count, 8), (count,), (), (count, 0, 8), (count, 4, 9)))
    )
    made = np.zeros(shape, draw(st.sampled_from(IMAGES)))
    return np.asfortranarray(made) if draw(st.booleans()) else made


def labels(draw: Any, count: int, *, wrong: bool) -> np.ndarray:
    """[N] int64 below 2, or of another type, range or shape."""
    right = np.arange(count) % 2
    if not wrong or draw(st.booleans()):
        return right
    kind = draw(st.sampled_from(LABELS))
    made = right.astype(kind) if kind != "M8[s]" else right.astype("int64").astype(kind)
    if made.size and made.dtype.kind in "iuf":
        made[draw(st.integers(0, made.size - 1))] = draw(
            st.sampled_from((0, 3, 127, 10**9, -1, -(10**9), 2**40, 2**63 - 1)).filter(
                lambda value: made.dtype.kind == "f" or np.iinfo(made.dtype).min <= value <= np.iinfo(made.dtype).max
            )
        )
    return made.reshape(draw(st.sampled_from(((-1,), (-1, 1), (1, -1)))))


def json_values() -> st.SearchStrategy[Any]:
    """Values of every type that JSON has."""
    leaves = st.sampled_from(
        (None, True, False, 0, 1, -1, 2.5, 10**9, 10**30, float("nan"), float("inf"), "", "kd", "x" * 500, [], {})
    )
    return st.recursive(leaves, lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below))


@st.composite
def mutated(draw: Any, tree: Any) -> Any:
    """The tree with one to three values replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = tree
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], dict | list) and at[place] and draw(st.booleans()):
                at = at[place]
                continue
            if draw(st.integers(0, 4)):
                at[place] = draw(json_values())
            else:
                del at[place]
            break
    return tree


def json_texts(tree: Any) -> st.SearchStrategy[bytes]:
    """A JSON file as the program writes it, with mistakes; or another file."""
    odd = (
        b"",
        b"{",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b'{"format": 1}',
        b"9" * 9999,
    )
    whole = mutated(tree).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        whole, whole, st.sampled_from(odd), st.composite(lambda draw: damaged(draw, json.dumps(tree).encode()))()
    )
