"""A user's loader of images with boxes: what fits is converted, what does not is named before the first step."""

import pytest
import torch
from torch.utils.data import DataLoader

from pcdistill.data.sharing import Share
from pcdistill.detection.loaders import LoaderDetectionBatches
from pcdistill.errors import InputError

CLASSES, SIDE = 3, 32
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def samples(count=4):
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[2.0, 3.0, 12.0, 20.0], [20.0, 21.0, 30.0, 31.0]])
    return [
        (torch.rand(3, SIDE, SIDE, generator=g), {"boxes": boxes.clone(), "labels": torch.tensor([1, CLASSES])})
        for _ in range(count)
    ]


def loader(pairs, batch=2):
    return DataLoader(pairs, batch, collate_fn=lambda b: tuple(zip(*b, strict=True)))


def looked(pairs, **options):
    batches = LoaderDetectionBatches(loader(pairs), CLASSES, **options)
    found = batches.look()
    batches.check_pixels(found)
    return found


def changed(row, *, image=None, **target):
    """The samples with one of them changed: functions of its image, boxes and so on."""
    pairs = samples()
    old = pairs[row]
    new = {**old[1], **{key: change(old[1].get(key)) for key, change in target.items()}}
    pairs[row] = (old[0] if image is None else image(old[0]), new)
    return pairs


@pytest.mark.parametrize("dtype", FLOATS)
def test_images_and_boxes_of_every_precision_become_float32(dtype):
    pairs = [(image.to(dtype), {**t, "boxes": t["boxes"].to(dtype)}) for image, t in samples()]
    for batch in looked(pairs):
        assert all(image.dtype == torch.float32 for image in batch.images)
        assert all(target["boxes"].dtype == torch.float32 for target in batch.targets)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_and_boxes_of_every_integer_type_are_taken(dtype):
    pairs = [(image, {key: value.to(dtype) for key, value in t.items()}) for image, t in samples()]
    for batch, plain in zip(looked(pairs), looked(samples()), strict=True):
        for target, wanted in zip(batch.targets, plain.targets, strict=True):
            assert target.keys() == wanted.keys()
            assert all(torch.equal(target[key], wanted[key]) for key in target)
            assert target["labels"].dtype == torch.int64


def test_an_image_without_boxes_is_an_image():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.tensor([])}
    batch = looked([(image, empty) for image, _ in samples()])[0]
    assert batch.targets[0]["labels"].dtype == torch.int64
    assert len(batch.targets[0]["area"]) == 0


IMAGES = {
    "bytes": (lambda x: (255 * x).byte(), r"in 0..1, got uint8; use image.float\(\) / 255"),
    "pixels": (lambda x: (255 * x).round(), "in 0..1, it holds .* divide by 255"),
    "normalised twice": (lambda x: 4 * x - 2, "in 0..1, it holds .* normalises by itself"),
    "channels last": (lambda x: x.permute(1, 2, 0), r"got \[32, 32, 3\]; use image.permute\(2, 0, 1\)"),
    "a batch": (lambda x: x[None], r"a tensor \[3, H, W\]"),
    "no tensor": (lambda x: x.numpy(), "a tensor .* got ndarray"),
    "NaN": (lambda x: x.masked_fill(x < 0.01, float("nan")), r"images\[1\] holds nan"),
    "infinite": (lambda x: x.masked_fill(x < 0.01, float("inf")), r"images\[1\] holds inf"),
}
LABELS = {
    "from 0": (lambda y: y - 1, r"labels\[0\] is 0, .*labels are 1 to 3; 0 is the background: add 1"),
    "too high": (lambda y: y + 1, r"labels\[1\] is 4, .*labels are 1 to 3"),
    "unlabelled": (lambda y: y * 0 - 100, "leave out boxes without a label"),
    "real": (lambda y: y.float(), "integers, got float32"),
    "a list": (lambda y: y.tolist(), "got Tensor and list"),
    "a column": (lambda y: y[:, None], r"labels \[M\]"),
}
BOXES = {
    "x, y, width, height": (lambda b: torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1), r"\[1\].*without area.*box_conv"),
    "corners exchanged": (lambda b: b[:, [2, 3, 0, 1]], r"boxes\[0\].*without area"),
    "NaN": (lambda b: b * float("nan"), r"boxes\[0\], \[nan.*not finite"),
    "infinite": (lambda b: b / 0, "not finite"),
    "another image's": (lambda b: b + 100, "outside of its image, which is 32 x 32 pixels"),
    "flat": (lambda b: b.flatten(), r"boxes must be \[M, 4\]"),
    "one too few": (lambda b: b[:1], r"labels \[M\] for one image, got \[1, 4\] and \[2\]"),
}
OTHERS = {
    "area": (lambda _: torch.ones(3), r"area must be \[2\]"),
    "iscrowd": (lambda _: torch.zeros(1, dtype=torch.int64), r"iscrowd must be \[2\]"),
}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (key, *case)
        for key, cases in (("image", IMAGES), ("labels", LABELS), ("boxes", BOXES))
        for case in cases.values()
    ]
    + [(key, *case) for key, case in OTHERS.items()],
)
@pytest.mark.parametrize("row", [1, 3])
def test_what_does_not_fit_is_named_with_its_batch(key, change, message, row):
    with pytest.raises(InputError, match=message) as error:
        looked(changed(row, **{key: change}), name="the training loader")
    assert f"the training loader, batch {row // 2 + 1} of 2: " in str(error.value)


def test_every_later_batch_is_looked_at_too():
    batches = LoaderDetectionBatches(loader([*samples(8), *changed(3, labels=lambda y: y + 1)]), CLASSES)
    batches.look()
    with pytest.raises(InputError, match=r"batch 6 of 6: targets\[1\]: labels\[1\] is 4"):
        list(batches.epoch(0))


def test_a_late_bad_pixel_is_named():
    batches = LoaderDetectionBatches(loader([*samples(8), *changed(3, image=lambda x: x / 0)]), CLASSES)
    with pytest.raises(InputError, match=r"batch 6 of 6: images\[1\] holds (nan|inf)"):
        list(batches.epoch(0))


def test_shares_of_the_image_are_no_pixels():
    with pytest.raises(InputError, match="multiply shares of the image by its width and height"):
        looked([(image, {**t, "boxes": t["boxes"] / SIDE}) for image, t in samples()])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": [], "targets": []}, "got dict"),
        (([], []), "holds no images"),
        ((torch.rand(2, 3, 8, 8), []), "2 images and 0 targets"),
        ((torch.rand(2, 3, 8, 8), {"boxes": 1}), "got Tensor and dict"),
        ((torch.rand(1, 3, 8, 8), [torch.zeros(1, 5)]), 'mapping with "boxes" and "labels"'),
    ],
)
def test_what_is_no_batch_is_told(batch, message):
    with pytest.raises(InputError, match=f"batch 1 of 1: .*{message}"):
        LoaderDetectionBatches([batch], CLASSES).look()


def test_processes_share_the_batches():
    parts = [LoaderDetectionBatches(loader(samples(8)), CLASSES, share=Share(rank, 2)) for rank in range(2)]
    seen = [image for part in parts for batch in part.epoch(0) for image in batch.images]
    wanted = [image for image, _ in samples(8)]
    assert len(seen) == len(wanted)
    assert all(any(torch.equal(image, one) for one in seen) for image in wanted)
