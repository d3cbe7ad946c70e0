"""A few images of a detection run as it left them: what student and teacher find on them, what DFMSD masks."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcdistill.detection.data import DetectionData
from pcdistill.detection.detectors.base import Adapter
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.distiller import DetectionDistiller
from pcdistill.detection.metrics import find_alike
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.modes import evaluating
from pcdistill.losses.base import PyramidLoss

IMAGES = 6


@torch.no_grad()
def write_samples(path: Path, distiller: DetectionDistiller, student: nn.Module, data: DetectionData) -> None:
    """Write samples.npz: for image i `image_i` [H, W, 3] uint8, `WHO_i_boxes`, `_labels` and, but for truth, `_scores`
    with WHO out of truth, teacher and student; `classes`, and how many boxes the split has of each,
    `class_boxes` [K]; and when a term masks levels (DFMSD), `mask_i_STRIDE` [H, W] (1 where the place is kept), its
    corners `extent_i` in image pixels, and `channels_i_STRIDE` [D].

    Args:
        path: the file.
        distiller: with the teacher, and the objective in its last state.
        student: with the kept weights.
        data: the first images of its test split, or else of validation, that have boxes are taken.
    """
    split = (data.test or data.val).split
    chosen = [i for i in range(len(split)) if len(split.records[i].boxes)][:IMAGES]
    device = next(student.parameters()).device
    raw = [split.sample(i) for i in chosen]
    images = [image.to(device).float() / 255 for image, _ in raw]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in raw]
    counts = np.zeros(len(data.classes), dtype=np.int64)
    for record in split.records:
        np.add.at(counts, np.asarray(record.labels)[np.asarray(record.iscrowd) == 0] - 1, 1)
    arrays: dict[str, np.ndarray] = {"classes": np.array(data.classes), "class_boxes": counts}
    for i, (image, target) in enumerate(raw):
        arrays[f"image_{i}"] = image.permute(1, 2, 0).numpy()
        _put(arrays, f"truth_{i}", target)
    with evaluating(student):
        adapter = adapter_of(student)
        finders = {"teacher": distiller.teacher, "student": adapter.predict}
        for who, finder in finders.items():
            for i, found in enumerate(find_alike(finder, images) if finder is not None else ()):
                _put(arrays, f"{who}_{i}", found)
        for term in distiller.objective.terms:
            if images and isinstance(term.loss, PyramidLoss) and term.needs.teacher:
                arrays.update(_masks(term.loss, distiller, adapter, images, targets))
    beside = io.BytesIO()
    np.savez_compressed(beside, **arrays)  # type: ignore[arg-type]  # its types take any keyword for "allow_pickle"
    atomic_write(path, beside.getvalue())


def _put(arrays: dict[str, np.ndarray], name: str, found: Any) -> None:
    for key in ("boxes", "labels", "scores"):
        if key in found:
            arrays[f"{name}_{key}"] = found[key].detach().float().cpu().numpy()


def _masks(
    loss: PyramidLoss, distiller: DetectionDistiller, adapter: Adapter, images: list[Tensor], targets: list[Any]
) -> dict[str, Any]:
    """What the loss keeps of places and channels on these images, at its last progress; the student is in eval mode."""
    teacher = distiller.teacher
    if teacher is None:
        return {}
    batch = adapter.prepare(images, targets)
    shown = loss.kept(adapter.observe(batch).pyramid, teacher.observe(batch).pyramid, batch.targets)
    if not shown:
        return {}
    found: dict[str, Any] = {}
    height, width = batch.image_size
    for i, (image, size) in enumerate(zip(images, batch.sizes, strict=True)):
        scale = (image.shape[1] / size[0], image.shape[2] / size[1])
        found[f"extent_{i}"] = np.array([height * scale[0], width * scale[1]])
    for stride, places, channels in shown:
        for i in range(len(images)):
            found[f"mask_{i}_{stride}"] = places[i].cpu().numpy().astype(np.uint8)
            found[f"channels_{i}_{stride}"] = channels[i].cpu().numpy().astype(np.uint8)
    return found
