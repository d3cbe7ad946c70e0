"""Relational knowledge distillation from arXiv 1904.05068, eq. 5 to 10, pair by pair and triplet by triplet."""

from tests.references.scalars import Number, Rows, dot, sqrt


def huber(d: Number) -> Number:
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def distances(x: Rows) -> Rows:
    n = len(x)
    d = [
        [sqrt(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True))) if i != j else 0.0 for j in range(n)]
        for i in range(n)
    ]
    mu = sum(d[i][j] for i in range(n) for j in range(n)) / (n * (n - 1))
    return [[v / mu for v in row] for row in d]


def angle(x: Rows, i: int, j: int, k: int) -> Number:
    """Cosine at x_i between the directions to x_j and x_k; 0 where a direction is missing."""
    if i in (j, k):
        return 0.0
    a = [p - q for p, q in zip(x[j], x[i], strict=True)]
    b = [p - q for p, q in zip(x[k], x[i], strict=True)]
    return dot(a, b) / (sqrt(dot(a, a)) * sqrt(dot(b, b)))


def rkd(student: Rows, teacher: Rows, distance_weight: float, angle_weight: float) -> Number:
    n = len(student)
    d_s, d_t = distances(student), distances(teacher)
    distance = sum(huber(d_s[i][j] - d_t[i][j]) for i in range(n) for j in range(n)) / n**2
    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    angles = sum(huber(angle(student, *t) - angle(teacher, *t)) for t in triplets) / n**3
    return distance_weight * distance + angle_weight * angles
