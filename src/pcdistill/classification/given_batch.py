"""A batch as other trainers give it: pairs, triples and mappings; and which of its tokens count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcdistill.data.loader import UNLABELLED
from pcdistill.errors import InputError

INPUTS = ("images", "image", "pixel_values")  # keys of a batch that a model takes as its one argument
TARGETS = ("target", "targets", "labels", "label")


@dataclass(frozen=True)
class Inputs:
    """A batch: `inputs` is a tensor [N, ...], the views one after the other, or what models take by name."""

    inputs: Any
    target: Tensor
    index: Tensor | None = None

    def to(self, device: torch.device) -> "Inputs":
        moved = {k: v.to(device) for k, v in self.inputs.items()} if isinstance(self.inputs, dict) else None
        index = None if self.index is None else self.index.to(device)
        return Inputs(moved or self.inputs.to(device), self.target.to(device), index)


@dataclass(frozen=True)
class Rows:
    """The tokens that count, `keep` [N, T] or [N, T - 1]; with `shifted`, labels are one position ahead of logits."""

    keep: Tensor
    shifted: bool

    def logits(self, values: Tensor) -> Tensor:
        """[M, V] of logits [N, T, V]."""
        return (values[:, :-1] if self.shifted else values)[self.keep]

    def target(self, values: Tensor) -> Tensor:
        """[M] of labels [N, T]."""
        return (values[:, 1:] if self.shifted else values)[self.keep]


def rows_that_count(logits: Tensor, target: Tensor, *, next_token: bool) -> Rows:
    """The positions of logits [N, T, V] whose label [N, T] is not -100.

    Args:
        logits: of tokens.
        target: their labels.
        next_token: whether logits at t are of the token at t + 1.

    Raises:
        InputError: shapes that do not fit.
    """
    if target.shape != logits.shape[:2]:
        raise InputError(f"logits {list(logits.shape)} of tokens need labels [N, T], got {list(target.shape)}")
    return Rows((target[:, 1:] if next_token else target) != UNLABELLED, next_token)


def read_batch(batch: Any, views: int = 1) -> Inputs:
    """A batch in any of the forms that :class:`Distiller` names.

    Raises:
        InputError: no inputs, no target, or not as many views as the method compares.
    """
    inputs, target, index = _parts(batch)
    if isinstance(inputs, Mapping):
        if views > 1:
            raise InputError(f"this method compares {views} views of each image; give a pair of images and no keywords")
        inputs = dict(inputs)
    else:
        stacked = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        if len(stacked) != views or not all(isinstance(view, Tensor) for view in stacked):
            raise InputError(f"a batch must have {views} tensor(s) of images, one for each view, got {_kind(inputs)}")
        inputs = stacked[0] if views == 1 else torch.cat(stacked)
    if not isinstance(target, Tensor):
        raise InputError(f"the target of a batch must be a tensor, got {type(target).__name__}")
    if views > 1:
        target = torch.cat([target] * views)
        index = None if index is None else torch.cat([index] * views)
    return Inputs(inputs, target, index)


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    if isinstance(batch, Mapping):
        key = next((name for name in TARGETS if name in batch), None)
        rest = {name: value for name, value in batch.items() if name not in (key, "index")}
        if key is None or not rest:
            keys = ", ".join(map(str, batch)) or "none"
            raise InputError(f'a batch must have inputs and "target" or "labels", got the keys {keys}')
        image = next(iter(rest)) if len(rest) == 1 else None
        return rest[image] if image in INPUTS else rest, batch[key], batch.get("index")
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    raise InputError(f"a batch must be (inputs, target), with or without index, or a mapping, got {_kind(batch)}")


def _kind(value: Any) -> str:
    return f"{len(value)} parts" if isinstance(value, tuple | list) else type(value).__name__
