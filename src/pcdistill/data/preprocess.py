"""From an image file to what a trained classifier reads: exactly what evaluation does, without the data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pcdistill.data.augment import draw_window, short_side
from pcdistill.data.decoding import Window

LUMA = (19595, 38470, 7471)  # ITU-R 601 in units of 2^-16, as PIL's "L"


@dataclass(frozen=True)
class Preprocess:
    """How a student's images are made.

    Attributes:
        size: side of its images in pixels.
        short: the short side is scaled to it before the middle is cut out; None scales the whole image to the size.
        mean: by channel, of pixels in [0, 1].
        std: by channel.
    """

    size: int
    short: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def evaluation(cls, size: int, mean: Sequence[float], std: Sequence[float], *, files: bool) -> "Preprocess":
        """What evaluation does to images from files, or to arrays that are square already."""
        return cls(size, short_side(size) if files else None, tuple(map(float, mean)), tuple(map(float, std)))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Preprocess | None":
        """What stands beside a student's weights; None where a part is missing."""
        size, mean, std = (metadata.get(key) for key in ("image_size", "mean", "std"))
        if size is None or mean is None or std is None or "short_side" not in metadata:
            return None
        return cls(size, metadata["short_side"], tuple(mean), tuple(std))

    def metadata(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": self.size,
            "short_side": self.short,
            "interpolation": "bilinear, antialiased",
            "color": "L" if len(self.mean) == 1 else "RGB",
        }

    def plan(self, width: int, height: int) -> list[Window]:
        """The part of a picture that is shown: all of it, or as evaluation reads files."""
        return whole(width, height) if self.short is None else [draw_window(None, self.size, width, height)]

    def __call__(self, pixels: Tensor) -> Tensor:
        """What the plan shows, [3, H, W] uint8, to [C, size, size] float32, normalised."""
        if len(self.mean) == 1:
            pixels = grey(pixels)
        image = pixels[None].float()
        if image.shape[-2:] != (self.size, self.size):
            wanted = (self.size, self.size)
            image = F.interpolate(image, size=wanted, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        normalised: Tensor = (image * (1 / (255 * std)).float() - (mean / std).float()).squeeze(0)
        return normalised


def whole(width: int, height: int) -> list[Window]:
    """A plan that shows a picture as it is."""
    return [Window((0, 0, width, height), (width, height), (0, 0, width, height))]


def grey(pixels: Tensor) -> Tensor:
    """[3, H, W] uint8 to [1, H, W] uint8; grey pixels keep their value."""
    weights = torch.tensor(LUMA, dtype=torch.int32)[:, None, None]
    return ((weights * pixels.int()).sum(dim=0, keepdim=True) + 2**15 >> 16).to(torch.uint8)
