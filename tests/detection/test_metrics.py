"""mAP: exactly pycocotools' numbers, cases worked out by hand, and splits or predictions with nothing in them."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.metrics import SUMMARY, coco_arrays, coco_map, evaluate_detection, find_alike
from pcdistill.detection.task import finder_of
from pcdistill.errors import InputError
from tests.detection.families import CLASSES, HUB, SIDE, detector, sample
from tests.helpers import on_cpu


def target(boxes=(), labels=(), crowd=None, size=(200, 200)):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return {
        "size": size,
        "boxes": boxes,
        "labels": np.array(labels),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "iscrowd": np.array(crowd if crowd is not None else [0] * len(boxes)),
    }


def prediction(boxes=(), labels=(), scores=()):
    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "labels": np.array(labels),
        "scores": np.array(scores),
    }


def random_case(seed, images=12, classes=4, empty=0.2):
    """True boxes of all sizes, some of them crowds, and predictions near them, doubled, missing or wrong."""
    rng = np.random.default_rng(seed)
    targets, predictions = [], []
    for _ in range(images):
        count = 0 if rng.uniform() < empty else rng.integers(1, 7)
        corner, side = rng.uniform(0, 120, (count, 2)), np.exp(rng.uniform(2, 5, (count, 2)))
        boxes, labels = np.concatenate([corner, corner + side], 1), rng.integers(1, classes, count)
        targets.append(target(boxes, labels, (rng.uniform(size=count) < 0.1).astype(int)))
        wrong = rng.uniform(0, 60, (3, 4)) + np.array([0, 0, 61, 61])
        near = np.concatenate([boxes, boxes, wrong])
        near = near + rng.normal(0, 4, near.shape)
        kept = rng.uniform(size=len(near)) < 0.8
        named = np.concatenate([labels, labels, rng.integers(1, classes + 1, 3)])
        scores = np.round(rng.uniform(size=len(near)), 1)  # with ties
        predictions.append(prediction(near[kept], named[kept], scores[kept]))
    return predictions, targets


@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_numbers_of_pycocotools(seed, monkeypatch):
    pytest.importorskip("faster_coco_eval")
    coco = pytest.importorskip("pycocotools.coco").COCO
    slow = pytest.importorskip("pycocotools.cocoeval").COCOeval
    predictions, targets = random_case(seed)
    found = coco_map(predictions, targets, ["a", "b", "c", "d"])
    seen = []

    class Watched(slow):
        def accumulate(self, *args):
            super().accumulate(*args)
            self.summarize()
            seen.append(self.stats)

    wanted = coco_arrays(predictions, targets, 4, tool=(coco, Watched))
    arrays = coco_arrays(predictions, targets, 4)
    assert np.array_equal(arrays["precision"], wanted["precision"])
    assert np.array_equal(arrays["recall"], wanted["recall"])
    places = dict(zip(SUMMARY, (0, 1, 2, 3, 4, 5, 8), strict=True))  # among pycocotools' twelve numbers
    rounded = {name: round(found.get(name, -100), 8) for name in SUMMARY}
    assert rounded == {name: round(100 * seen[0][at], 8) for name, at in places.items()}
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_map(predictions, targets, ["a", "b", "c", "d"]) == found  # by pycocotools, to the last bit
    assert 0 < found["map"] < 100


def test_one_box_found_exactly_is_100_and_with_iou_of_two_thirds_counts_at_four_of_ten_thresholds():
    truth = [target([[0, 0, 30, 30]], [1])]
    perfect = coco_map([prediction([[0, 0, 30, 30]], [1], [0.9])], truth, ["a"])
    assert perfect["map"] == perfect["map_50"] == perfect["map_75"] == perfect["map_small"] == pytest.approx(100)
    # 30 x 20 inside 30 x 30: IoU 2/3, which passes 0.50, 0.55, 0.60 and 0.65
    shifted = coco_map([prediction([[0, 0, 30, 20]], [1], [0.9])], truth, ["a"])
    assert shifted["map"] == pytest.approx(40)
    assert shifted["map_50"] == pytest.approx(100)
    assert shifted["map_75"] == 0
    away = coco_map([prediction([[50, 40, 80, 60]], [1], [0.9])], [target([[50, 40, 80, 70]], [1])], ["a"])
    assert away["map"] == pytest.approx(40)


def test_a_false_alarm_above_the_hit_halves_precision():
    truth = [target([[0, 0, 30, 30]], [1])]
    found = [prediction([[100, 100, 150, 150], [0, 0, 30, 30]], [1, 1], [0.9, 0.8])]
    assert coco_map(found, truth, ["a"])["map"] == pytest.approx(50)
    found = [prediction([[0, 0, 30, 30], [100, 100, 150, 150]], [1, 1], [0.8, 0.9])]  # scores decide, not places
    assert coco_map(found, truth, ["a"])["map"] == pytest.approx(50)


def test_classes_and_sizes_are_reported_apart():
    boxes = [[0, 0, 20, 20], [50, 50, 100, 100], [0, 0, 150, 150]]
    truth = [target(boxes, [1, 2, 2])]
    found = coco_map([prediction(boxes[:2], [1, 2], [0.9, 0.9])], truth, ["a", "b", "c"])
    assert found["per_class"] == {"a": pytest.approx(100), "b": pytest.approx(100 * 51 / 101), "c": None}
    assert found["map"] == pytest.approx(100 * (1 + 51 / 101) / 2)
    assert (found["map_small"], found["map_medium"]) == (pytest.approx(100), pytest.approx(100))
    assert found["map_large"] == 0
    small = coco_map([prediction(boxes[:1], [1], [0.9])], [target(boxes[:1], [1])], ["a"])
    assert "map_large" not in small  # no such box: no number, rather than -1


def test_the_size_is_that_of_the_annotated_area():
    truth = [{**target([[0, 0, 50, 50]], [1]), "area": np.array([900.0])}]  # an outline may cover less than its box
    found = coco_map([prediction([[0, 0, 50, 50]], [1], [0.9])], truth, ["a"])
    assert found["map_small"] == pytest.approx(100)
    assert "map_medium" not in found


def test_crowds_are_neither_missed_nor_false_alarms():
    truth = [target([[0, 0, 30, 30], [60, 60, 160, 160]], [1, 1], [0, 1])]
    found = [prediction([[0, 0, 30, 30], [70, 70, 100, 100]], [1, 1], [0.5, 0.9])]
    assert coco_map(found, truth, ["a"])["map"] == pytest.approx(100)


def test_nothing_found_is_zero_and_nothing_there_is_no_crash():
    missed = coco_map([prediction()], [target([[0, 0, 30, 30]], [2])], ["a", "b"])
    assert missed["map"] == missed["map_50"] == 0
    assert missed["per_class"] == {"a": None, "b": 0.0}
    assert missed["map_small"] == 0
    assert "map_large" not in missed
    crowd = coco_map([prediction()], [target([[0, 0, 30, 30]], [2], [1])], ["a", "b"])
    assert crowd["per_class"] == {"a": None, "b": None}
    empty = coco_map([prediction()], [target()], ["a"])
    assert empty["map"] == 0
    assert empty["per_class"] == {"a": None}
    alarm = coco_map([prediction([[0, 0, 9, 9]], [1], [0.5])], [target()], ["a"])
    assert alarm["map"] == 0


@pytest.mark.parametrize("side", [20, 32, 50, 96, 150])
@pytest.mark.parametrize("crowd", [0, 1])
def test_nothing_found_is_what_the_tool_says_of_another_class_found(side, crowd):
    """32 and 96: an area on the border of two sizes counts in both."""
    truth = [target([[0, 0, side, side]], [1], [crowd])]
    alarm = coco_map([prediction([[0, 0, 9, 9]], [2], [0.5])], truth, ["a", "b"])
    assert coco_map([prediction()], truth, ["a", "b"]) == alarm
    assert len(alarm) == (2 if crowd else 7 if side in (32, 96) else 6)


class Oracle(nn.Module):
    """A detector that returns what it was told to, and notes how it was asked."""

    def __init__(self, found):
        super().__init__()
        self.found, self.modes, self.at = found, [], 0

    def forward(self, images):
        self.modes.append(self.training)
        self.at += len(images)
        return [{k: torch.as_tensor(v) for k, v in one.items()} for one in self.found[self.at - len(images) : self.at]]


def test_a_model_is_evaluated_in_eval_mode_over_the_whole_split():
    predictions, targets = random_case(9)
    batches = []
    for i in range(0, 12, 5):
        tensors = [{k: torch.as_tensor(v) for k, v in t.items() if k != "size"} for t in targets[i : i + 5]]
        batches.append(DetectionBatch([torch.zeros(3, 200, 200)] * len(tensors), tensors, torch.arange(len(tensors))))
    model = Oracle(predictions).train()
    names = ["a", "b", "c", "d"]
    found = evaluate_detection(model, batches, on_cpu(), classes=names)
    assert found.pop("samples") == 12
    assert found == coco_map(predictions, targets, names)
    assert model.training
    assert model.modes == [False] * 3
    part = evaluate_detection(Oracle(predictions), batches, on_cpu(), classes=names, limit=6)
    assert part["samples"] == 10
    part = evaluate_detection(Oracle(predictions), batches, on_cpu(), classes=names, limit=5)
    assert part["samples"] == 5


def test_without_a_tool_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r"detection needs faster_coco_eval.*pip install 'pcdistill\[detection\]'"):
        coco_map([prediction()], [target()], ["a"])


# Beside an independent program: a forward of our own and pycocotools

EVALUATED = ("fasterrcnn", "retinanet", "fcos", "ssd", "rt_detr", "d_fine", "rf_detr", "detr", "deformable_detr")
MASKED = ("detr", "deformable_detr")  # keep the proportion, and are told of the padding


def own_forward(family, model, images):
    """Boxes, labels and scores of a batch, without the adapter."""
    if family not in HUB:
        return model(images)
    import transformers

    mean, std = (torch.tensor(v)[:, None, None] for v in model.stats)
    scaled = []
    for image in images:
        height, width = image.shape[1:]
        scale = min(SIDE / min(height, width), model.max_size / max(height, width))
        size = (round(height * scale), round(width * scale)) if family in MASKED else (SIDE, SIDE)
        normal = ((image - mean) / std)[None]
        scaled.append(nn.functional.interpolate(normal, size=size, mode="bilinear", antialias=True)[0])
    rows, columns = (-(-max(x.shape[d] for x in scaled) // 32) * 32 for d in (1, 2))
    pixels, mask = torch.zeros(len(images), 3, rows, columns), torch.zeros(len(images), rows, columns).long()
    for i, x in enumerate(scaled):
        pixels[i, :, : x.shape[1], : x.shape[2]], mask[i, : x.shape[1], : x.shape[2]] = x, 1
    out = model.inner(pixel_values=pixels, **({"pixel_mask": mask} if family in MASKED else {}))
    kinds = {"detr": "Detr", "rf_detr": "RfDetr"}
    processor = getattr(transformers, f"{kinds.get(family, 'RTDetr')}ImageProcessor")()
    sizes = torch.tensor([image.shape[1:] for image in images])
    found = processor.post_process_object_detection(out, threshold=0.0, target_sizes=sizes)
    for one, (height, width) in zip(found, sizes.tolist(), strict=True):
        limits = torch.tensor([width, height] * 2, dtype=torch.float32)
        one.update(labels=one["labels"] + 1, boxes=torch.minimum(one["boxes"].clamp(min=0), limits))
    return found


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("family", EVALUATED)
def test_evaluation_is_that_of_an_own_forward_and_pycocotools(family, batch_size):
    """The truth is what the fresh model finds, moved a little: so its AP is neither 0 nor 100."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    slow = pytest.importorskip("pycocotools.cocoeval").COCOeval
    model = detector(family).eval()
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh = 0.0
    else:
        model.score_thresh = 0.0  # a fresh model is sure of nothing
    if family in ("retinanet", "fcos"):  # of a fresh one all scores are nearly equal, and rounding would order them
        std = 2e4 if family == "retinanet" else 0.5  # the former's head makes maps of 1e-5
        nn.init.normal_(model.head.classification_head.cls_logits.weight, std=std)
    if family == "fcos":
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, 2.0)  # of fresh points most have no area
    pairs = [sample(i, size) for i, size in enumerate([(64, 64), (48, 64), (64, 40), (40, 64)] * 2)]
    images = [image for image, _ in pairs]
    with torch.no_grad():
        found = [own_forward(family, model, [image])[0] for image in images]  # no padding to others, in any batch
    g = torch.Generator().manual_seed(0)
    targets = []
    for one in found:
        sides = one["boxes"][:, 2:] - one["boxes"][:, :2]
        chosen = (sides > 1).all(1).nonzero()[:6, 0]
        moved = 0.05 * torch.randn(len(chosen), 4, generator=g) * sides[chosen].repeat(1, 2)
        boxes, labels = one["boxes"][chosen] + moved, one["labels"][chosen]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        targets.append({"boxes": boxes, "labels": labels, "area": area, "iscrowd": torch.zeros_like(labels)})
    batches = [DetectionBatch(images[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, 8, batch_size)]
    result = evaluate_detection(model, batches, on_cpu(), classes=CLASSES, find=finder_of(model))
    plain = [{key: value.numpy() for key, value in one.items()} for one in found]
    truth = [
        {"size": tuple(i.shape[1:]), **{k: v.numpy() for k, v in t.items()}}
        for i, t in zip(images, targets, strict=True)
    ]
    arrays = coco_arrays(plain, truth, 3, tool=(coco, slow))
    precision = arrays["precision"][:, :, :, 0, -1]
    assert result["map"] == pytest.approx(100 * precision[precision > -1].mean(), abs=0.05)
    assert 0 < result["map"] < 100
    assert result["samples"] == 8


@pytest.mark.parametrize("family", EVALUATED)
def test_what_is_found_in_an_image_does_not_depend_on_what_is_beside_it(family):
    model = detector(family).eval()
    images = [sample(i, size)[0] for i, size in enumerate([(64, 64), (48, 64), (64, 40), (64, 64)])]
    with torch.no_grad():
        alone = [finder_of(model)([image])[0] for image in images]
        together = find_alike(finder_of(model), images)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other["scores"], one["scores"], rtol=1e-3, atol=1e-4)
        assert len(other["boxes"]) == len(one["boxes"])


def test_each_image_gets_back_its_own():
    sizes = [(4, 4), (4, 6), (4, 4), (6, 4), (4, 6)]
    images = [torch.full((3, *size), float(i)) for i, size in enumerate(sizes)]
    calls = []

    def find(group):
        calls.append([tuple(image.shape) for image in group])
        return [float(image[0, 0, 0]) for image in group]

    assert find_alike(find, images) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert all(len(set(shapes)) == 1 for shapes in calls)
    assert find_alike(find, []) == []
