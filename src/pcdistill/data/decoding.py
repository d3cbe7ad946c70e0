"""Image files, decoded with Pillow: safely, upright, in 8 bits of red, green and blue, and no larger than is needed.

A JPEG is decoded at 1/2, 1/4 or 1/8 where that still has the pixels that are wanted. Where it is decoded whole, pixels
are to the bit those of torchvision's decoder and resizing.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as vf

from pcdistill.errors import InputError

PIXELS = 2  # counts up when the pixels of any file change: a teacher cache of other pixels is refused
# Those that decode in this process; Pillow would hand an EPS file to Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF", "JPEG2000", "AVIF")
SCALES = (8, 4, 2)
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LAST_COLUMN_FIRST, LAST_ROW_FIRST = {2, 3, 6, 7}, {3, 4, 7, 8}  # orientations, as seen upright
LARGEST_WASTE = 16  # times the pixels that are kept: from there on a part is resized alone


@dataclass(frozen=True)
class Window:
    """A part of a picture, the size that it is brought to, and what is kept of that.

    Attributes:
        box: left, top, width, height in pixels of the upright picture.
        size: width and height that the box is resized to.
        kept: left, top, width, height within `size`.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    kept: tuple[int, int, int, int]


Plan = Callable[[int, int], Sequence[Window]]  # from a picture's width and height


class Picture:
    """An image file. Its pixels are decoded when they are asked for.

    Args:
        path: of the file.
        content: its bytes, where they do not lie in a file of their own; messages then call it `path`.

    Attributes:
        size: width and height as it is shown: upright, after EXIF's orientation.

    Raises:
        InputError: it cannot be read, or is too large (Pillow's limit, about 179 million pixels).
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self.path = path
        with _named(path):
            # Out of memory rather than by Pillow's memory map, which a file that shrinks would turn into a crash.
            held = Path(path).read_bytes() if content is None else content
            self._image = Image.open(io.BytesIO(held), formats=_formats())
            if not isinstance(self._image, _jpeg()):
                self._image.load()  # TIFF turns itself then; PNG may tell its orientation at the end
            self._turn = _orientation(self._image)
        stored = self._image.size
        self.size = stored[::-1] if self._turn >= 5 else stored

    def decode(self, most: float = 1.0) -> "Decoded":
        """The pixels. `most`: times that the picture may be smaller than it is stored."""
        with _named(self.path):
            image, scale = self._image, 1
            stored = image.size
            wanted = next((s for s in SCALES if s <= most), 1)
            if wanted > 1 and (
                drafted := image.draft(None, (max(1, stored[0] // wanted), max(1, stored[1] // wanted)))
            ):
                scale = round(stored[0] / drafted[1][2])
            image.load()
            rgb = to_rgb(image)
            if self._turn != 1:
                rgb = rgb.transpose(TURNS[self._turn])
        # Where the last column or row is only partly filled, a turn can bring it to the front.
        x = rgb.width - self.size[0] / scale if self._turn in LAST_COLUMN_FIRST else 0.0
        y = rgb.height - self.size[1] / scale if self._turn in LAST_ROW_FIRST else 0.0
        return Decoded(rgb, scale, (x, y))


@dataclass(frozen=True)
class Decoded:
    """Pixels of a picture: RGB, upright.

    Attributes:
        image: the pixels.
        scale: times that they are smaller than the picture.
        origin: where the picture's corner lies in them, x and y in their pixels.
    """

    image: Image.Image
    scale: int = 1
    origin: tuple[float, float] = (0.0, 0.0)

    def show(self, window: Window) -> Tensor:
        """What a window shows, [3, height, width] uint8."""
        left, top, width, height = window.box
        x, y, wide, high = window.kept
        wasted = window.size[0] * window.size[1] > LARGEST_WASTE * wide * high
        if self.scale == 1 and not wasted:
            part = self.image
            if part.size != (width, height):
                part = part.crop((left, top, left + width, top + height))
            resized: Tensor = vf.resize(pixels_of(part), [window.size[1], window.size[0]], antialias=True)
            return resized[:, y : y + high, x : x + wide].contiguous()
        across, down = width / window.size[0], height / window.size[1]
        edges = (left + x * across, top + y * down, left + (x + wide) * across, top + (y + high) * down)
        around = self._scaled((left, top, left + width, top + height))
        # Cut first: what lies outside the box must not shine in at its edges.
        hull = (math.floor(around[0]), math.floor(around[1]), math.ceil(around[2]), math.ceil(around[3]))
        inner = self._scaled(edges)
        box = (
            max(0.0, inner[0] - hull[0]),
            max(0.0, inner[1] - hull[1]),
            min(hull[2] - hull[0], inner[2] - hull[0]),
            min(hull[3] - hull[1], inner[3] - hull[1]),
        )
        return pixels_of(self.image.crop(hull).resize((wide, high), Image.Resampling.BILINEAR, box=box)).contiguous()

    def _scaled(self, edges: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Edges in the picture -> in the pixels, inside them."""
        x, y = self.origin
        width, height = self.image.size
        return (
            min(max(edges[0] / self.scale + x, 0.0), float(width)),
            min(max(edges[1] / self.scale + y, 0.0), float(height)),
            min(max(edges[2] / self.scale + x, 0.0), float(width)),
            min(max(edges[3] / self.scale + y, 0.0), float(height)),
        )


