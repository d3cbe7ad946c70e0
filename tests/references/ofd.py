"""Overhaul of feature distillation, arXiv 1904.01866: margin ReLU and partial L2 distance, cell by cell."""

import math

from tests.references import maps
from tests.references.scalars import Number


def margin(mean: float, deviation: float) -> float:
    """E[X | X < 0] of a Gaussian by summing over a fine grid of its negative part; -3 sigma if that is rare."""
    if deviation == 0:
        return mean if mean < 0 else 0.0
    step = deviation / 2000
    low = min(mean, 0.0) - 10 * deviation
    points = [low + (k + 0.5) * step for k in range(int(-low / step))]
    mass = [
        math.exp(-(((x - mean) / deviation) ** 2) / 2) * step / (deviation * math.sqrt(2 * math.pi)) for x in points
    ]
    if sum(mass) <= 0.001:
        return -3 * deviation
    return sum(x * p for x, p in zip(points, mass, strict=True)) / sum(mass)


def partial(s: Number, t: Number, m: Number) -> Number:
    if t <= 0 and s <= max(t, m):
        return 0.0 * s
    return (s - max(t, m)) ** 2


def ofd(student: list[maps.Map], teacher: list[maps.Map], margins: list[list[Number]]) -> list[Number]:
    """One value per sample: the deepest stage counts whole, each shallower one half of the next."""
    total = [0.0] * len(student[0])
    for level, (f_s, f_t, m) in enumerate(zip(student, teacher, margins, strict=True)):
        s, t = maps.smaller(f_s, f_t)
        n, d, h, w = maps.shape(s)
        weight = 0.5 ** (len(student) - 1 - level)
        for i in range(n):
            cells = [(c, r, q) for c in range(d) for r in range(h) for q in range(w)]
            total[i] = total[i] + weight * sum(partial(s[i][c][r][q], t[i][c][r][q], m[c]) for c, r, q in cells)
    return total


def connect(student: maps.Map, weight: maps.Map) -> maps.Map:
    """1x1 convolution and batch normalisation with weight 1 and bias 0."""
    return maps.batch_norm(maps.conv(student, weight), [1.0] * len(weight), [0.0] * len(weight))
