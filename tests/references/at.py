"""Attention transfer from arXiv 1612.03928, section 3.1, with the mean of squares of the authors' code."""

from tests.references import maps
from tests.references.scalars import Number, sqrt


def attention(sample: list[list[list[Number]]], p: int) -> list[Number]:
    """Sum over channels of |F|^p at every place, divided by the length of the vector of all places."""
    places = [(r, q) for r in range(len(sample[0])) for q in range(len(sample[0][0]))]
    energy = [sum(abs(channel[r][q]) ** p for channel in sample) for r, q in places]
    length = sqrt(sum(e * e for e in energy))
    return [e / length for e in energy]


def at(student: list[maps.Map], teacher: list[maps.Map], p: int) -> list[Number]:
    """One value per sample, summed over the stages."""
    total = [0.0] * len(student[0])
    for f_s, f_t in zip(student, teacher, strict=True):
        for i, (s, t) in enumerate(zip(*maps.smaller(f_s, f_t), strict=True)):
            pairs = list(zip(attention(s, p), attention(t, p), strict=True))
            total[i] = total[i] + sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    return total
