"""Which parameters a distiller does not train: found once, from the graph of one batch, before the first step."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unused_parameters(distiller: nn.Module, batch: Any) -> list[str]:
    """Names of the trainable parameters that the loss of one batch does not depend on.

    Distributed training must be told whether there are any. It looks at the same graph: a parameter counts as used if
    the loss leads to it, whatever its weight is at the moment. The distiller stays as it is: gradients, buffers (batch
    statistics, memories), what modules keep as extra state, modes and random numbers.

    Args:
        distiller: batch -> {"loss": scalar with a graph, ...}; not yet wrapped for distributed training.
        batch: one batch of training, on the distiller's device.

    Returns:
        In the order of `named_parameters`; empty if every parameter is used.
    """
    with as_it_is(distiller), torch.enable_grad():
        distiller.train()
        used = {id(leaf) for leaf in _leaves(distiller(batch)["loss"])}
    return [name for name, p in distiller.named_parameters() if p.requires_grad and id(p) not in used]


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a gradient of the loss would be collected in."""
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of a path: where a gradient is added up
            yield node.variable
        stack += [below for below, _ in node.next_functions]


@contextmanager
def as_it_is(module: nn.Module) -> Iterator[None]:
    """Put back buffers, extra state, modes and random numbers."""
    modes = {part: part.training for part in module.modules()}
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    extra = [
        (part, copy.deepcopy(part.get_extra_state()))
        for part in module.modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]
    devices = {p.device for p in module.parameters()}
    random = {device: _random_state(device) for device in {torch.device("cpu"), *devices}}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        with torch.no_grad():
            for part, name, buffer, values in buffers:
                buffer.copy_(values)
                setattr(part, name, buffer)  # in case it was replaced
        for part, kept in extra:
            part.set_extra_state(kept)
        for device, state in random.items():
            _set_random_state(device, state)


def _random_state(device: torch.device) -> Tensor | None:
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def _set_random_state(device: torch.device, state: Tensor | None) -> None:
    if state is None:
        return
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)
