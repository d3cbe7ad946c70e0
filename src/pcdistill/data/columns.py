"""What of a table is the image, what the label, and which splits are for what: by its types, else by names."""

import re
from typing import Any

import numpy as np

from pcdistill.errors import InputError, nearest

WORDS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
IMAGES = ("image", "img", "jpg", "png", "webp")  # columns, where their types do not tell
LABELS = ("label", "labels", "cls", "fine_label", "class")
NO_LABEL = -1  # in the hub's test splits whose labels are kept back


def choose_splits(names: list[str], split: str | None, where: str) -> dict[str, str]:
    """What to take for "train", "val" and "test".

    Args:
        names: of the splits that there are.
        split: to train on, with slices and sums as `datasets` writes them; None finds it.
        where: the data, for messages.

    Raises:
        InputError: there is no such split, or none to train on.
    """
    there = f"{where} has the splits {', '.join(names)}"
    if split is None:
        split = next((one for one in WORDS["train"] if one in names), names[0] if len(names) == 1 else None)
        if split is None:
            raise InputError(f"{there}, and no train; name the one to train on: {where}:{names[0]}")
    taken = [re.split(r"\[", one)[0] for one in split.split("+")]
    for one in taken:
        if one not in names:
            raise InputError(f'{there}, and no "{one}"{nearest(one, names)}')
    found = {"train": split}
    for part in ("val", "test"):
        other = next((one for one in WORDS[part] if one in names and one not in taken), None)
        if other is not None:
            found[part] = other
    return found


def image_column(features: Any, where: str) -> str:
    """The one column that holds images.

    Args:
        features: of a table of `datasets`.
        where: the table, for messages.

    Raises:
        InputError: there is none, or several.
    """
    import datasets

    typed: list[str] = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = typed or [name for name in IMAGES if name in features and _holds_bytes(features[name])]
    named = [name for name in found if name in IMAGES]
    if len(found) != 1 and len(named) != 1:
        many = f"several columns of images ({', '.join(found)})" if found else "no column of images"
        raise InputError(f"{where} has {many}; of {', '.join(features)} one must be called {IMAGES[0]}")
    return found[0] if len(found) == 1 else named[0]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column without a type of its own can hold image files: bytes, or bytes with a path."""
    if isinstance(kind, dict):
        return "bytes" in kind and "path" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def label_column(features: Any, where: str) -> str:
    """The column of labels; as of `image_column`."""
    import datasets

    found = [name for name in LABELS if name in features]
    typed: list[str] = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if found or len(typed) == 1:
        return found[0] if found else typed[0]
    raise InputError(f"{where} has no column of labels; of {', '.join(features)} one must be called {LABELS[0]}")


def class_names(features: Any, column: str) -> list[str] | None:
    """Those of a ClassLabel, None of another type."""
    known = getattr(features[column], "names", None)
    return None if known is None else list(known)


def label_values(held: Any, column: str, where: str) -> np.ndarray:
    """Labels [N], int64 or text.

    Args:
        held: a column of Arrow.
        column: its name.
        where: the table, for messages.

    Raises:
        InputError: one is missing, or they are neither whole numbers nor text.
    """
    if held.null_count:
        row = held.is_null().to_numpy().argmax()
        raise InputError(f"{where}: row {row} has no {column}; every image needs one")
    values = np.asarray(held.to_pylist(), dtype=str) if "string" in str(held.type) else held.to_numpy()
    if values.dtype.kind not in "iuU":
        raise InputError(f"{where}: the column {column} must hold whole numbers or text, not {held.type}")
    return values if values.dtype.kind == "U" else values.astype(np.int64)


def held_back(labels: np.ndarray) -> bool:
    """Whether labels [N] are kept back, as of the hub's test splits."""
    return labels.dtype.kind == "i" and bool((labels == NO_LABEL).all())
