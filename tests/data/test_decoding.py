"""Every image file is shown as a person sees it, or refused by name; whatever its bytes are, the process lives."""

import io
import struct
import warnings
import zlib
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from PIL import Image, ImageFilter, ImageOps

from pcdistill.data.augment import draw_window, make_augment
from pcdistill.data.decoding import Picture, Window, bounded_size, pixels_of, read_whole, read_windows, windows_of
from pcdistill.errors import InputError

FORMATS = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"quality": 80},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}
IMAGENET = make_augment("imagenet", size=64, channels=3, folder=True)


def photograph(width=40, height=30, seed=0) -> Image.Image:
    """Smooth, with edges: something like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.array(coarse).astype(int)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def whole(width, height):
    return [Window((0, 0, width, height), (width, height), (0, 0, width, height))]


def read(path):
    (image,) = read_windows(path, whole)
    return image


def saved(image, path, **options):
    image.save(path, **options)
    return path


@st.composite
def damages(draw):
    """A format, and what is done to the bytes of a file of it."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    cut = draw(st.none() | st.floats(0, 1))
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=6))
    # Half of the flips fall into the first bytes, where headers are.
    return (
        kind,
        cut,
        [(place**3 if near else place, bit) for (place, bit), near in zip(flips, [1, 0] * 3, strict=False)],
    )


@cache
def whole_file(kind) -> bytes:
    held = io.BytesIO()
    photograph().save(held, kind, **FORMATS[kind])
    return held.getvalue()


def check_damaged(path, damage) -> bool:
    """Whether a damaged file is refused, by name; else its pixels come in the right form, without a warning."""
    kind, cut, flips = damage
    content = bytearray(whole_file(kind))
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    if cut is not None:
        del content[int(cut * len(content)) :]
    path.write_bytes(content)
    refusal = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            small, large = read_windows(path, lambda w, h: [draw_window(None, 8, w, h), *whole(w, h)])
        except InputError as error:
            refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert "\n" not in refusal
        return True
    assert small.shape == (3, 8, 8)
    assert small.dtype == large.dtype == torch.uint8
    return False


