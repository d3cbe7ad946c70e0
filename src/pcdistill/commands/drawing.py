"""Images with a student's answer on them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pcdistill.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

COLORS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)
SMALLEST = 200  # pixels of the shorter side: smaller images are drawn on larger


def draw_class(pixels: Tensor, captions: Sequence[str]) -> Image.Image:
    """An image [3, H, W] uint8 with lines of text under it."""
    picture = _picture(pixels)[0]
    font, line = _font(picture)
    canvas = Image.new("RGB", (picture.width, picture.height + line * len(captions) + line // 2), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for i, caption in enumerate(captions):
        draw.text((line // 3, picture.height + line // 4 + i * line), caption, fill="black", font=font)
    return canvas


def draw_boxes(pixels: Tensor, boxes: Sequence[tuple[Sequence[float], int, str]]) -> Image.Image:
    """An image [3, H, W] uint8 with boxes (xyxy in its pixels, position of the class, caption), the first on top."""
    picture, scale = _picture(pixels)
    font, line = _font(picture)
    draw = ImageDraw.Draw(picture)
    for box, label, caption in reversed(boxes):
        color = COLORS[label % len(COLORS)]
        x0, y0, x1, y1 = (value * scale for value in box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=max(2, line // 8))
        top = y0 - line if y0 >= line else y0
        draw.rectangle((x0, top, x0 + draw.textlength(caption, font=font) + line // 3, top + line), fill=color)
        draw.text((x0 + line // 6, top), caption, fill="white", font=font)
    return picture


def _picture(pixels: Tensor) -> tuple[Image.Image, float]:
    """The image, enlarged where it is small, and by how much."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = max(1.0, SMALLEST / min(picture.size))
    if scale > 1:
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.NEAREST
        )
    return picture, scale


def _font(picture: Image.Image) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """Pillow's own font at a size that fits the image, and the height of a line."""
    size = max(13, min(picture.size) // 30)
    return ImageFont.load_default(size), round(1.35 * size)
