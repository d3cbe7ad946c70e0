"""Neuron selectivity transfer, arXiv 1707.01219: squared MMD of unit channel vectors, kernel (a . b)^2."""

from tests.references import maps
from tests.references.scalars import Number, Rows, dot, sqrt


def patterns(sample: list[list[list[Number]]]) -> Rows:
    """Every channel as a vector of all places, of length 1."""
    rows = []
    for channel in sample:
        flat = [v for row in channel for v in row]
        length = sqrt(dot(flat, flat))
        rows.append([v / length for v in flat])
    return rows


def kernel_mean(a: Rows, b: Rows) -> Number:
    return sum(dot(x, y) ** 2 for x in a for y in b) / (len(a) * len(b))


def nst(student: list[maps.Map], teacher: list[maps.Map]) -> list[Number]:
    """One value per sample, summed over the stages."""
    total = [0.0] * len(student[0])
    for f_s, f_t in zip(student, teacher, strict=True):
        for i, (s, t) in enumerate(zip(*maps.smaller(f_s, f_t), strict=True)):
            a, b = patterns(s), patterns(t)
            total[i] = total[i] + kernel_mean(a, a) + kernel_mean(b, b) - 2 * kernel_mean(a, b)
    return total
