"""A user's own loader of images with boxes: its batches checked, converted where that is safe, and shared."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcdistill.data.passed import RAW, LoaderBatches
from pcdistill.data.sharing import ALONE, Share
from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.packed import Target
from pcdistill.errors import InputError

SLACK = 0.1  # how far a pixel may lie outside of 0..1, as after an augmentation of colours


class LoaderDetectionBatches(LoaderBatches):
    """A user's loader of (images, targets): images [3, H, W] in 0..1 as a list or stacked, targets as torchvision's.

    A target holds "boxes" [M, 4] xyxy in pixels and "labels" [M] from 1; "area" and "iscrowd", for evaluation, follow
    from them where they are missing. Images in float16, bfloat16 and float64 become float32, boxes of any type too,
    labels of any integer type int64. A batch that does not fit is an InputError.

    Args:
        loader: see :class:`LoaderBatches`.
        classes: K, the number of the student's classes.
        name: what messages call it.
        share: this process's part.
    """

    def __init__(self, loader: Iterable[Any], classes: int, *, name: str = "the loader", share: Share = ALONE) -> None:
        super().__init__(loader, name=name, share=share)
        self.num_classes = classes

    def check_pixels(self, looked: Sequence[DetectionBatch]) -> None:
        """Check that the batches that :meth:`look` gave hold images in 0..1 and boxes in pixels.

        Raises:
            InputError: the first image that does not, or boxes that are all within one pixel.
        """
        for number, batch in enumerate(looked):
            for i, image in enumerate(batch.images):
                least, most = (float(value) for value in image.aminmax())
                if least < -SLACK or most > 1 + SLACK:
                    remedy = "divide by 255" if least >= 0 else "the detector normalises by itself"
                    raise InputError(
                        f"{self._where(number)}: images[{i}] must be in 0..1, it holds {least:.4g} to {most:.4g}; "
                        f'{remedy}, or, if that is meant, allow=["{RAW}"]'
                    )
        boxes = [target["boxes"] for batch in looked for target in batch.targets]
        if sum(map(len, boxes)) > 0 and float(torch.cat(boxes).max()) <= 1:
            raise InputError(
                f"{self.name}: all boxes end within one pixel; boxes are in pixels, so multiply shares of the image by "
                "its width and height"
            )

    def _batch(self, item: Any, number: int) -> Any:
        where = self._where(number)
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(f"{where}: a loader of detection must yield (images, targets), got {type(item).__name__}")
        if not all(isinstance(part, Tensor | tuple | list) for part in item):
            kinds = " and ".join(type(part).__name__ for part in item)
            raise InputError(f"{where}: images and targets must be lists, or images one tensor, got {kinds}")
        images, targets = list(item[0]), list(item[1])
        if len(images) != len(targets):
            raise InputError(f"{where}: a batch has {len(images)} images and {len(targets)} targets")
        if not images:
            raise InputError(f"{where}: the batch holds no images")
        for i, image in enumerate(images):
            _check_image(image, f"{where}: images[{i}]")
        assert self.num_classes is not None
        whole = [
            _whole(target, image.shape[-2:], self.num_classes, f"{where}: targets[{i}]")
            for i, (image, target) in enumerate(zip(images, targets, strict=True))
        ]
        return DetectionBatch([image.float() for image in images], whole)


def _check_image(image: Any, name: str) -> None:
    if not isinstance(image, Tensor):
        raise InputError(f"{name} must be a tensor [3, H, W] in 0..1, got {type(image).__name__}")
    if not image.is_floating_point():
        raise InputError(f"{name} must be a tensor [3, H, W] in 0..1, got {_dtype(image)}; use image.float() / 255")
    if not bool(image.isfinite().all()):
        value = float(image[~image.isfinite()][0])
        raise InputError(f"{name} holds {value}; remove the sample, or mend what reads it")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        last = image.ndim == 3 and image.shape[-1] in (1, 3)
        hint = "; use image.permute(2, 0, 1)" if last else ""
        raise InputError(f"{name} must be a tensor [3, H, W] in 0..1, got {list(image.shape)}{hint}")


def _whole(target: Any, size: Sequence[int], num_classes: int, name: str) -> Target:
    """A target with all that evaluation looks at; `size` is the image's height and width."""
    if not (isinstance(target, Mapping) and {"boxes", "labels"} <= target.keys()):
        raise InputError(f'{name} must be a mapping with "boxes" and "labels"')
    boxes, labels = target["boxes"], target["labels"]
    if not (isinstance(boxes, Tensor) and isinstance(labels, Tensor)):
        kinds = f"{type(boxes).__name__} and {type(labels).__name__}"
        raise InputError(f"{name}: boxes and labels must be tensors, got {kinds}")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise InputError(
            f"{name}: boxes must be [M, 4] and labels [M] for one image, got {list(boxes.shape)} and "
            f"{list(labels.shape)}"
        )
    _check_labels(labels, num_classes, name)
    boxes = boxes.float()
    _check_boxes(boxes, size, name)
    kept = {key: value for key, value in target.items() if isinstance(value, Tensor)}
    for key in ("area", "iscrowd"):
        if key in kept and kept[key].shape != labels.shape:
            raise InputError(f"{name}: {key} must be [{len(labels)}], one for each box, got {list(kept[key].shape)}")
    labels = labels.long()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return {"area": area, "iscrowd": torch.zeros_like(labels), **kept, "boxes": boxes, "labels": labels}


def _check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    if labels.is_floating_point() or labels.is_complex():
        if len(labels) == 0:  # torch.tensor([]) is floating point
            return
        raise InputError(f"{name}: labels must be integers, got {_dtype(labels)}; use labels.long()")
    wrong = (labels < 1) | (labels > num_classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        hint = ""
        if labels[row] == 0:
            hint = "; 0 is the background: add 1 if yours count from 0"
        elif labels[row] < 0:
            hint = "; leave out boxes without a label"
        raise InputError(
            f"{name}: labels[{row}] is {int(labels[row])}, and the student has {num_classes} classes, so that labels "
            f"are 1 to {num_classes}{hint}"
        )


def _check_boxes(boxes: Tensor, size: Sequence[int], name: str) -> None:
    """Finite, with right and bottom beyond left and top, and not wholly outside the image."""
    low, high = boxes[:, :2], boxes[:, 2:]
    extent = boxes.new_tensor([size[1], size[0]])
    for wrong, what in (
        (~boxes.isfinite().all(dim=1), "not finite"),
        (
            (high <= low).any(dim=1),
            "without area: boxes are x0, y0, x1, y1; torchvision.ops.box_convert turns x, y, width, height into them",
        ),
        (((low >= extent) | (high <= 0)).any(dim=1), f"outside of its image, which is {size[1]} x {size[0]} pixels"),
    ):
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            shown = ", ".join(f"{value:.4g}" for value in boxes[row].tolist())
            raise InputError(f"{name}: boxes[{row}], [{shown}], is {what}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
