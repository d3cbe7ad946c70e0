"""Scalar arithmetic for references that give values and gradients: Python floats, or 0-d float64 tensors."""

import math
from collections.abc import Callable

import torch

Number = float | torch.Tensor
Rows = list[list[Number]]


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, torch.Tensor) else math.exp(x)


def log(x: Number) -> Number:
    return x.log() if isinstance(x, torch.Tensor) else math.log(x)


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, torch.Tensor) else math.sqrt(x)


def plain(x: Number) -> float:
    """The number without its graph."""
    return x.item() if isinstance(x, torch.Tensor) else x


def log_softmax(z: list[Number], temperature: Number = 1.0) -> list[Number]:
    top = max(plain(v) for v in z)  # a constant: it changes neither the value nor the gradient
    log_total = log(sum(exp((v - top) / temperature) for v in z))
    return [(v - top) / temperature - log_total for v in z]


def softmax(z: list[Number], temperature: Number = 1.0) -> list[Number]:
    return [exp(v) for v in log_softmax(z, temperature)]


def kl(teacher: list[Number], student: list[Number], temperature: Number = 1.0) -> Number:
    """KL(p || q) of two lists of logits, without T^2."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return sum(exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def columns(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def dot(a: list[Number], b: list[Number]) -> Number:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values: list[Number]) -> Number:
    return sum(values) / len(values)


def gradient(loss: Callable[[Rows], Number], student: torch.Tensor) -> torch.Tensor:
    """d loss(rows) / d student in float64: the reference itself, differentiated operation by operation."""
    leaf = student.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(loss([list(row) for row in leaf]), leaf)
    return grad