class TestDamaged:
    @given(damages())
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example(("PNG", None, [(0.5, 3)]))
    def test_a_file_decodes_or_is_refused_by_name(self, tmp_path, damage):
        check_damaged(tmp_path / "image.bin", damage)

    @pytest.mark.slow
    @given(damages())
    @settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_so_do_thousands(self, tmp_path, damage):
        check_damaged(tmp_path / "image.bin", damage)

    @pytest.mark.parametrize("kind", sorted(FORMATS))
    def test_a_file_that_starts_otherwise_is_refused(self, tmp_path, kind):
        refused = [check_damaged(tmp_path / "image.bin", (kind, None, [(0, bit)])) for bit in range(8)]
        assert all(refused)  # the first byte names the format

    def test_an_empty_file_a_folder_and_a_missing_file_are_named(self, tmp_path):
        empty, folder, missing = (tmp_path / name for name in ("empty.jpg", "folder.jpg", "missing.jpg"))
        empty.touch()
        folder.mkdir()
        for path, reason in ((empty, "damaged, or in none of JPEG"), (folder, "Is a directory"), (missing, "No such")):
            with pytest.raises(InputError, match=rf"^the image {path} cannot be read: .*{reason}") as caught:
                read(path)
            assert str(caught.value).count(path.name) == 1

    def test_a_decompression_bomb_is_refused_and_a_large_scan_does_not_warn(self, tmp_path, monkeypatch):
        path = saved(Image.new("L", (200, 200)), tmp_path / "image.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # more is warned of, twice as much refused
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read(path).shape == (3, 200, 200)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
        with pytest.raises(InputError, match=r"image\.png cannot be read: .*decompression bomb"):
            read(path)

    def test_a_png_that_only_claims_to_be_huge_takes_no_memory(self, tmp_path):
        def chunk(name, content):
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        path = tmp_path / "image.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(InputError, match="3600000000 pixels"):
            read(path)

    def test_formats_that_start_other_programs_are_refused(self, tmp_path):
        path = saved(photograph(), tmp_path / "image.eps")
        with pytest.raises(InputError, match="damaged, or in none of JPEG, .*AVIF$"):
            read(path)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
    def test_is_that_which_a_person_sees(self, tmp_path, orientation, kind):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "webp" else {}
        path = saved(photograph(), tmp_path / f"image.{kind}", exif=exif, **options)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(read(path).permute(1, 2, 0).numpy(), expected)
        assert Picture(path).size == ((30, 40) if orientation >= 5 else (40, 30))
        with Image.open(path) as image:
            assert torch.equal(windows_of(image, whole)[0], read(path))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("size", [(403, 305), (400, 304)])
    def test_holds_at_a_reduced_scale_too(self, tmp_path, orientation, size):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(photograph(*size), tmp_path / "image.jpg", exif=exif, quality=95)
        upright = size[::-1] if orientation >= 5 else size
        small = round(upright[0] / 5), round(upright[1] / 5)
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).resize(small, Image.BILINEAR)
        assert Picture(path).decode(4.9).scale == 4
        difference = (read_whole(path, upright, small).int() - pixels_of(expected).int()).abs().float()
        assert difference.mean() < 2

    def test_a_damaged_description_does_not_cost_the_picture(self, tmp_path):
        path = saved(photograph(), tmp_path / "image.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
        assert read(path).shape == (3, 30, 40)


class TestModes:
    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_sixteen_bits_are_scaled(self, tmp_path, suffix):
        values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
        path = saved(Image.fromarray(values), tmp_path / f"image.{suffix}")
        image = read(path)
        assert (image == image[:1]).all()
        assert (image[0].numpy() - values / 257).__abs__().max() <= 1

    def test_sixteen_bits_of_colour_are_scaled(self, tmp_path):
        def chunk(name, content):
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        values = np.random.default_rng(0).integers(0, 65536, (7, 5, 3)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 7, 16, 2, 0, 0, 0))
        path = tmp_path / "image.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
        assert np.abs(read(path).permute(1, 2, 0).numpy() - values / 257).max() <= 1

    def test_white_may_be_zero(self, tmp_path):
        values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
        path = saved(Image.fromarray(values), tmp_path / "image.tif", tiffinfo={262: 0})
        with Image.open(path) as image:
            assert image.tag_v2[262] == 0
        assert np.abs(read(path)[0].numpy() - (255 - values / 257)).max() <= 1

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_numbers_of_unknown_white_are_refused(self, tmp_path, dtype):
        path = saved(Image.fromarray(np.ones((4, 5), dtype)), tmp_path / "image.tif")
        with pytest.raises(InputError, match="image.tif cannot be read: black and white of its 32-bit numbers"):
            read(path)

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("1", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("CMYK", "tif")],
    )
    def test_are_what_pillow_makes_of_them(self, tmp_path, mode, suffix):
        path = saved(photograph().convert(mode), tmp_path / f"image.{suffix}")
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(read(path).permute(1, 2, 0).numpy(), expected)

    def test_a_palette_with_transparency_does_not_warn(self, tmp_path):
        image = photograph().convert("P")
        path = saved(image, tmp_path / "image.png", transparency=bytes(range(256)))
        assert np.array_equal(read(path).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
    def test_of_an_animation_the_first_image_is_taken(self, tmp_path, suffix):
        frames = [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
        path = saved(frames[0], tmp_path / f"image.{suffix}", save_all=True, append_images=frames[1:])
        image = read(path)
        assert image.shape == (3, 6, 8)
        assert image[0].min() > 240
        assert image[1].max() < 15


class TestScale:
    @pytest.mark.parametrize("size", [(1100, 800), (1101, 803), (650, 1203)])
    @pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
    def test_a_reduced_decoding_shows_what_a_full_one_does(self, tmp_path, size, seed):
        image = photograph(*size, seed=seed).filter(ImageFilter.GaussianBlur(2))
        reduced, full = saved(image, tmp_path / "image.jpg", quality=95), tmp_path / "full.png"
        Image.open(reduced).save(full)

        def plan(width, height):
            torch.manual_seed(seed)
            return [draw_window(policy, 64, width, height) for policy in (IMAGENET, IMAGENET, None)]

        with torch.random.fork_rng():
            for window in plan(*size):
                (small,), (large,) = (read_windows(path, lambda w, h, of=window: [of]) for path in (reduced, full))
                difference = (small.int() - large.int()).abs().float()
                assert difference.mean() < 1.5
                assert difference.quantile(0.99) < 14

    @pytest.mark.parametrize(("ratio", "scale"), [(1, 1), (1.99, 1), (2, 2), (3.9, 2), (4, 4), (8, 8), (30, 8)])
    def test_is_the_smallest_that_has_the_pixels_that_are_wanted(self, tmp_path, ratio, scale):
        path = saved(photograph(333, 217), tmp_path / "image.jpg")
        decoded = Picture(path).decode(ratio)
        assert decoded.scale == scale
        assert decoded.image.size == (-(-333 // scale), -(-217 // scale))

    @given(st.integers(1, 40), st.integers(1, 40), st.floats(1, 40))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_of_small_pictures_is_the_one_that_was_taken(self, tmp_path, width, height, ratio):
        path = saved(photograph(width, height), tmp_path / "image.jpg")
        decoded = Picture(path).decode(ratio)
        scale = decoded.scale
        assert scale <= ratio
        assert decoded.image.size == (-(-width // scale), -(-height // scale))

    def test_several_views_take_one_decoding(self, tmp_path, monkeypatch):
        path = saved(photograph(300, 200), tmp_path / "image.jpg")
        decodings = []
        decode = Picture.decode
        monkeypatch.setattr(Picture, "decode", lambda self, most: decodings.append(most) or decode(self, most))
        windows = [
            Window((0, 0, 300, 200), (30, 20), (0, 0, 30, 20)),
            Window((9, 9, 200, 150), (50, 50), (0, 0, 50, 50)),
        ]
        both = read_windows(path, lambda w, h: windows)
        assert decodings == [3.0]  # as large as the finer one needs
        assert torch.equal(both[1], read_windows(path, lambda w, h: windows[1:])[0])

    @pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (1, 1), (1, 500)])
    def test_pictures_of_any_shape_give_the_size(self, tmp_path, size):
        path = saved(photograph(*size), tmp_path / "image.png")
        for policy in (None, IMAGENET, make_augment("crop-flip", size=64, channels=3, folder=True)):
            assert read_windows(path, lambda w, h, p=policy: [draw_window(p, 64, w, h)])[0].shape == (3, 64, 64)


class TestWhole:
    def test_is_pillows_own_resizing(self, tmp_path):
        image = photograph(60, 40)
        path = saved(image, tmp_path / "image.png")
        assert torch.equal(read_whole(path, (60, 40), (60, 40)), pixels_of(image))
        assert torch.equal(read_whole(path, (60, 40), (45, 30)), pixels_of(image.resize((45, 30), Image.BILINEAR)))

    def test_another_size_than_the_annotations_is_refused(self, tmp_path):
        path = saved(photograph(60, 40), tmp_path / "image.png")
        with pytest.raises(InputError, match="image.png is 60 x 40 pixels, its annotation says 40 x 60"):
            read_whole(path, (40, 60), (40, 60))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000))
def test_a_bound_holds_for_the_longer_side_and_keeps_the_shape(width, height, bound):
    assert bounded_size(width, height, None) == (width, height)
    found, longer = bounded_size(width, height, bound), max(width, height)
    assert max(found) == min(longer, bound)
    factor = min(1.0, bound / longer)
    assert all(abs(side - max(1, whole * factor)) <= 0.5 for side, whole in zip(found, (width, height), strict=True))
