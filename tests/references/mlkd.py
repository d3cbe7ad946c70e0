"""MLKD (CVPR 2023) as loops: per-sample and per-class terms of one view, then the sum over views and temperatures."""

import statistics

from tests.references.scalars import Number, Rows, columns, dot, kl, mean, plain, softmax


def gram(rows: Rows) -> Rows:
    return [[dot(a, b) for b in rows] for a in rows]


def gram_rows(p: Rows, q: Rows) -> list[Number]:
    """Squared distance of each row of the two Gram matrices."""
    pairs = zip(gram(p), gram(q), strict=True)
    return [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in pairs]


def masks(teacher: Rows) -> tuple[list[int], list[int]]:
    p = [softmax(z) for z in teacher]
    samples = [plain(max(row)) for row in p]
    classes = [plain(sum(column)) for column in columns(p)]
    return tuple([int(v <= statistics.median(values)) for v in values] for values in (samples, classes))


def terms(student: Rows, teacher: Rows, temperature: float) -> tuple[list[Number], list[Number], list[Number]]:
    """(KL times T^2 of each sample, batch term of each sample, class term of each class)."""
    q, p = ([softmax(z, temperature) for z in rows] for rows in (student, teacher))
    instance = [temperature**2 * kl(z_t, z_s, temperature) for z_s, z_t in zip(student, teacher, strict=True)]
    return instance, gram_rows(p, q), gram_rows(columns(p), columns(q))


def mlkd(
    student: Rows,
    teacher: Rows,
    temperatures: list[float],
    *,
    views: int = 2,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    masked: bool = True,
    released: bool = False,
) -> Number:
    """The sum over temperatures; weights are those of the instance, batch and class terms."""
    n = len(student) // views
    weak = student[:n], teacher[:n]
    of_samples, of_classes = masks(weak[1])
    if not masked:
        of_samples, of_classes = [1] * n, [1] * len(of_classes)
    total = 0.0
    for i, temperature in enumerate(temperatures):
        instance, batch, classes = terms(*weak, temperature)
        if released:
            total = total + weights[0] * mean(instance) * mean(of_samples)
            total = total + weights[1] * mean(batch) * mean(of_samples) + weights[2] * mean(classes) * mean(of_classes)
        else:
            kept = zip(of_samples, instance, batch, strict=True)
            total = total + mean([m * (weights[0] * a + weights[1] * b) for m, a, b in kept])
            total = total + weights[2] * mean([k * v for k, v in zip(of_classes, classes, strict=True)])
        if views == 2:
            strong = terms(student[n:], teacher[n:], temperature)[0]
            wrong = released and i in (1, 4)
            total = total + weights[0] * mean(instance if wrong else strong)
    return total
