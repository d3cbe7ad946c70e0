"""Classifiers that a user passes in: classes from outputs, and tries on a few samples before the first step."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.data.loader import Batch, labelled_rows
from pcdistill.distillation.passed import check_modules, first_pass
from pcdistill.distillation.teacher import logits_of
from pcdistill.distillation.unused import as_it_is
from pcdistill.engine.modes import evaluating
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError, what_failed
from pcdistill.models.feature_maps import unwrap

TRIED = 4  # samples of each view in the pass before training


def count_classes(student: nn.Module, images: Tensor) -> int:
    """C, from the student's logits of some images [N, ...].

    A lazy module is made here. One that came compiled is asked without its compilation, so that hooks can be set.

    Raises:
        InputError: the student cannot run on the images, or gives no logits [N, C].
    """
    with first_pass("student", images, channels_hint(images)), evaluating(student), torch.no_grad():
        logits = logits_of(unwrap(student)(images))
    if logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point() or logits.shape[1] < 2:
        kind = str(logits.dtype).removeprefix("torch.")
        raise InputError(
            f"the student must give logits [N, C], C >= 2, and gives {kind} {list(logits.shape)} for {len(images)} "
            "images"
        )
    if not bool(logits.isfinite().all()):
        raise InputError("the student's logits are NaN or infinite before training; check its weights")
    return int(logits.shape[1])


def check_own_student(student: nn.Module, images: Tensor, classes: int, name: str) -> None:
    """Raise unless a user's own module can be trained on such images.

    Args:
        student: left as it is.
        images: [N, C, H, W], of any content.
        classes: C, the outputs that it must have.
        name: of the module, for messages.

    Raises:
        InputError: it cannot run, gives other outputs, has nothing to train, or its backward pass fails.
    """
    check_modules(student, None)
    found = count_classes(student, images)
    if found != classes:
        raise InputError(
            f"{name} gives {found} outputs for each image, and the data have {classes} classes; its last layer must "
            "have num_classes outputs"
        )
    try:
        with as_it_is(student), torch.enable_grad():
            total = logits_of(student.train()(images)).sum()
            torch.autograd.grad(total, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    except PcdistillError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"{name} cannot be trained on images {list(images.shape)} ({what_failed(error)})") from error


def channels_hint(images: Tensor) -> str:
    """What to do with images that have their channels last; "" for any other."""
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return "; they look like [N, H, W, C]: use images.permute(0, 3, 1, 2)"
    return ""


def takes_one(distiller: ClassificationDistiller, batch: Batch, views: int, placement: Placement) -> bool:
    """Whether a step can be made on one sample: batch normalisation of vectors cannot."""
    one = few_of(batch, views, 1).to(placement)
    try:
        with as_it_is(distiller), placement.outside_steps(), torch.no_grad(), placement.accelerator.autocast():
            distiller.train()
            distiller.student(one.images)
    except ValueError:
        return False
    return True


def few_of(batch: Batch, views: int, count: int) -> Batch:
    """The first samples of a batch, in each view."""
    size = len(batch) // views
    rows = torch.cat([torch.arange(min(count, size)) + view * size for view in range(views)])
    target = batch.target[rows]
    return Batch(batch.images[rows], target, labelled=labelled_rows(target))


def last_size(loader: Any) -> int | None:
    """Samples in the last batch of an epoch of a DataLoader, or a list of batches; None where it cannot be told."""
    if isinstance(loader, list | tuple):
        last = loader[-1].values() if isinstance(loader[-1], Mapping) else loader[-1]
        sizes = {len(part) for part in last if isinstance(part, Tensor) and part.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None
    size, dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    if not isinstance(size, int) or getattr(loader, "drop_last", False) or not isinstance(dataset, Sized):
        return None
    try:
        count = len(sampler if isinstance(sampler, Sized) else dataset)
    except TypeError:
        return None
    return count % size or size
