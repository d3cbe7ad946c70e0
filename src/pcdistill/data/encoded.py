"""Image files that lie inside other files: members of tar shards, cells of tables."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pcdistill.data.decoding import Plan, read_windows
from pcdistill.data.files import Items
from pcdistill.errors import InputError
from pcdistill.files import new_digest


class EncodedItems(Items, ABC):
    """Images of which each is the bytes of an image file, found by number.

    Attributes:
        kind: what holds them, in words.
        looked_at: images, evenly spread, whose bytes go into the fingerprint.
        groups: [N] int64, ascending: what images are read well together; None where any order is as good.
    """

    kind: str
    looked_at: int = 0
    groups: np.ndarray | None = None
    _fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The bytes of image i.

        Raises:
            InputError: they cannot be read.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """What messages call image i: its key, and the file that it is in."""

    @abstractmethod
    def layout(self) -> str:
        """Changes with which images there are, and in which order; not with where the files lie."""

    def read(self, i: int, plan: Plan) -> list[Tensor]:
        return read_windows(self.name(i), plan, self.content(i))

    def fingerprint(self) -> str:
        """Of the layout, and of the bytes of `looked_at` images."""
        if self._fingerprint is None:
            digest = new_digest()
            digest.update(f"{len(self)} {self.layout()}".encode())
            for i in range(0, len(self) if self.looked_at else 0, max(1, len(self) // max(1, self.looked_at))):
                content = self.content(i)
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
            self._fingerprint = str(digest.hexdigest())
        return self._fingerprint


@dataclass(frozen=True)
class EncodedPart:
    """The images of one split.

    Attributes:
        items: the images.
        labels: [N], int64 class numbers or text; text of digits alone is numbers.
        origin: where the split comes from, in words.
    """

    items: EncodedItems
    labels: np.ndarray
    origin: str


@dataclass(frozen=True)
class EncodedSet:
    """Splits by name ("train", "val", "test"), and the class names where the data tell them."""

    parts: dict[str, EncodedPart]
    classes: list[str] | None = None


def as_numbers(labels: np.ndarray) -> np.ndarray | None:
    """Labels [N] as int64, where they are numbers or all look like some; None where they are names."""
    if labels.dtype.kind in "iu":
        return labels.astype(np.int64)
    names, inverse = np.unique(labels, return_inverse=True)
    try:
        numbers = np.array([int(name) for name in names.tolist()], np.int64)
    except (ValueError, OverflowError):
        return None
    return numbers[inverse.reshape(-1)]


def label_numbers(part: EncodedPart, classes: list[str], where: str) -> Tensor:
    """Labels [N] int64, 0 to C - 1.

    Args:
        part: whose labels are numbers, or names out of `classes`.
        classes: the names, in the order of the labels.
        where: the labels are from, for messages.

    Raises:
        InputError: a label that no class has, with the sample that has it.
    """
    text = part.labels.dtype.kind == "U"
    numbers = as_numbers(part.labels)
    if numbers is None or (text and set(np.unique(part.labels).tolist()) <= set(classes)):
        number = {name: i for i, name in enumerate(classes)}
        names, first, inverse = np.unique(part.labels, return_index=True, return_inverse=True)
        for name, i in zip(names.tolist(), first.tolist(), strict=True):
            if name not in number:
                raise InputError(
                    f'{where}: {part.items.name(i)} has the label "{name}", which is none of the {len(classes)} '
                    f"classes, such as {', '.join(classes[:3])}"
                )
        found = np.array([number[name] for name in names.tolist()], np.int64)[inverse.reshape(-1)]
        return torch.from_numpy(found)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(classes)))
    if len(wrong):
        i = int(wrong[0])
        raise InputError(
            f"{where}: {part.items.name(i)} has the label {numbers[i]}; with {len(classes)} classes labels must be 0 "
            f"to {len(classes) - 1}"
        )
    return torch.from_numpy(numbers)
