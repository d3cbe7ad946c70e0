"""Images that are read one at a time: files whose names are packed, and torchvision's data sets."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from torch import Tensor

from pcdistill.data.decoding import Plan, read_windows, windows_of
from pcdistill.errors import InputError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}


class Items(Protocol):
    """Images that are read one at a time, such as files."""

    def __len__(self) -> int: ...

    def read(self, i: int, plan: Plan) -> list[Tensor]:
        """What the plan's windows show of image i, [3, H, W] uint8 each; an InputError names what cannot be read."""
        ...

    def prepare(self, rows: Iterable[int]) -> None:
        """Fetch what images are in, several at a time, before they are read one by one; errors as of `read`."""
        return


class Names(Sequence[str]):
    """File names as one array of bytes: a list of a million strings takes some 0.4 kB each, and every worker process
    that counts references to them gets a copy.

    Args:
        names: in order; taken one by one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        held, ends = bytearray(), [0]
        counted = np.empty(0, np.int64)
        for name in names:
            held += os.fsencode(name)
            ends.append(len(held))
            if len(ends) >= 65536:
                counted, ends = np.concatenate([counted, np.array(ends, np.int64)]), []
        self._bytes = np.frombuffer(held, np.uint8)
        self._ends = np.concatenate([counted, np.array(ends, np.int64)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class ImageFiles(Items):
    """Image files, decoded to RGB."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = Names(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int, plan: Plan) -> list[Tensor]:
        return read_windows(self.paths[i], plan)


def find_images(folder: Path) -> list[str]:
    """Paths of all image files in a folder, however deep, in order; what is hidden is passed over.

    A link to another folder is followed, but not to one that was seen or lies above: its images would count twice.
    """
    real = Path(os.path.realpath(folder))
    seen = {str(real), *map(str, real.parents)}
    found: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        inside = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and place not in seen:
                seen.add(place)
                inside.append(name)
        folders[:] = inside
        found += [os.path.join(parent, name) for name in files if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file is taken as an image, by its name: a hidden one is not."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


class DatasetItems(Items):
    """Images of a torchvision data set that yields PIL images."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int, plan: Plan) -> list[Tensor]:
        return windows_of(self.image(i), plan)

    def image(self, i: int) -> Any:
        """As Pillow has it, loaded.

        Raises:
            InputError: it cannot be read.
        """
        try:
            image = self.dataset[i][0]
            image.load()
        except Exception as error:  # decoders raise nearly everything on a broken file
            told = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"image {i} of {self.name} cannot be read: {told}") from None
        return image
