"""Augmentation of whole uint8 batches on any device, and of single images in worker processes.

Both take their randomness from outside: batches as a table of uniform numbers, one row a sample, so that a row's result
does not depend on which other samples are in the batch; single images from torch's generator, seeded by the caller.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vf

from pcdistill.data.decoding import Window
from pcdistill.errors import InputError, nearest

AUGMENTS = ("auto", "none", "crop", "crop-flip", "randaugment", "imagenet", "aggressive")
# Columns of the table of uniform numbers; every option has its own, so that turning one on leaves the others' draws.
CROP_Y, CROP_X, FLIP, OP_1, SIGN_1, OP_2, SIGN_2, CUT_Y, CUT_X, BOX = range(10)
BOX_DRAWS = 4  # boxes drawn for a sample, of which the first that fits is taken
COLUMNS = BOX + 2 * BOX_DRAWS
# torchvision's RandAugment: 2 operations of magnitude 10 on its scale of 31 bins.
RAND_OPS, MAGNITUDE, BINS = 2, 10, 31
AREA_RANGE, RATIO_RANGE = (0.08, 1.0), (3 / 4, 4 / 3)
_RESIZED_CROP = v2.RandomResizedCrop(1, AREA_RANGE, RATIO_RANGE)


@dataclass(frozen=True)
class Augment:
    """What is done to a training image, in this order.

    Attributes:
        resized_crop: a box of 8 to 100 % of the area and ratio 3/4 to 4/3, resized to the image's size.
        padding: pixels of black added on each side before a crop of the old size; 0 for none.
        flip: mirror left to right with probability 1/2.
        rand_augment: two operations of RandAugment (arXiv 1909.13719), magnitude 10 of 30.
        cutout: side in pixels of a square, centred anywhere, set to the mean colour (arXiv 1708.04552); 0 for none.
    """

    resized_crop: bool = False
    padding: int = 0
    flip: bool = False
    rand_augment: bool = False
    cutout: int = 0

    def strong(self, size: int) -> "Augment":
        """The same with RandAugment and cutout of a quarter of the side: the second of two views."""
        return replace(self, rand_augment=True, cutout=max(1, size // 4))


def make_augment(name: str, *, size: int, channels: int, folder: bool) -> Augment:
    """The augmentation that a recipe's name stands for.

    Args:
        name: one of AUGMENTS. "auto" is "imagenet" for folders, "crop-flip" for colour arrays, and "crop" for grey
            arrays, which are mostly digits and letters that a mirror would turn into others. "aggressive" is
            "imagenet" for arrays too, without the mirror for grey ones.
        size: side of the image in pixels; crops pad by an eighth of it (4 at 32, 1 at 8).
        channels: of the image.
        folder: whether images are files of any size.

    Raises:
        InputError: an unknown name, with the nearest known one.
    """
    if name == "auto":
        name = "imagenet" if folder else "crop" if channels == 1 else "crop-flip"
    padding = max(1, size // 8)
    known = {
        "none": Augment(),
        "crop": Augment(padding=padding),
        "crop-flip": Augment(padding=padding, flip=True),
        "randaugment": Augment(padding=padding, flip=True).strong(size),
        "imagenet": Augment(resized_crop=True, flip=True),
        "aggressive": Augment(resized_crop=True, flip=folder or channels > 1),
    }
    if name not in known:
        raise InputError(f'data.augment: unknown "{name}"{nearest(name, AUGMENTS)}; known: {", ".join(AUGMENTS)}')
    return known[name]


def augment_batch(images: Tensor, augment: Augment, u: Tensor, fill: Tensor) -> Tensor:
    """Augment a batch; row n of the result depends on row n of the inputs alone.

    Args:
        images: [N, C, H, W] uint8, on any device.
        augment: what to do.
        u: uniform numbers in [0, 1), [N, COLUMNS] float32, on the CPU: they are the same whatever the device.
        fill: colour of a cut-out square, [C] uint8, on the images' device.

    Returns:
        [N, C, H, W] uint8.
    """
    if augment.resized_crop:
        images = _resized_crop(images, u)
    if augment.padding:
        images = _shifted_crop(images, augment.padding, u)
    if augment.flip:
        mirrored = (u[:, FLIP] < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if augment.rand_augment:
        for op, sign in ((OP_1, SIGN_1), (OP_2, SIGN_2)):
            images = _rand_op(images, u[:, op], u[:, sign])
    if augment.cutout:
        images = _cutout(images, augment.cutout, u, fill)
    return images


def draw_window(augment: Augment | None, size: int, width: int, height: int) -> Window:
    """The part of a picture of any size that becomes [size, size], drawn from torch's global generator.

    None is the evaluation: the short side to 256/224 of the size, then the middle. Without a resized crop, training
    images are the middle square at the wanted size, before the crop with padding.
    """
    if augment is not None and augment.resized_crop:
        box = _RESIZED_CROP.make_params([torch.empty(1).expand(1, height, width)])
        return Window((box["left"], box["top"], box["width"], box["height"]), (size, size), (0, 0, size, size))
    short = size if augment is not None and augment != Augment() else short_side(size)
    long = int(short * max(width, height) / min(width, height))
    wide, high = (short, long) if width <= height else (long, short)
    middle = round((wide - size) / 2), round((high - size) / 2)
    return Window((0, 0, width, height), (wide, high), (*middle, size, size))


def augment_image(image: Tensor, augment: Augment | None, fill: Tensor) -> Tensor:
    """What is done to one image [C, S, S] uint8 after its window was drawn; chance is torch's global generator."""
    if augment is None:
        return image
    size = image.shape[-1]
    if augment.padding:
        image = v2.RandomCrop(size, padding=augment.padding)(image)
    if augment.flip and torch.rand(1) < 0.5:
        image = image.flip(-1)
    if augment.rand_augment:
        image = v2.RandAugment(RAND_OPS, MAGNITUDE, BINS)(image)
    if augment.cutout:
        u = torch.zeros(1, COLUMNS)
        u[0, [CUT_Y, CUT_X]] = torch.rand(2)
        image = _cutout(image[None], augment.cutout, u, fill)[0]
    return image


