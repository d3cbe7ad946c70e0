"""answers.npz: what student and teacher said of every held-out image, as :mod:`pcdistill.report.answers` reads it."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pcdistill.data.loader import Batch, Batches, SplitBatches
from pcdistill.distillation.teacher import logits_of
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.placement import Placement
from pcdistill.report.answers import FILE, Answers, interesting

SIDE = 112  # pixels of an image on the page, at most


def write_answers(out: Path, student: nn.Module, teacher: nn.Module | None, data: Any, placement: Placement) -> None:
    """One more pass of both over the test images, or where there are none over validation's, by this process alone.

    Args:
        out: the run's folder.
        student: images [N, C, H, W] -> logits [N, K], with the kept weights.
        teacher: the same; None where the student was trained alone.
        data: with `classes`, `mean`, `std`, `val` and `test`.
        placement: where to compute.
    """
    split = "val" if data.test is None else "test"
    batches = _whole(getattr(data, split))
    models = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    parts: dict[str, list[Tensor]] = {}
    for target, images in _labelled(batches, placement):
        parts.setdefault("target", []).append(target.cpu())
        for who, (answer, p) in _answers(models, images, placement).items():
            parts.setdefault(who, []).append(answer)
            parts.setdefault(f"{who}_p", []).append(p)
    if not parts:
        return
    arrays = {name: torch.cat(values).numpy() for name, values in parts.items()}
    classes = [str(name) for name in data.classes]
    found = Answers(classes, split, arrays["target"], arrays["student"], arrays["student_p"])
    shown = interesting(replace(found, teacher=arrays.get("teacher"), teacher_p=arrays.get("teacher_p")))
    thumbs = _thumbs(batches, placement, set(shown), data)
    stored: dict[str, Any] = {**arrays, "classes": np.array(classes), "split": np.array(split)}
    stored |= {"shown": np.array(shown, dtype=np.int64), "names": np.array(_names(batches, shown), dtype=np.str_)}
    stored |= {f"thumb_{i}": thumbs[row] for i, row in enumerate(shown)}
    beside = io.BytesIO()
    np.savez_compressed(beside, **stored)
    atomic_write(out / FILE, beside.getvalue())


def _whole(batches: Batches) -> Batches:
    """All of the split, where this process has a share of it."""
    if not isinstance(batches, SplitBatches) or batches.feed.stream.world_size == 1:
        return batches
    feed = replace(batches.feed, stream=replace(batches.feed.stream, rank=0, world_size=1))
    return SplitBatches(batches.reader, batches.labels, feed)


def _labelled(batches: Batches, placement: Placement) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes [N] and images of what has a class."""
    for batch in batches.epoch(0):
        batch = batch.to(placement.frozen)
        target = batch.target if batch.target.ndim == 1 else batch.target.argmax(dim=1)
        rows = _rows(batch)
        yield (target, batch.images) if rows is None else (target[rows], batch.images[rows])


def _rows(batch: Batch) -> Tensor | None:
    return None if batch.labelled is None else batch.labelled.to(batch.images.device)


@torch.no_grad()
def _answers(models: dict[str, nn.Module], images: Tensor, placement: Placement) -> dict[str, tuple[Tensor, Tensor]]:
    """The class that each model answers and its probability, [N] each; the models are given back in their modes."""
    found = {}
    for who, model in models.items():
        was_training = model.training
        model.eval()
        with placement.outside_steps(), placement.accelerator.autocast():
            logits = logits_of(model(images)).float()
        model.train(was_training)
        p, answer = logits.softmax(dim=1).max(dim=1)
        found[who] = (answer.cpu(), p.cpu())
    return found


def _thumbs(batches: Batches, placement: Placement, rows: set[int], data: Any) -> dict[int, np.ndarray]:
    """Images of the rows as the student sees them, [H, W, 3] uint8, from a second pass that ends with the last one."""
    found: dict[int, np.ndarray] = {}
    start = 0
    for _, images in _labelled(batches, placement) if rows else ():
        for row in sorted(rows & set(range(start, start + len(images)))):
            found[row] = _pixels(images[row - start].float().cpu(), data)
        start += len(images)
        if len(found) == len(rows):
            break
    return found


def _pixels(image: Tensor, data: Any) -> np.ndarray:
    """A normalised image [C, H, W] as it was, [H, W, 3] uint8 with sides of SIDE at most."""
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is not None and std is not None and len(mean) == len(image):
        image = image * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:  # of a user's loader: nothing is known but its range
        low, high = image.min(), image.max()
        image = (image - low) / (high - low).clamp(min=1e-6)
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray((255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _names(batches: Batches, rows: list[int]) -> list[str]:
    """The files of the images, as folder/name; empty where they come from no files."""
    reader: Any = getattr(batches, "reader", None)
    paths = getattr(getattr(getattr(reader, "task", None), "items", None), "paths", None)
    if paths is None:
        return [""] * len(rows)
    places = [int(reader.rows[row]) for row in rows]
    return [os.path.join(os.path.basename(os.path.dirname(paths[i])), os.path.basename(paths[i])) for i in places]
