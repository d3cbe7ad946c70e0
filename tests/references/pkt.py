"""Probabilistic knowledge transfer, arXiv 1803.10837 section 3, cosine kernel, averaged as in the authors' code."""

from tests.references.scalars import Number, Rows, dot, log, sqrt

EPS = 1e-7


def neighbourhoods(x: Rows) -> Rows:
    def cosine(a: list[Number], b: list[Number]) -> Number:
        return dot(a, b) / ((sqrt(dot(a, a)) + EPS) * (sqrt(dot(b, b)) + EPS))

    kernel = [[(cosine(a, b) + 1) / 2 for b in x] for a in x]
    return [[k / sum(row) for k in row] for row in kernel]


def pkt(student: Rows, teacher: Rows) -> Number:
    n = len(student)
    p_s, p_t = neighbourhoods(student), neighbourhoods(teacher)
    terms = [p_t[i][j] * log((p_t[i][j] + EPS) / (p_s[i][j] + EPS)) for i in range(n) for j in range(n)]
    return sum(terms) / n**2
