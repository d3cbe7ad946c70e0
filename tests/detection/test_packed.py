"""Packed records give the samples that the records describe; a box lies on its object whatever EXIF says."""

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill.data.loader import Stream
from pcdistill.data.workers import Workers
from pcdistill.detection.data import DetectionBatches, DetectionSplit
from pcdistill.detection.formats import Record
from pcdistill.detection.packed import PackedSamples
from pcdistill.errors import InputError


def record(path, size, boxes, image_id=0) -> Record:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    count = np.arange(len(boxes), dtype=np.int64)
    return Record(path, *size, boxes, count + 1, area, count % 2, image_id)


@pytest.fixture
def split(tmp_path):
    """Five images of 60 x 40, image k with k boxes."""
    records = []
    for k in range(5):
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.full((40, 60, 3), 50 * k, np.uint8)).save(path)
        records.append(record(path, (60, 40), [[i, i, i + 10, i + 6] for i in range(k)], image_id=100 + k))
    return records


def test_samples_are_those_of_the_records(split):
    samples = PackedSamples(split)
    assert len(samples) == 5
    for i, one in enumerate(split):
        image, target = samples.sample(i)
        assert image.eq(50 * i).all()
        assert image.shape == (3, 40, 60)
        assert target["image_id"].tolist() == [100 + i]
        for key in ("boxes", "labels", "area", "iscrowd"):
            assert torch.equal(target[key], torch.from_numpy(getattr(one, key)))
            assert target[key].dtype == torch.from_numpy(getattr(one, key)).dtype


def test_what_a_caller_changes_stays_his(split):
    samples = PackedSamples(split)
    for value in samples.sample(3)[1].values():
        value.add_(1)
    for value, expected in zip(samples.sample(3)[1].values(), PackedSamples(split).sample(3)[1].values(), strict=True):
        assert torch.equal(value, expected)


def test_a_split_may_have_no_boxes_at_all(split):
    _, target = PackedSamples(split[:1]).sample(0)
    assert target["boxes"].shape == (0, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bound", [None, 160, 40])
def test_a_box_lies_on_its_object(tmp_path, orientation, bound):
    """Boxes as a person draws them, on the upright picture."""
    upright = np.zeros((240, 320, 3), np.uint8)
    upright[40:120, 200:280] = 255
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    back |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    stored.save(path, exif=exif, quality=95)
    image, target = PackedSamples([record(path, (320, 240), [[200, 40, 280, 120]])], image_size=bound).sample(0)
    x0, y0, x1, y1 = target["boxes"][0].round().int().tolist()
    assert image[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() > 225
    outside = image.clone()
    outside[:, y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = 0
    assert outside.max() < 30


def test_an_image_that_was_exchanged_is_refused(split):
    samples = PackedSamples(split)
    Image.new("RGB", (61, 40)).save(split[2].path)
    with pytest.raises(InputError, match=r"2\.png is 61 x 40 pixels, its annotation says 60 x 40"):
        samples.sample(2)


def test_workers_stay_and_do_not_change_batches(split):
    def batches(count):
        stream = Stream(seed=4)
        options = {"batch_size": 2, "stream": stream, "train": True, "augment": ("flip", "photometric", "crop")}
        return DetectionBatches(DetectionSplit(split), workers=Workers(count), **options)

    alone, beside = batches(0), batches(2)
    for epoch, start in ((0, 0), (1, 0), (1, 1), (0, 0)):
        found = [list(of.epoch(epoch, start)) for of in (alone, beside)]
        assert len(found[0]) == len(found[1]) == 2 - start
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.index, other.index)
            assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))
            for a, b in zip(one.targets, other.targets, strict=True):
                assert all(torch.equal(a[key], b[key]) for key in a)
