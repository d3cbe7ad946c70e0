"""Similarity-preserving distillation from arXiv 1907.09682, eq. 1 to 4."""

from tests.references.scalars import Number, Rows, dot, sqrt


def similarities(f: Rows) -> Rows:
    rows = [[dot(a, b) for b in f] for a in f]
    return [[v / sqrt(dot(row, row)) for v in row] for row in rows]


def sp(student: Rows, teacher: Rows) -> Number:
    n = len(student)
    g_s, g_t = similarities(student), similarities(teacher)
    return sum((g_s[i][j] - g_t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2
