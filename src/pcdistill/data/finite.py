"""What in a batch is no finite number, in words: looked for where a loss is none, inputs before all else."""

from typing import Any

import torch
from torch import Tensor


def problem_of(batch: Any, views: int | None = None) -> str | None:
    """The first value of a batch that is not finite: in its images, its soft labels, or teacher logits from a cache.

    Args:
        batch: `images` [V N, ...] or a list of [C, H, W]; `target`, `index` [N] and `teacher_logits` where it has them.
        views: V, images of one sample; None: as many as there are rows for each position.

    Returns:
        None if all is finite.
    """
    index: Any = getattr(batch, "index", None)
    for name in ("images", "target", "teacher_logits"):
        values: Any = getattr(batch, name, None)
        row = _bad_row(values)
        if row is None:
            continue
        count = len(values) // (views or (len(values) // len(index) if index is not None and len(index) else 1))
        place = row % max(count, 1)
        number = f" (sample {int(index[place])} of its set)" if index is not None and place < len(index) else ""
        value = values[row][~values[row].isfinite()].flatten()[0].item()
        remedy = {"images": "; remove the sample, or mend what reads it", "target": "; mend the labels"}.get(
            name, "; the cache holds what the teacher gave, so check the teacher's weights, and make it anew"
        )
        return f"{name}[{row}]{number} holds {value}{remedy}"
    return None


def _bad_row(values: Any) -> int | None:
    if isinstance(values, list | tuple) and all(isinstance(x, Tensor) for x in values):
        return next((i for i, x in enumerate(values) if not bool(x.isfinite().all())), None)
    if not isinstance(values, Tensor) or not (values.is_floating_point() or values.is_complex()):
        return None
    finite = values.isfinite()
    if bool(finite.all()):
        return None
    return int(torch.nonzero(~finite.reshape(len(values), -1).all(1))[0, 0])
