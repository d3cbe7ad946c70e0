"""Batches of image files are a function of seed, epoch and number: with any workers, over passes, and resumed."""

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill.data.augment import make_augment
from pcdistill.data.files import ImageFiles
from pcdistill.data.loader import Feed, SplitBatches, Stream
from pcdistill.data.readers import ItemReader
from pcdistill.data.workers import Workers

SIZE = 24
FILL = torch.full((3,), 128, dtype=torch.uint8)
IMAGENET = make_augment("imagenet", size=SIZE, channels=3, folder=True)


@pytest.fixture
def files(tmp_path):
    """Twelve JPEG files, from smaller than the images that are asked for to eight times as large; some turned."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        path = tmp_path / f"{i}.jpg"
        coarse.resize((20 * (i + 1), 15 * (i + 1)), Image.BICUBIC).save(path, exif=exif)
        paths.append(str(path))
    return ImageFiles(paths)


TWO = (IMAGENET, IMAGENET.strong(SIZE))


def splits(files, count, views=TWO):
    """Training and evaluation batches that share their workers."""
    workers = Workers(count)
    feed = Feed(3, (0.5,) * 3, (0.25,) * 3, SIZE, 4, Stream(seed=5), train=True)
    options = {"size": SIZE, "fill": FILL, "seed": 5, "workers": workers}
    rows = torch.arange(len(files)).flip(0)
    train = SplitBatches(ItemReader(files, rows, views, **options), rows % 3, feed)
    plain = Feed(3, (0.5,) * 3, (0.25,) * 3, SIZE, 5, Stream(seed=5))
    return train, SplitBatches(ItemReader(files, rows, (None,), **options), rows % 3, plain)


def images(batches, epoch, start=0):
    return [batch.images for batch in batches.epoch(epoch, start)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2])
def test_workers_passes_and_resumption_change_nothing(files, count):
    expected = {epoch: images(splits(files, 0)[0], epoch) for epoch in (0, 1)}
    evaluated = images(splits(files, 0)[1], 0)
    assert not same(expected[0], expected[1])
    train, evaluation = splits(files, count)
    for epoch in (0, 1):
        began = train.epoch(epoch)
        assert torch.equal(next(began).images, expected[epoch][0])
        assert same(images(evaluation, 0), evaluated)  # in the middle of an epoch
        assert same([batch.images for batch in began], expected[epoch][1:])
    next(train.epoch(0))  # left in the middle
    for start in (1, 2, 3):
        assert same(images(train, 1, start), expected[1][start:])
        assert same(images(splits(files, count)[0], 1, start), expected[1][start:])  # in a new process, as it were


def test_a_view_shows_the_same_part_whatever_is_beside_it(files):
    two = images(splits(files, 0)[0], 0)
    one = images(splits(files, 0, views=(IMAGENET,))[0], 0)
    for pair, alone in zip(two, one, strict=True):
        # Not to the bit: a finer view beside it asks for a finer scale of a large file.
        assert (pair.chunk(2)[0] - alone).abs().mean() < 0.1


def test_a_cache_of_other_pixels_does_not_fit(files, monkeypatch):
    before = splits(files, 0)[0].signature
    assert before == splits(files, 2)[0].signature
    monkeypatch.setattr("pcdistill.data.readers.PIXELS", 3)
    assert splits(files, 0)[0].signature != before
