"""Why a loss is not finite: the first batch in which anything was not, and what it was."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcdistill.data.finite import problem_of

WATCHED = "watch/"  # prefix of a distiller's scalars that are finite if all outputs of a model are
NEVER = 2**62


class Watch:
    """The first batch of an epoch, by its number, in which a distiller's losses or watched scalars were not finite.

    It lives on the device: nothing is read back before it is asked.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._first: Tensor | None = None

    def clear(self) -> None:
        self._first = None

    def add(self, result: Mapping[str, Tensor], batch: int) -> None:
        """Look at a batch's "loss", "loss/NAME" and "watch/NAME"."""
        names = [name for name in result if name.startswith(("loss", WATCHED))]
        bad = ~torch.stack([result[name].detach().float() for name in names]).isfinite()
        if self._first is None or names != self.names:
            self.names, self._first = names, torch.full((len(names),), NEVER, device=bad.device)
        self._first = torch.where(bad, self._first.clamp(max=batch), self._first)

    def first(self) -> tuple[int, list[str]] | None:
        """Number of the first such batch, and the names of what was not finite in it; None: there was none."""
        if self._first is None:
            return None
        numbers = self._first.tolist()
        number = min(numbers)
        if number == NEVER:
            return None
        return number, [name for name, n in zip(self.names, numbers, strict=True) if n == number]


def cause_of(batch: Any, names: list[str], *, fresh: bool, lower: str) -> str:
    """One clause on why these were not finite in a batch: its inputs, then the teacher, the student, the losses.

    Args:
        batch: the batch; None if it cannot be had again.
        names: what was not finite in it, as :class:`Watch` says.
        fresh: no step was made before it.
        lower: advice for training that diverges.
    """
    problem = None if batch is None else problem_of(batch)
    if problem is not None:
        return problem
    if f"{WATCHED}teacher" in names:
        return (
            "the teacher's logits are not finite there, and the images are; check its weights and its input "
            "normalisation, or run it in float32"
        )
    if f"{WATCHED}student" in names:
        if fresh:
            return "the student's logits are not finite before the first step; check its weights"
        return f"the student's logits are not finite there, and the images are: the steps were too large; {lower}"
    terms = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    return f"{' and '.join(terms) or 'the sum'} cannot be computed of finite inputs, which are too large; {lower}"