def short_side(size: int) -> int:
    """What evaluation scales the short side of a file's image to, before it cuts out the middle."""
    return round(size * 256 / 224)


def _shifted_crop(images: Tensor, padding: int, u: Tensor) -> Tensor:
    """A crop of the old size at one of (2 padding + 1)^2 places of the padded image."""
    n, _, height, width = images.shape
    shift = (u[:, [CROP_Y, CROP_X]] * (2 * padding + 1)).long().to(images.device)
    padded = F.pad(images, (padding,) * 4)
    # A view of all crops at all places [n, C, places, places, H, W]; indexing copies only the chosen ones.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=images.device), :, shift[:, 0], shift[:, 1]]


def _resized_crop(images: Tensor, u: Tensor) -> Tensor:
    """A random box, resized to the whole."""
    high, wide = crop_boxes(u)
    theta = torch.zeros(len(u), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide, high
    theta[:, 0, 2] = (2 * u[:, CROP_X] - 1) * (1 - wide)
    theta[:, 1, 2] = (2 * u[:, CROP_Y] - 1) * (1 - high)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def crop_boxes(u: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths [N] of random boxes in a square of side 1: the first that fits, else the last cut to fit."""
    area = AREA_RANGE[0] + u[:, BOX : BOX + BOX_DRAWS] * (AREA_RANGE[1] - AREA_RANGE[0])
    low, high = (math.log(ratio) for ratio in RATIO_RANGE)
    ratio = (low + u[:, BOX + BOX_DRAWS :] * (high - low)).exp()
    boxes = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()])
    fits = (boxes <= 1).all(0)
    fits[:, -1] = True
    first = fits.int().argmax(1)
    tall, wide = boxes[:, torch.arange(len(u)), first].clamp(max=1.0)
    return tall, wide


def _cutout(images: Tensor, side: int, u: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top = (u[:, CUT_Y] * height).long()[:, None] - side // 2
    left = (u[:, CUT_X] * width).long()[:, None] - side // 2
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
    hole = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return torch.where(hole, fill[:, None, None], images)


def _rand_op(images: Tensor, which: Tensor, sign: Tensor) -> Tensor:
    """One operation of RandAugment on each image; images with the same one share a call, as its strength is fixed."""
    names = list(RAND_SPACE)
    op = (which * len(names)).long().tolist()
    negative = (sign < 0.5).tolist()
    groups: dict[tuple[str, bool], list[int]] = {}
    for row, (number, minus) in enumerate(zip(op, negative, strict=True)):
        name = names[number]
        groups.setdefault((name, minus and RAND_SPACE[name]), []).append(row)
    result = images.clone()
    for (name, minus), rows in groups.items():
        if name != "identity":
            where = torch.tensor(rows, device=images.device)
            result[where] = apply_operation(images[where], name, -1.0 if minus else 1.0)
    return result


# Operation -> whether its strength has a sign. The set and the strengths are torchvision's.
RAND_SPACE = {
    "identity": False,
    "shear_x": True,
    "shear_y": True,
    "translate_x": True,
    "translate_y": True,
    "rotate": True,
    "brightness": True,
    "color": True,
    "contrast": True,
    "sharpness": True,
    "posterize": False,
    "solarize": False,
    "auto_contrast": False,
    "equalize": False,
}


def apply_operation(images: Tensor, name: str, sign: float) -> Tensor:
    """One operation of RandAugment at the fixed magnitude on [N, C, H, W] uint8.

    Channels that are neither grey nor RGB are treated one by one, as grey.
    """
    if images.shape[1] not in (1, 3):
        grey = images.reshape(-1, 1, *images.shape[2:])
        return apply_operation(grey, name, sign).reshape(images.shape)
    height, width = images.shape[2:]
    degrees = math.degrees(math.atan(_strength(0.0, 0.3))) * sign
    factor = 1.0 + _strength(0.0, 0.9) * sign
    result: Tensor
    match name:
        case "shear_x":
            result = vf.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=[degrees, 0.0], center=[0, 0])
        case "shear_y":
            result = vf.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, degrees], center=[0, 0])
        case "translate_x":
            result = vf.affine(
                images,
                angle=0.0,
                translate=[int(_strength(0.0, 150.0 / 331.0 * width) * sign), 0],
                scale=1.0,
                shear=[0.0, 0.0],
            )
        case "translate_y":
            result = vf.affine(
                images,
                angle=0.0,
                translate=[0, int(_strength(0.0, 150.0 / 331.0 * height) * sign)],
                scale=1.0,
                shear=[0.0, 0.0],
            )
        case "rotate":
            result = vf.rotate(images, angle=_strength(0.0, 30.0) * sign)
        case "brightness":
            result = vf.adjust_brightness(images, brightness_factor=factor)
        case "color":
            result = vf.adjust_saturation(images, saturation_factor=factor)
        case "contrast":
            result = vf.adjust_contrast(images, contrast_factor=factor)
        case "sharpness":
            result = vf.adjust_sharpness(images, sharpness_factor=factor)
        case "posterize":
            result = vf.posterize(images, bits=round(_strength(8.0, 4.0)))
        case "solarize":
            result = vf.solarize(images, threshold=255.0 * _strength(1.0, 0.0))
        case "auto_contrast":
            result = vf.autocontrast(images)
        case _:
            result = vf.equalize(images)
    return result


def _strength(weakest: float, strongest: float) -> float:
    """The fixed magnitude between two ends, rounded to float32 as in torchvision."""
    return float(torch.linspace(weakest, strongest, BINS)[MAGNITUDE])
