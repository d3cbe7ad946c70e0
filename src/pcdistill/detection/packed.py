"""A detection split as a few large arrays, which worker processes share: a record of its own for each image would be
copied into every one of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pcdistill.data.decoding import bounded_size, read_whole
from pcdistill.data.files import Names
from pcdistill.detection.formats import Record

CACHE_BYTES = 512 * 2**20  # decoded images are kept when a split is no larger than this

Target = dict[str, Tensor]


class PackedSamples:
    """Images with boxes: from files, or uint8 in memory.

    Args:
        records: one per image.
        pixels: [N, 3, H, W] uint8 when the images are in memory.
        image_size: images of files are scaled down so that their longer side is at most this; boxes follow.
    """

    def __init__(self, records: Sequence[Record], pixels: Tensor | None = None, image_size: int | None = None) -> None:
        self.pixels = pixels
        self.image_size = image_size
        self._paths = Names("" if record.path is None else str(record.path) for record in records)
        self._sizes = np.array([(record.width, record.height) for record in records], np.int64).reshape(-1, 2)
        self._ids = np.array([record.image_id for record in records], np.int64)
        self._ends = np.cumsum([0, *(len(record.boxes) for record in records)])
        self._boxes = _joined([record.boxes for record in records], np.float32, 4)
        self._labels = _joined([record.labels for record in records], np.int64)
        self._area = _joined([record.area for record in records], np.float32)
        self._iscrowd = _joined([record.iscrowd for record in records], np.int64)
        total = sum(3 * width * height for width, height in map(self._scaled, range(len(records))))
        self._kept: dict[int, Tensor] | None = {} if pixels is None and total <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def in_memory(self) -> bool:
        """Whether images are drawn, or kept once they were decoded."""
        return self.pixels is not None or self._kept is not None

    def sample(self, index: int) -> tuple[Tensor, Target]:
        """The image [3, H, W] uint8 and its target."""
        size = self._scaled(index)
        stated = int(self._sizes[index, 0]), int(self._sizes[index, 1])
        factor = torch.tensor([size[0] / stated[0], size[1] / stated[1]] * 2)
        own = slice(self._ends[index], self._ends[index + 1])
        target = {
            "boxes": torch.from_numpy(self._boxes[own]) * factor,
            "labels": torch.from_numpy(self._labels[own].copy()),
            "area": torch.from_numpy(self._area[own]) * factor[0] * factor[1],
            "iscrowd": torch.from_numpy(self._iscrowd[own].copy()),
            "image_id": torch.tensor([int(self._ids[index])]),
        }
        return self._image(index, stated, size), target

    def _image(self, index: int, stated: tuple[int, int], size: tuple[int, int]) -> Tensor:
        if self.pixels is not None:
            return self.pixels[index]
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image = read_whole(self._paths[index], stated, size)
        # A worker process stays, and each would keep the whole split.
        if self._kept is not None and torch.utils.data.get_worker_info() is None:
            self._kept[index] = image
        return image

    def _scaled(self, index: int) -> tuple[int, int]:
        """Width and height after the bound on the longer side."""
        width, height = (int(side) for side in self._sizes[index])
        return bounded_size(width, height, self.image_size)


def _joined(parts: Sequence[np.ndarray], dtype: type, columns: int | None = None) -> np.ndarray:
    flat = np.concatenate([np.empty(0, dtype), *(part.ravel() for part in parts)])
    joined: np.ndarray = flat.astype(dtype, copy=False)
    return joined if columns is None else joined.reshape(-1, columns)
