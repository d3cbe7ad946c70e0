"""Strength: a term's weight, chosen so that distillation pulls so many times as hard as the labels do.

Losses differ in size by two orders of magnitude, so a weight says little about how hard a term pulls. What pulls is the
gradient where the term acts: on the logits, on feature maps, on a pyramid's levels. `strength: s` sets the weight to

    w = s * w_labels * |dL_labels / dx| / |dL_term / dx|

with Euclidean norms over the batch, x the tensors that the term compares, and both losses unweighted. The ratio is
measured on some steps and averaged over them as a logarithm, so that a batch of twice the ratio and one of half cancel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST_STEPS = 20  # measured one by one; then only every EVERY-th step, which keeps the cost under 2 % of a step
EVERY = 20
SHARE = 0.1  # of a new measurement in the average, once ten were taken
LARGEST = math.log(1e4)  # of the logarithm of the ratio: a vanishing gradient must not blow the weight up
HOLD_AFTER = 200  # steps after which a strength that is not followed keeps its weight


class Strength(nn.Module):
    """The factor of one term, from the gradients that it and the labels have at the same place.

    Args:
        target: s > 0: how many times as hard as the labels the term pulls.
        follow: measure through all of training; False keeps the factor after the first 200 steps.

    Raises:
        ValueError: a target that is not a finite number above 0.
    """

    log_ratio: Tensor
    accepted: Tensor

    def __init__(self, target: float, *, follow: bool = True) -> None:
        super().__init__()
        if not (math.isfinite(target) and target > 0):
            raise ValueError(f"strength must be a finite number > 0, got {target}")
        self.target = target
        self.follow = follow
        self.steps = 0
        self.register_buffer("log_ratio", torch.zeros(()))
        self.register_buffer("accepted", torch.zeros(()))

    @property
    def due(self) -> bool:
        """Whether this step is to be measured."""
        if not self.follow and self.steps >= HOLD_AFTER:
            return False
        return self.steps < FIRST_STEPS or self.steps % EVERY == 0

    @property
    def factor(self) -> Tensor:
        """The weight before warm-up, a scalar without a graph."""
        return self.target * self.log_ratio.exp()

    def measure(self, term: Tensor, labels: Tensor, places: Sequence[Tensor]) -> None:
        """Take the gradients of two losses at the same places into the average.

        Args:
            term: the term's unweighted value, a scalar with a graph.
            labels: the labels' loss under its weight, a scalar with a graph.
            places: the student's tensors that the term may compare; those that it does not reach are left out.

        A step on which either gradient is zero or not finite is passed over. The graphs are kept.
        """
        pulls = _gradients(term, places)
        reached = [place for place, pull in zip(places, pulls, strict=True) if pull is not None]
        squares = torch.stack([_square(pulls, places[0]), _square(_gradients(labels, reached), places[0])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(squares)  # the same ratio on all ranks, that of the whole batch
        ratio = (squares[1].log() - squares[0].log()) / 2
        usable = ratio.isfinite()
        ratio = ratio.clamp(-LARGEST, LARGEST)
        share = (1 / (self.accepted + 1)).clamp(min=SHARE)
        self.log_ratio.copy_(torch.where(usable, self.log_ratio + share * (ratio - self.log_ratio), self.log_ratio))
        self.accepted.add_(usable)

    def get_extra_state(self) -> Tensor:
        """A tensor, so that safetensors, which other trainers save by, can hold it."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state["steps"] if isinstance(state, dict) else state)  # older files hold a dict

    def extra_repr(self) -> str:
        return f"target={self.target:g}, follow={self.follow}"


def _gradients(loss: Tensor, places: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of a loss at some tensors; None where it does not reach one."""
    places = [place for place in places if place.requires_grad]
    if not (places and loss.requires_grad):
        return [None] * len(places)
    return torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True)


def _square(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The squared Euclidean norm of gradients together, a float32 scalar on the device of `like`."""
    parts = [(g.detach().float() ** 2).sum() for g in gradients if g is not None]
    return torch.stack(parts).sum() if parts else torch.zeros((), device=like.device)