def read_windows(path: str | Path, plan: Plan, content: bytes | None = None) -> list[Tensor]:
    """What windows show of an image file, decoded once for all of them.

    Args:
        path: of the file.
        plan: gives the windows from the upright picture's width and height.
        content: the file's bytes, as of a `Picture`.

    Returns:
        For each window [3, height, width] uint8.

    Raises:
        InputError: the file cannot be read.
    """
    picture = Picture(path, content)
    windows = plan(*picture.size)
    most = min(min(w.box[2] / w.size[0], w.box[3] / w.size[1]) for w in windows)
    decoded = picture.decode(most)
    return [decoded.show(window) for window in windows]


def windows_of(image: Image.Image, plan: Plan) -> list[Tensor]:
    """What windows show of an image that Pillow has opened; turned upright. As `read_windows`."""
    decoded = decoded_of(image)
    return [decoded.show(window) for window in plan(*decoded.image.size)]


def decoded_of(image: Image.Image) -> Decoded:
    """The pixels of an image that Pillow has opened.

    Raises:
        Exception: whatever a decoder raises on a broken file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        turn = _orientation(image)
        rgb = to_rgb(image)
    return Decoded(rgb.transpose(TURNS[turn]) if turn != 1 else rgb)


def read_whole(path: str | Path, stated: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A picture of the `stated` width and height, brought to `size`: [3, height, width] uint8.

    Raises:
        InputError: the file cannot be read, or has another size.
    """
    picture = Picture(path)
    if picture.size != stated:
        raise InputError(
            f"the image {path} is {picture.size[0]} x {picture.size[1]} pixels, its annotation says {stated[0]} x "
            f"{stated[1]}"
        )
    decoded = picture.decode(min(stated[0] / size[0], stated[1] / size[1]))
    image, (x, y) = decoded.image, decoded.origin
    if decoded.scale > 1:
        width, height = stated[0] / decoded.scale, stated[1] / decoded.scale
        image = image.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
    elif size != stated:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return pixels_of(image).contiguous()


def bounded_size(width: int, height: int, bound: int | None) -> tuple[int, int]:
    """Width and height with the longer side at most `bound`; None leaves them as they are."""
    longer = max(width, height)
    if bound is None or longer <= bound:
        return width, height
    return max(1, round(width * bound / longer)), max(1, round(height * bound / longer))


def pixels_of(image: Image.Image) -> Tensor:
    """[3, H, W] uint8 of an RGB image; channels lie innermost in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the memory is not to be written to: nobody does
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Alpha is dropped; of 16 bits the upper 8 are taken, as Pillow does for 16-bit colour.

    Raises:
        ValueError: numbers whose black and white are not known.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow turns only 8 bits round
            grey = 255 - grey
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("black and white of its 32-bit numbers are not known; save it with 8 or 16 bits a channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Silences Pillow's warnings, and turns whatever a decoder raises on a broken file into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError:
        raise InputError(
            f"the image {path} cannot be read: it is damaged, or in none of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # decoders raise nearly everything: struct.error, SyntaxError, KeyError, MemoryError
        told = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise InputError(f"the image {path} cannot be read: {' '.join(told.split())}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _jpeg() -> type[Image.Image]:
    from PIL import JpegImagePlugin

    return JpegImagePlugin.JpegImageFile


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is missing or damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged description is no reason to refuse the picture
        return 1
    return found if isinstance(found, int) and found in TURNS else 1
