"""Variational information distillation, arXiv 1904.05835 eq. 6: the mean of ((t - m)^2 / v + log v) / 2."""

from tests.references import maps
from tests.references.scalars import Number, exp, log


def vid(mean: maps.Map, variance: list[Number], teacher: maps.Map) -> list[Number]:
    n, d, h, w = maps.shape(mean)
    return [
        sum(
            ((teacher[i][c][r][q] - mean[i][c][r][q]) ** 2 / variance[c] + log(variance[c])) / 2
            for c in range(d)
            for r in range(h)
            for q in range(w)
        )
        / (d * h * w)
        for i in range(n)
    ]


def predict(student: maps.Map, weights: list[maps.Map]) -> maps.Map:
    """1x1 convolutions with ReLU between them."""
    x = maps.conv(student, weights[0])
    for weight in weights[1:]:
        x = maps.conv(maps.relu(x), weight)
    return x


def variance(raw: list[Number], eps: float) -> list[Number]:
    return [log(1 + exp(r)) + eps for r in raw]
