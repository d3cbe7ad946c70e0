"""Damaged annotation files of small detection sets, as hypothesis strategies; a set is read or refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np

from pcdistill.detection.formats import read_set
from pcdistill.errors import InputError
from tests.detection import exports

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-300, 1e308, -1e308),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        " ",
        "0",
        "1",
        "-1",
        "1e999",
        "nan",
        "x",
        "x" * 5000,
        "\0",
        "\ud800",
    ),
    *(
        "x" * 5000,
        "../../x",
        "/dev/zero",
        "C:\\x",
        "a\nb",
        "%00",
        "&x;",
        [],
        {},
        [[]],
        [None],
        [1, 2],
        {"id": 1},
        [[0, 0, 1]],
    ),
]
TOKENS = [
    *(
        "",
        "0",
        "-1",
        "1",
        "99",
        "1e308",
        "-1e308",
        "nan",
        "inf",
        "1e999",
        "9" * 5000,
        "x",
        "\0",
        "\ufeff",
        "\ud7ff",
        "é",
    ),
    *("<", ">", "&x;", "]]>", "</annotation>", "<object/>", "<!DOCTYPE a [<!ENTITY x 'y'>]>", "<?xml version='1.0'?>"),
    *(
        ":",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "%",
        "\t",
        "\n",
        "\n\n",
        "  ",
        "'",
        '"',
    ),
    *("../", "/dev/zero", "~", "null", "\\"),
]


def trees(tree: Any, most: int = 3) -> st.SearchStrategy[Any]:
    """A JSON tree with one to `most` values replaced, removed, repeated or wrapped."""

    @st.composite
    def mutate(draw: Callable) -> Any:
        changed = copy.deepcopy(tree)
        for _ in range(draw(st.integers(1, most))):
            places = list(_places(changed))
            if not places:
                break
            holder, key = draw(st.sampled_from(places))
            how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "wrap"]))
            if how == "remove":
                del holder[key]
            elif how == "repeat" and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif how == "wrap":
                holder[key] = [holder[key]]
            else:
                holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        return changed

    return mutate()


def _places(tree: Any) -> Any:
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def texts(text: str, most: int = 3) -> st.SearchStrategy[bytes]:
    """A text with pieces replaced by hostile tokens, cut out or repeated, or with bytes changed or cut off."""

    @st.composite
    def mutate(draw: Callable) -> bytes:
        changed = text
        for _ in range(draw(st.integers(0, most))):
            start = draw(st.integers(0, len(changed)))
            end = min(len(changed), start + draw(st.integers(0, 12)))
            piece = draw(st.one_of(st.sampled_from(TOKENS), st.just(changed[start:end] * 2), st.text(max_size=5)))
            changed = changed[:start] + piece + changed[end:]
        data = bytearray(changed.encode("utf-8", "surrogatepass"))
        if data and draw(st.integers(0, 3)) == 0:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        if draw(st.integers(0, 5)) == 0:
            data = data[: draw(st.integers(0, len(data)))]
        return bytes(data)

    return mutate()


def coco_files() -> st.SearchStrategy[bytes]:
    """Damaged train.json of `write_coco`: values of the tree, or the text itself."""
    tree = exports.coco_tree(exports.SETS["train"])
    as_bytes = trees(tree).map(lambda changed: json.dumps(changed).encode())
    return st.one_of(as_bytes, as_bytes, texts(json.dumps(tree)))


def voc_files() -> st.SearchStrategy[bytes]:
    """Damaged Annotations/one.xml of `write_voc`."""
    return texts(exports.xml_text(exports.SETS["train"]["one"], filename="one.jpg", difficult=0))


def yolo_files() -> st.SearchStrategy[bytes]:
    """Damaged data.yaml of `write_yolo`."""
    return texts("path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")


def yolo_labels() -> st.SearchStrategy[bytes]:
    """Damaged labels/train/one.txt of `write_yolo`."""
    return texts("\n".join(exports.yolo_line(box) for box in exports.SETS["train"]["one"]))


def write_coco(root: Path) -> tuple[Path, Path]:
    """A sound COCO set; what to read, and the file to damage."""
    exports.pictures(root / "images", exports.SETS["train"])
    exports.write_json(root / "train.json", exports.coco_tree(exports.SETS["train"]))
    return root, root / "train.json"


def write_voc(root: Path) -> tuple[Path, Path]:
    exports.voc_official(root)
    return root, root / "VOCdevkit" / "VOC2007" / "Annotations" / "one.xml"


def write_yolo(root: Path) -> tuple[Path, Path]:
    for split in ("train", "val"):
        exports.pictures(root / "images" / split, exports.SETS[split])
        exports.write_labels(root / "labels" / split, exports.SETS[split])
    return root / "data.yaml", root / "data.yaml"


def write_yolo_labels(root: Path) -> tuple[Path, Path]:
    place, file = write_yolo(root)
    file.write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return place, root / "labels" / "train" / "one.txt"


def outcome(place: Path, kind: str) -> str:
    """ "read" or "refused"; an AssertionError if what was read is not sound or the sentence is none."""
    try:
        found = read_set(place, kind)
    except InputError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 1000
        sentence.encode()
        return "refused"
    assert found.classes
    assert len(found.classes) == len(found.category_ids) == len(set(found.classes))
    for note in found.notes:
        note.text.encode()
    for records in found.splits.values():
        assert records
        for record in records:
            edges = np.array([record.width, record.height] * 2)
            assert record.boxes.shape == (len(record.labels), 4)
            assert np.isfinite(record.boxes).all()
            assert ((record.boxes >= 0) & (record.boxes <= edges)).all()
            assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
            assert ((record.labels >= 1) & (record.labels <= len(found.classes))).all()
            assert ((record.area > 0) & (record.area <= record.width * record.height)).all()
            assert np.isin(record.iscrowd, (0, 1)).all()
            assert -(2**63) <= record.image_id < 2**63
    return "read"
