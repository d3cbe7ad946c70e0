"""Unlabelled images in a batch: behind the labelled ones, which stay as they are; a function of seed and epoch."""

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill.data.loader import UNLABELLED, labelled_rows
from pcdistill.data.unlabelled import open_unlabelled
from pcdistill.errors import InputError
from tests.data.test_loader import MIXES, assert_same
from tests.helpers import data_of

MIXED = {"limit": 200, "batch_size": 16, "unlabelled": "rest", "unlabelled_batch": 24}


def rows_of(batch, part, views):
    """The labelled (0) or unlabelled (1) rows of images and target."""
    found = []
    for tensor in (batch.images, batch.target):
        halves = [view[:16] if part == 0 else view[16:] for view in tensor.chunk(views)]
        found.append(torch.cat(halves))
    return found


@MIXES
@pytest.mark.parametrize("views", [1, 2])
def test_the_labelled_part_is_the_batch_that_there_would_be_without(mix, views):
    alone = list(data_of("digits", limit=200, batch_size=16, views=views, **mix).train.epoch(1))
    both = list(data_of("digits", views=views, **MIXED, **mix).train.epoch(1))
    assert len(alone) == len(both) == 12
    for one, whole in zip(alone, both, strict=True):
        assert len(whole) == 40 * views
        images, target = rows_of(whole, 0, views)
        assert torch.equal(images, one.images)
        assert torch.equal(target, one.target)
        assert torch.equal(whole.index[:16], one.index)
        assert bool((rows_of(whole, 1, views)[1] == UNLABELLED).all())
        assert whole.target.dtype == one.target.dtype
        assert torch.equal(whole.labelled, labelled_rows(whole.target))


@MIXES
def test_an_epoch_can_be_repeated_and_entered_anywhere(mix):
    whole = list(data_of("digits", **MIXED, **mix).train.epoch(2))
    again = data_of("digits", **MIXED, **mix).train
    for start in (0, 5, 11):
        assert_same(whole[start:], list(again.epoch(2, start)))


def test_the_stream_goes_on_through_epochs_and_takes_every_image_once_a_pass():
    train = data_of("digits", limit=1000, batch_size=100, unlabelled="rest", unlabelled_batch=90).train
    count = len(train.unlabelled.labels)
    assert train.num_samples == 1000 + count
    seen = [int(i) - 1000 for epoch in range(3) for batch in train.epoch(epoch) for i in batch.index[100:]]
    assert len(seen) == 3 * 10 * 90
    for begin in range(0, len(seen) - count, count):
        assert sorted(seen[begin : begin + count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]


def test_the_same_image_twice_in_an_epoch_is_augmented_anew():
    train = data_of("digits", limit=1284, batch_size=64, unlabelled="rest", unlabelled_batch=10).train
    count = len(train.unlabelled.labels)
    assert count <= 10
    first, second = (batch.images[64:] for batch in list(train.epoch(0))[:2])
    assert not torch.equal(first.sum((1, 2, 3)).sort().values, second.sum((1, 2, 3)).sort().values)


def test_the_unlabelled_images_are_neither_trained_on_nor_held_out():
    data = data_of("digits", **MIXED)
    rest, own = data.train.unlabelled.reader.rows, data.train.labelled.reader.rows
    assert not set(rest.tolist()) & (set(own.tolist()) | set(data.val.reader.rows.tolist()))


@MIXES
@pytest.mark.parametrize("views", [1, 2])
def test_processes_together_see_what_one_process_sees(mix, views):
    alone = list(data_of("digits", views=views, **MIXED, **mix).train.epoch(1))
    shares = [
        list(data_of("digits", views=views, rank=rank, world_size=2, **MIXED, **mix).train.epoch(1)) for rank in (0, 1)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        for field in ("images", "target"):
            views_of = [getattr(part, field).chunk(views) for part in parts]
            together = [
                torch.cat([half[view][rows] for rows in (slice(0, 8), slice(8, None)) for half in views_of])
                for view in range(views)
            ]
            assert torch.equal(torch.cat(together), getattr(whole, field))


def test_losses_that_draw_negatives_take_every_unlabelled_image_for_a_class_of_its_own():
    train = data_of("digits", **MIXED).train
    assert len(train.labels) == train.num_samples
    assert train.labels[200:].unique().numel() == train.num_samples - 200
    assert int(train.labels[200:].min()) == 10


def test_a_folder_and_a_file_of_images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for i in range(5):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "more" / ("deep" if i else "") / f"{i}.png")
    images = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=images, y_train=np.arange(60) % 3, x_test=images, y_test=np.arange(60) % 3)
    np.savez(tmp_path / "more.npz", x=rng.integers(0, 256, (30, 12, 12, 3), dtype=np.uint8))
    common = {"batch_size": 8, "image_size": 8, "unlabelled_batch": 4}
    for name in ("more", "more.npz"):
        train = data_of(str(tmp_path / "own.npz"), unlabelled=str(tmp_path / name), **common).train
        batch = next(iter(train.epoch(0)))
        assert batch.images.shape == (12, 3, 8, 8)
        assert batch.labelled.tolist() == list(range(8))
    signatures = {
        data_of(str(tmp_path / "own.npz"), unlabelled=str(tmp_path / name), **common).train.signature
        for name in ("more", "more.npz")
    }
    assert len(signatures) == 2
    with pytest.raises(InputError, match="have 3 channels, those of digits 1"):
        data_of("digits", unlabelled=str(tmp_path / "more"))
    with pytest.raises(InputError, match="rest is what data.limit leaves out"):
        data_of("digits", unlabelled="rest")
    with pytest.raises(InputError, match='must be a folder of images, an .npz file, or "rest"'):
        open_unlabelled(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        open_unlabelled(str(tmp_path / "empty"))
    np.savez(tmp_path / "odd.npz", pictures=images)
    with pytest.raises(InputError, match="must hold one of x_unlabelled, x, x_train; it holds pictures"):
        open_unlabelled(str(tmp_path / "odd.npz"))
