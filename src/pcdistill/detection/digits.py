"""`digits-detection`: real handwritten digits pasted over drawn textures, with boxes. Nothing is downloaded.

The set is a pure function of the image size: the seed of a run changes the order and the augmentation, never the
images, so that teachers, students and seeds all meet the same test images. The digits of the three splits are
different handwritten samples.
"""

import functools

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcdistill.data.digits import handwritten_digits

VERSION = 1  # to be raised with any change to what is drawn
CLASSES = tuple("0123456789")
IMAGES = {"train": 1200, "val": 200, "test": 400}
DIGITS = {"train": (0, 1197), "val": (1197, 1397), "test": (1397, 1797)}  # ranges of one fixed permutation
SMALLEST, LARGEST = 0.25, 0.6  # a digit's side as a share of the image's
MOST_DIGITS = 4
EMPTY_SHARE = 0.05
INK = 0.35  # a pixel belongs to the digit's box where its ink is above this share of the darkest


@functools.lru_cache(maxsize=6)
def draw_split(split: str, image_size: int) -> tuple[Tensor, list[np.ndarray], list[np.ndarray]]:
    """Draw one split.

    Args:
        split: "train", "val" or "test".
        image_size: side of the square images in pixels.

    Returns:
        Images [N, 3, S, S] uint8; per image the boxes [M, 4] float32, xyxy in pixels, and the digits [M] int64.
    """
    glyphs, digits = _glyphs(split)
    images, boxes, labels = [], [], []
    for i in range(IMAGES[split]):
        rng = np.random.default_rng([len(split), i, image_size])
        image = _texture(rng, image_size)
        image_boxes, image_labels = _paste(rng, image, glyphs, digits)
        images.append((image * 255 + 0.5).astype(np.uint8))
        boxes.append(np.asarray(image_boxes, dtype=np.float32).reshape(-1, 4))
        labels.append(np.asarray(image_labels, dtype=np.int64))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), boxes, labels


def _glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0..1 [G, 8, 8] and digit [G] of the split's handwritten samples."""
    ink, digits = handwritten_digits()
    order = np.random.default_rng(0).permutation(len(digits))[slice(*DIGITS[split])]
    return ink.reshape(-1, 8, 8)[order] / 16.0, digits[order]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A background [S, S, 3] in 0..1: a colour with grain, two gratings and two octaves of smooth noise."""
    line = np.arange(size, dtype=np.float32) / size
    image = 0.02 * rng.standard_normal((size, size, 3), dtype=np.float32)
    image += rng.uniform(0.15, 0.85, 3).astype(np.float32)
    for _ in range(2):
        angle, waves = rng.uniform(0, np.pi), rng.uniform(1, 9)
        across = np.exp(2j * np.pi * waves * np.cos(angle) * line).astype(np.complex64)
        down = np.exp(2j * np.pi * (waves * np.sin(angle) * line + rng.uniform())).astype(np.complex64)
        wave = (down[:, None] * across).imag  # sin(2 pi (down + across)), one exponential a line instead of a pixel
        image += wave[..., None] * rng.normal(0, 0.06, 3).astype(np.float32)
    for cells in (4, 12):
        noise = Image.fromarray(rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8))
        smooth = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        image += (smooth / 255 - 0.5) * np.float32(rng.uniform(0.1, 0.35))
    return np.asarray(np.clip(image, 0, 1))


def _paste(
    rng: np.random.Generator, image: np.ndarray, glyphs: np.ndarray, digits: np.ndarray
) -> tuple[list[list[float]], list[int]]:
    """Draw digits into the image in place; the tight boxes of their ink, and what they are."""
    size = image.shape[0]
    count = 0 if rng.uniform() < EMPTY_SHARE else int(rng.integers(1, MOST_DIGITS + 1))
    boxes: list[list[float]] = []
    labels: list[int] = []
    for _ in range(count):
        which = int(rng.integers(len(digits)))
        ink = _resized(rng, glyphs[which], size * np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        rows, columns = np.nonzero((ink > INK * ink.max()).any(1))[0], np.nonzero((ink > INK * ink.max()).any(0))[0]
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        for _ in range(10):  # places that overlap another digit by much are drawn again, then given up
            y, x = int(rng.integers(-top, size - bottom + 1)), int(rng.integers(-left, size - right + 1))
            box = [float(x + left), float(y + top), float(x + right), float(y + bottom)]
            if all(_overlap(box, other) < 0.1 for other in boxes):
                _blend(rng, image, ink, y, x)
                boxes.append(box)
                labels.append(int(digits[which]))
                break
    return boxes, labels


def _resized(rng: np.random.Generator, glyph: np.ndarray, side: float) -> np.ndarray:
    """The glyph's ink at another size, a little stretched and rotated."""
    width, height = (max(8, round(side * rng.uniform(0.85, 1.15))) for _ in range(2))
    picture = Image.fromarray((np.pad(glyph, 1) * 255).astype(np.uint8))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    return np.asarray(picture, dtype=np.float32) / 255


def _blend(rng: np.random.Generator, image: np.ndarray, ink: np.ndarray, y: int, x: int) -> None:
    """Mix the digit's colour into the image; the colour differs from what lies behind it."""
    height, width = ink.shape
    y0, y1, x0, x1 = max(y, 0), min(y + height, len(image)), max(x, 0), min(x + width, len(image))
    patch = image[y0:y1, x0:x1]
    alpha = ink[y0 - y : y1 - y, x0 - x : x1 - x, None]
    behind = patch.mean(axis=(0, 1))
    darker = behind.mean() > rng.uniform(0.3, 0.7)
    shade = behind.mean() + (-1 if darker else 1) * rng.uniform(0.25, 0.45)
    colour = np.clip(shade + rng.normal(0, 0.15, 3), 0, 1).astype(np.float32)
    patch[:] = (1 - alpha) * patch + alpha * colour


def _overlap(a: list[float], b: list[float]) -> float:
    """Intersection over the smaller of two areas."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller
