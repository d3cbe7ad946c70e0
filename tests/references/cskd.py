"""CSKD and CSWT (arXiv 2311.14307) as loops over columns and rows."""

from tests.references.mlkd import gram, masks
from tests.references.scalars import Number, Rows, columns, dot, mean, plain, softmax, sqrt


def cosine(a: list[Number], b: list[Number], eps: float = 1e-8) -> Number:
    return dot(a, b) / (sqrt(dot(a, a)) * sqrt(dot(b, b)) + eps)


def cswt(student: Rows, teacher: Rows, low: float, high: float) -> list[float]:
    """The most similar sample of the batch gets `low`, the least similar one `high`, the others a linear map."""
    similar = [plain(cosine(softmax(z_s), softmax(z_t), eps=0.0)) for z_s, z_t in zip(student, teacher, strict=True)]
    most, least = max(similar), min(similar)
    return [(high - low) / max(most - least, 1e-6) * (most - s) + low for s in similar]


def probabilities(rows: Rows, temperatures: list[float]) -> Rows:
    return [softmax(z, t) for z, t in zip(rows, temperatures, strict=True)]


def row_distance(p: Rows, q: Rows) -> Number:
    return 1 - mean([cosine(a, b) for a, b in zip(p, q, strict=True)])


def column_loss(student: Rows, teacher: Rows, temperatures: list[float], alpha: float = 2.0) -> Number:
    q, p = probabilities(student, temperatures), probabilities(teacher, temperatures)
    return alpha * mean(temperatures) ** 2 * row_distance(columns(p), columns(q))


def cskd(
    student: Rows,
    teacher: Rows,
    *,
    views: int = 2,
    masked: bool = True,
    temperature: float = 4.0,
    span: tuple[float, float] = (2.0, 6.0),
    weights: tuple[float, float, float, float, float] = (2.0, 1.0, 1.0, 1.0, 1.0),
) -> Number:
    """Weights are those of the cosine, the fixed temperature, CSWT, the class and the batch terms."""
    alpha, fixed, adaptive, by_class, by_batch = weights
    n = len(student) // views
    weak_s, weak_t = student[:n], teacher[:n]
    m, m_c = (mean(mask) if masked else 1.0 for mask in masks(weak_t))
    total = 0.0
    for weight, t in ((fixed, [temperature] * n), (adaptive, cswt(weak_s, weak_t, *span))):
        q, p = probabilities(weak_s, t), probabilities(weak_t, t)
        total = total + weight * m * column_loss(weak_s, weak_t, t, alpha)
        total = total + weight * by_class * m_c * row_distance(gram(columns(p)), gram(columns(q)))
        total = total + weight * by_batch * m * row_distance(gram(p), gram(q))
        if views == 2:
            total = total + weight * column_loss(student[n:], teacher[n:], t, alpha)
    return total
