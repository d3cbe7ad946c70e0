"""COCO mAP of a detector over a split, by faster-coco-eval: whole, by IoU, by size and per class."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from pcdistill.detection.data import DetectionBatch
from pcdistill.engine.modes import evaluating
from pcdistill.engine.placement import Placement
from pcdistill.extras import need

# Name of the metric -> which array of COCO, and of it which IoU thresholds and which sizes (all, small, medium, large).
SUMMARY: dict[str, tuple[str, slice, int]] = {
    "map": ("precision", slice(None), 0),
    "map_50": ("precision", slice(0, 1), 0),
    "map_75": ("precision", slice(5, 6), 0),
    "map_small": ("precision", slice(None), 1),
    "map_medium": ("precision", slice(None), 2),
    "map_large": ("precision", slice(None), 3),
    "mar_100": ("recall", slice(None), 0),
}
SIZES = {1: (0.0, 32.0**2), 2: (32.0**2, 96.0**2), 3: (96.0**2, 1e10)}  # in pixels: small, medium, large


@torch.no_grad()
def evaluate_detection(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    placement: Placement,
    *,
    classes: Sequence[str],
    limit: int | None = None,
    find: Callable[[Sequence[Tensor]], Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a detector in eval mode and give it back in the mode that it came in.

    Args:
        model: put into eval mode; list of images [3, H, W] -> list of {"boxes" [M, 4], "labels" [M], "scores" [M]}.
        batches: on any device; one pass over the split, shared among the processes.
        placement: where to compute, in which precision, and over which processes to gather.
        classes: names of the labels 1..K.
        limit: stop after the batch that reaches this many images in this process.
        find: what finds the boxes in a list of images, where that is not the model itself.

    Returns:
        As :func:`coco_map`, and "samples".
    """
    accelerator = placement.accelerator
    found: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    with evaluating(model):
        for batch in batches:
            batch = batch.to(placement)
            with accelerator.autocast():
                predictions = find_alike(find or model, batch.images)
            for image, target, prediction in zip(batch.images, batch.targets, predictions, strict=True):
                size = (int(image.shape[1]), int(image.shape[2]))
                truth.append({"size": size, **_plain(target)})
                found.append(_plain(prediction))
            if limit is not None and len(truth) >= limit:
                break
    if accelerator.num_processes > 1:
        truth, found = gather_object(truth), gather_object(found)
    return {**coco_map(found, truth, classes), "samples": float(len(truth))}


def find_alike(find: Callable[[Sequence[Tensor]], Any], images: Sequence[Tensor]) -> list[Any]:
    """What is found in each image, given to the detector with none but images of its own size.

    Padding to a batch's largest image changes what a detector finds near it, in every family. So AP would depend on the
    batch; images of equal size are padded as one alone is.

    Args:
        find: a list of images -> a list of what is found.
        images: [3, H, W] each.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    found: dict[int, Any] = {}
    for places in groups.values():
        found.update(zip(places, find([images[i] for i in places]), strict=True))
    return [found[i] for i in range(len(images))]


def coco_map(
    predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """Average precision by COCO's rules, in percent; the same numbers whichever of the two tools counts.

    Args:
        predictions: per image "boxes" [M, 4] xyxy, "labels" [M] from 1, "scores" [M], as arrays.
        targets: per image "boxes", "labels", "area" [M] (small is below 32^2, large above 96^2), "iscrowd" [M], and
            "size", height and width.
        classes: names of the labels 1..K.

    Returns:
        "map" (mean over IoU 0.50 to 0.95), "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100";
        without those of a size that no box has. "per_class": {name: AP, None if it has no box}.

    Raises:
        InputError: neither faster-coco-eval nor pycocotools is installed.
    """
    arrays = coco_arrays(predictions, targets, len(classes))
    found = {name: _mean(arrays[array][ious][..., size, -1]) for name, (array, ious, size) in SUMMARY.items()}
    result: dict[str, Any] = {name: 100 * value for name, value in found.items() if value is not None}
    result.setdefault("map", 0.0)  # no box in the whole split
    by_class = [_mean(arrays["precision"][:, :, k, 0, -1]) for k in range(len(classes))]
    result["per_class"] = {n: None if v is None else 100 * v for n, v in zip(classes, by_class, strict=True)}
    return result


def coco_arrays(
    predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], num_classes: int, tool: Any = None
) -> dict[str, np.ndarray]:
    """COCO's "precision" [10 IoU, 101 recall, K, 4 sizes, 3 detections] and "recall" [10, K, 4, 3], -1 where no box is.

    `tool` is a pair of classes as :func:`coco_tool` gives it.
    """
    coco_class, evaluation_class = tool or coco_tool()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        images.append({"id": i, "height": target["size"][0], "width": target["size"][1], "file_name": ""})
        columns = (target["boxes"], target["labels"], target["area"], target["iscrowd"])
        for box, label, area, crowd in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(label),
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
        for box, label, score in zip(prediction["boxes"], prediction["labels"], prediction["scores"], strict=True):
            detections.append({"image_id": i, "category_id": int(label), "bbox": _xywh(box), "score": float(score)})
    categories = [{"id": k, "name": str(k)} for k in range(1, num_classes + 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        truth.createIndex()
        if not detections:  # the tools do not take an empty list
            return _none_found(targets, num_classes)
        evaluation = evaluation_class(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # pycocotools adds 2^-52 to a count, so that a precision of 1 can be 1 - 2^-52 there: rounded, both tools are equal
    return {name: np.asarray(evaluation.eval[name]).round(12) for name in ("precision", "recall")}


def _none_found(targets: Sequence[Mapping[str, Any]], num_classes: int) -> dict[str, np.ndarray]:
    """The arrays when there is no detection at all: 0 for every class and size that has boxes."""
    precision, recall = np.full((10, 101, num_classes, 4, 3), -1.0), np.full((10, num_classes, 4, 3), -1.0)
    for target in targets:
        for label, area, crowd in zip(target["labels"], target["area"], target["iscrowd"], strict=True):
            if not crowd:
                # As in COCO, an area on a border belongs to both sizes.
                sizes = [0, *(k for k, (low, high) in SIZES.items() if low <= area <= high)]
                precision[:, :, int(label) - 1, sizes] = 0.0
                recall[:, int(label) - 1, sizes] = 0.0
    return {"precision": precision, "recall": recall}


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is not -1, summed in pycocotools' order; None if there is nothing."""
    valid = values[values > -1]
    return float(np.mean(valid)) if valid.size else None


def coco_tool() -> tuple[Any, Any]:
    """The classes that read annotations and that evaluate: faster-coco-eval's, else pycocotools'.

    Raises:
        InputError: neither is installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        if importlib.util.find_spec("pycocotools") is None:
            need("faster_coco_eval", what="detection")
            raise  # it is installed, and broken
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    return COCO, COCOeval_faster


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().float().cpu().numpy() if isinstance(v, Tensor) else v for k, v in values.items()}


def _xywh(box: Any) -> list[float]:
    x0, y0, x1, y1 = (float(v) for v in box)
    return [x0, y0, x1 - x0, y1 - y0]
