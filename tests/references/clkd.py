"""CLKD from arXiv 2211.14773, as loops over entries, with the readings of its correlation term."""

from tests.references.scalars import Number, Rows, columns, dot, mean, sqrt


def unit(rows: Rows) -> Rows:
    return [[v / sqrt(dot(row, row)) for v in row] for row in rows]


def squared_distance(a: Rows, b: Rows) -> Number:
    return sum((x - y) ** 2 for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))


def instance(student: Rows, teacher: Rows) -> Number:
    return squared_distance(unit(student), unit(teacher)) / (len(student) * len(student[0]))


def classes(student: Rows, teacher: Rows) -> Number:
    return instance(columns(student), columns(teacher))


def centred_columns(z: Rows) -> Rows:
    return [[v - mean(column) for v in column] for column in columns(z)]


def by_class(z: Rows) -> Rows:
    """C x C: covariances of the classes over the batch, over C - 1."""
    h = centred_columns(z)
    return [[dot(a, b) / (len(h) - 1) for b in h] for a in h]


def by_sample(z: Rows) -> Rows:
    """N x N: the sum over classes of the outer product of a centred column with itself, over C - 1."""
    h, n = centred_columns(z), len(z)
    return [[sum(column[a] * column[b] for column in h) / (len(h) - 1) for b in range(n)] for a in range(n)]


def by_centred_sample(z: Rows) -> Rows:
    """N x N: the sum over classes of the outer product of a column less the mean column, over C - 1."""
    n, c = len(z), len(z[0])
    means = [mean(row) for row in z]
    h = [[v - m for v, m in zip(column, means, strict=True)] for column in columns(z)]
    return [[sum(column[a] * column[b] for column in h) / (c - 1) for b in range(n)] for a in range(n)]


def by_cosine(z: Rows) -> Rows:
    """C x C: inner products of the raw columns, every row at unit length."""
    return unit([[dot(a, b) for b in columns(z)] for a in columns(z)])


def correlation(student: Rows, teacher: Rows, kind: str) -> Number:
    matrices = {"class-cosine": by_cosine, "sample": by_sample, "sample-centred": by_centred_sample}
    matrix = matrices.get(kind, by_class)
    total = squared_distance(matrix(student), matrix(teacher))
    return (sqrt(total) if kind == "class-norm" else total) / len(student[0]) ** 2
