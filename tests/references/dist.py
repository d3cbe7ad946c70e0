"""DIST from arXiv 2205.10536, section 3, as a loop over rows and columns."""

from tests.references.scalars import Number, Rows, columns, dot, mean, plain, softmax, sqrt


def pearson(a: list[Number], b: list[Number], eps: float) -> Number:
    """Correlation with eps in the denominator; nothing correlates with a list that does not vary."""
    if len({plain(v) for v in a}) == 1 or len({plain(v) for v in b}) == 1:
        return 0.0
    a, b = [v - mean(a) for v in a], [v - mean(b) for v in b]
    return dot(a, b) / (sqrt(dot(a, a)) * sqrt(dot(b, b)) + eps)


def parts(student: Rows, teacher: Rows, temperature: float, eps: float = 1e-8) -> tuple[Number, Number]:
    """(inter, intra), each times T^2."""
    q = [softmax(z, temperature) for z in student]
    p = [softmax(z, temperature) for z in teacher]
    inter = 1 - mean([pearson(a, b, eps) for a, b in zip(p, q, strict=True)])
    intra = 1 - mean([pearson(a, b, eps) for a, b in zip(columns(p), columns(q), strict=True)])
    return temperature**2 * inter, temperature**2 * intra
