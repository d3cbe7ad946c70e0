"""Batch augmentation has the distribution of the plain, image-by-image one, and treats each row on its own."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torchvision.transforms import v2

from pcdistill.data.augment import (
    COLUMNS,
    CROP_X,
    CROP_Y,
    CUT_X,
    CUT_Y,
    FLIP,
    RAND_SPACE,
    Augment,
    apply_operation,
    augment_batch,
    augment_image,
    crop_boxes,
    draw_window,
    make_augment,
)
from pcdistill.data.decoding import Decoded
from pcdistill.errors import InputError

FILL = torch.tensor([1, 2, 3], dtype=torch.uint8)
EVERYTHING = Augment(resized_crop=True, padding=2, flip=True, rand_augment=True, cutout=3)


def noise(n=6, size=16, channels=3, seed=0):
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def uniform(n, seed=0):
    return torch.rand(n, COLUMNS, generator=torch.Generator().manual_seed(seed))


def every_shift(padding):
    """Rows of uniform numbers that give each place of the crop once."""
    places = 2 * padding + 1
    u = torch.full((places**2, COLUMNS), 0.75)
    u[:, CROP_Y] = (torch.arange(places).repeat_interleave(places) + 0.5) / places
    u[:, CROP_X] = (torch.arange(places).repeat(places) + 0.5) / places
    return u


@pytest.mark.slow
@given(rows=st.lists(st.integers(0, 39), min_size=1, max_size=12), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(rows, seed):
    images, u = noise(40), uniform(40, seed)
    whole = augment_batch(images, EVERYTHING, u, FILL)
    assert torch.equal(whole[rows], augment_batch(images[rows], EVERYTHING, u[rows], FILL))


def test_nothing_is_done_where_nothing_is_asked():
    images = noise()
    assert torch.equal(augment_batch(images, Augment(), uniform(6), FILL), images)


@pytest.mark.parametrize("padding", [1, 4])
def test_crops_are_all_those_of_the_padded_image(padding):
    image = noise(1)
    places = (2 * padding + 1) ** 2
    found = augment_batch(image.expand(places, -1, -1, -1), Augment(padding=padding), every_shift(padding), FILL)
    padded = torch.nn.functional.pad(image[0], (padding,) * 4)
    expected = [padded[:, y : y + 16, x : x + 16] for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    assert torch.equal(found, torch.stack(expected))


def test_crops_and_flips_are_uniform():
    n = 9000
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 1] = 255
    found = augment_batch(image.expand(n, -1, -1, -1), Augment(padding=1), uniform(n), FILL[:1])
    assert (found.sum((1, 2, 3)) == 255).all()
    counts = (found[:, 0] > 0).sum(0)
    assert ((counts - n / 9).abs() < 5 * (n / 9) ** 0.5).all()
    ramp = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4).expand(n, 1, 4, 4)
    flipped = augment_batch(ramp, Augment(flip=True), uniform(n), FILL[:1])[:, 0, 0, 0] == 3
    assert abs(int(flipped.sum()) - n / 2) < 5 * (n / 4) ** 0.5


def test_flip_and_crop_are_independent():
    u = uniform(20000)
    assert abs(torch.corrcoef(u[:, [CROP_Y, CROP_X, FLIP]].T).fill_diagonal_(0)).max() < 0.03


def test_cutout_is_a_square_of_the_fill_cut_at_the_border():
    n = 5000
    u = uniform(n)
    found = augment_batch(torch.full((n, 3, 16, 16), 9, dtype=torch.uint8), Augment(cutout=4), u, FILL)
    holes = found[:, 0] == 1
    assert ((found[:, 1] == 2) == holes).all()
    assert ((found[:, 2] == 3) == holes).all()
    height, width = holes.any(2).sum(1), holes.any(1).sum(1)
    assert (holes.sum((1, 2)) == height * width).all()
    inside = (u[:, [CUT_Y, CUT_X]] * 16).long()
    inside = ((inside >= 2) & (inside <= 14)).all(1)
    assert (holes[inside].sum((1, 2)) == 16).all()
    assert height.min() == 2
    assert height.max() == 4


def test_the_boxes_of_a_resized_crop_are_distributed_as_torchvisions():
    n, size = 4000, 1000
    high, wide = crop_boxes(uniform(n))
    plain = v2.RandomResizedCrop(size)
    image = torch.zeros(1, size, size, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [plain.make_params([image]) for _ in range(n)]
    expected = torch.tensor([[box["height"], box["width"]] for box in boxes]) / size
    for ours, theirs in (
        (high * wide, expected.prod(1)),
        (high / wide, expected[:, 0] / expected[:, 1]),
        (high, expected[:, 0]),
    ):
        quantiles = torch.linspace(0, 1, 21)[1:-1]
        gap = ours.quantile(quantiles) - theirs.quantile(quantiles)
        assert gap.abs().max() < 0.04
    assert min(high.min(), wide.min()) > 0.2
    assert max(high.max(), wide.max()) <= 1


def test_a_resized_crop_shows_its_box():
    size = 32
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    u = uniform(50)
    image = torch.stack([y, x, y]).to(torch.uint8)[None].expand(50, -1, -1, -1)
    found = augment_batch(image, Augment(resized_crop=True), u, FILL).float()
    high, wide = crop_boxes(u)
    top, left = u[:, CROP_Y] * (1 - high) * size, u[:, CROP_X] * (1 - wide) * size
    for channel, start, side in ((0, top, high), (1, left, wide)):
        steps = start[:, None] + side[:, None] * (torch.arange(size) + 0.5) - 0.5
        line = found[:, channel, :, 5] if channel == 0 else found[:, channel, 5]
        torch.testing.assert_close(line, steps.clamp(0, size - 1), rtol=0, atol=0.51)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_operations_of_rand_augment_are_torchvisions(channels):
    # Smooth, so that two operations never give the same image by chance.
    image = (torch.arange(16)[:, None] * 7 + torch.arange(16) * 5 + 20 * torch.arange(channels)[:, None, None]).to(
        torch.uint8
    )
    plain = v2.RandAugment(num_ops=1, magnitude=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = {plain(image).numpy().tobytes() for _ in range(1500)}
    batch = image[None].repeat(2, 1, 1, 1)
    ours = {
        apply_operation(batch, name, sign)[1].numpy().tobytes() if name != "identity" else image.numpy().tobytes()
        for name, signed in RAND_SPACE.items()
        for sign in ((1.0, -1.0) if signed else (1.0,))
    }
    assert ours == expected
    assert len(RAND_SPACE) == len(plain._AUGMENTATION_SPACE)


@pytest.mark.parametrize("name", [name for name in RAND_SPACE if name != "identity"])
def test_channels_that_are_no_colours_are_treated_one_by_one(name):
    images = torch.randint(0, 256, (2, 4, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    each = [apply_operation(images[:, c : c + 1], name, 1.0) for c in range(4)]
    assert torch.equal(apply_operation(images, name, 1.0), torch.cat(each, 1))


@pytest.mark.slow
def test_rand_augment_draws_every_operation_equally_often():
    n = 14000
    image = noise(1, size=8).expand(n, -1, -1, -1)
    found = augment_batch(image, Augment(rand_augment=True), uniform(n), FILL)
    unchanged = (found == image).flatten(1).all(1).float().mean()
    # identity twice, or posterize and the like that leave this image as it is; the first is 1 in 196
    assert unchanged > 0.5 / 196
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = v2.RandAugment(2, 10)
        share = sum(torch.equal(plain(image[0]), image[0]) for _ in range(2000)) / 2000
    assert abs(float(unchanged) - share) < 0.02
    assert (
        abs(float(found.float().mean()) - float(torch.stack([plain(image[0]) for _ in range(1500)]).float().mean())) < 3
    )


def view_of(image, augment, size):
    """One image [C, H, W] as a worker process would give it."""
    picture = Decoded(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return augment_image(picture.show(draw_window(augment, size, *picture.image.size)), augment, FILL)


def earlier_view(image, augment, size):
    """The same with torchvision's own transforms of tensors, drawn one after the other."""
    if augment is not None and augment.resized_crop:
        image = v2.RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3), antialias=True)(image)
    else:
        short = size if augment not in (None, Augment()) else round(size * 256 / 224)
        image = v2.functional.center_crop(v2.functional.resize(image, [short], antialias=True), [size, size])
    if augment is None:
        return image
    if augment.padding:
        image = v2.RandomCrop(size, padding=augment.padding)(image)
    return v2.RandomHorizontalFlip()(image) if augment.flip else image


