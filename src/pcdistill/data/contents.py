"""Fingerprints of what data sets hold: labels, arrays, files; and, as far as they tell, of a user's loaders.

Arrays are read whole, once. Of files, the names in their order and the sizes count, not what is in them: an image that
was changed and kept its size passes. Of more than `ALL_SIZES` files the sizes of `SOME_SIZES` are looked at, evenly.
A user's data set is known by its length, by its arrays and lists under the usual names, and by its parts.
"""

import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from pcdistill.files import new_digest

ALL_SIZES, SOME_SIZES = 20_000, 1_000
LABELS = ("targets", "labels", "_labels", "y")
IMAGES = ("data", "images", "samples", "imgs", "paths", "files", "x")
NONE = "none"


def fingerprint_of(*parts: Any) -> str:
    """Of tensors and arrays by dtype, shape and bytes; of sequences and mappings by their parts; else as printed."""
    digest = new_digest()
    for part in parts:
        _update(digest, part)
    return str(digest.hexdigest())


def _update(digest: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        part = part.detach().cpu().contiguous()
        digest.update(f"{part.dtype} {list(part.shape)} ".encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, np.ndarray) and part.dtype != object:
        digest.update(f"{part.dtype} {list(part.shape)} ".encode())
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    elif isinstance(part, Mapping):
        _update(digest, [*part.items()])
    elif isinstance(part, list | tuple):
        digest.update(f"{len(part)} ".encode())
        if all(type(one) is int for one in part) and all(abs(one) < 2**63 for one in part):
            _update(digest, np.array(part, np.int64))
        else:
            for one in part:
                _update(digest, one)
    else:
        digest.update(f"{part!r} ".encode())


def files_fingerprint(paths: Sequence[str]) -> str:
    """Of names, relative to the folder that all are in, and sizes; a data set may be moved as a whole."""
    digest = new_digest()
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths]) if paths else ""
    digest.update("\n".join(os.path.relpath(path, common) for path in paths).encode(errors="surrogateescape"))
    step = 1 if len(paths) <= ALL_SIZES else len(paths) // SOME_SIZES
    digest.update(repr([_size(path) for path in paths[::step]]).encode())
    return str(digest.hexdigest())


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:  # what cannot be read is told when it is read
        return None


def dataset_contents(dataset: Any) -> dict[str, str]:
    """ "labels" and "images" of a map-style data set."""
    if isinstance(dataset, TensorDataset):
        return {"labels": fingerprint_of(*dataset.tensors[1:]), "images": fingerprint_of(dataset.tensors[0])}
    if isinstance(dataset, Subset | ConcatDataset):
        parts = [dataset.dataset] if isinstance(dataset, Subset) else dataset.datasets
        order = fingerprint_of(list(dataset.indices)) if isinstance(dataset, Subset) else ""
        found = [dataset_contents(part) for part in parts]
        return {key: fingerprint_of(order, *(one[key] for one in found)) for key in ("labels", "images")}
    size = len(dataset) if isinstance(dataset, Sized) else None
    return {
        "labels": fingerprint_of(size, *_attributes(dataset, LABELS)),
        "images": fingerprint_of(size, *_attributes(dataset, IMAGES)),
    }


def _attributes(dataset: Any, names: Iterable[str]) -> list[Any]:
    """Those that are data: arrays, and lists of numbers or of files."""
    held = getattr(dataset, "__dict__", {})
    found: list[Any] = []
    for name in names:
        value = held.get(name)
        if isinstance(value, Tensor | np.ndarray):
            found.append(value)
        elif isinstance(value, list | tuple) and value and not isinstance(value[0], Tensor | np.ndarray):
            firsts = [one[0] if isinstance(one, tuple) and one else one for one in value]
            if all(isinstance(one, str) for one in firsts):
                found += [files_fingerprint(firsts), [one[1:] for one in value if isinstance(one, tuple)]]
            elif all(isinstance(one, int | float | np.number) for one in firsts):
                found.append([int(one) if isinstance(one, np.integer) else one for one in value])
    return found


def loader_contents(loader: Any) -> dict[str, str]:
    """ "labels", "images" and "batches" of what a user passes as a loader: a DataLoader, or a list of batches."""
    found = {"batches": fingerprint_of(len(loader), getattr(loader, "batch_size", None))}
    if isinstance(loader, list | tuple):
        pairs = [batch for batch in loader if isinstance(batch, list | tuple) and len(batch) >= 2]
        found["labels"] = fingerprint_of(*(pair[1] for pair in pairs))
        found["images"] = fingerprint_of(*(pair[0] for pair in pairs))
    elif getattr(loader, "dataset", None) is not None:
        found |= dataset_contents(loader.dataset)
    return found