class TestOneImage:
    @pytest.mark.parametrize("name", [None, "none", "crop", "crop-flip", "imagenet"])
    @pytest.mark.parametrize(("height", "width"), [(40, 25), (25, 40), (33, 33), (17, 90), (16, 16), (9, 12)])
    def test_pixels_are_those_of_torchvisions_transforms_to_the_bit(self, name, height, width):
        image = noise(1, 100)[0][:, :height, :width].contiguous()
        policy = None if name is None else make_augment(name, size=16, channels=3, folder=True)
        for seed in range(8):
            found = []
            for view in (view_of, earlier_view):
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    found.append((view(image, policy, 16), torch.rand(1)))
            assert torch.equal(found[0][0], found[1][0])
            assert found[0][1] == found[1][1]  # and not a number more was drawn

    def test_evaluation_is_the_resized_middle(self):
        image = noise(1, 40)[0][:, :, :30]
        found = view_of(image, None, 14)
        expected = v2.functional.center_crop(v2.functional.resize(image, [16], antialias=True), [14, 14])
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("name", ["none", "crop", "crop-flip", "randaugment", "imagenet", "auto"])
    def test_every_policy_gives_the_size_and_follows_the_seed(self, name):
        policy = make_augment(name, size=16, channels=3, folder=True)
        image = noise(1, 40)[0][:, :, :25]
        found = []
        for seed in (1, 1, 2):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found.append(view_of(image, policy, 16))
        assert found[0].shape == (3, 16, 16)
        assert found[0].dtype == torch.uint8
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2]) == (name == "none")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("auto", {"size": 32, "channels": 3, "folder": False}, Augment(padding=4, flip=True)),
        ("auto", {"size": 8, "channels": 1, "folder": False}, Augment(padding=1)),
        ("auto", {"size": 224, "channels": 3, "folder": True}, Augment(resized_crop=True, flip=True)),
        ("none", {"size": 32, "channels": 3, "folder": False}, Augment()),
        (
            "randaugment",
            {"size": 32, "channels": 3, "folder": False},
            Augment(padding=4, flip=True, rand_augment=True, cutout=8),
        ),
    ],
)
def test_names_stand_for_policies(name, options, expected):
    assert make_augment(name, **options) == expected


def test_an_unknown_policy_is_refused_with_the_nearest():
    with pytest.raises(InputError, match='unknown "crop-flop"; did you mean "crop-flip"'):
        make_augment("crop-flop", size=32, channels=3, folder=False)
