"""SimKD, arXiv 2203.14001: squared error of the projected map, and the student's logits by the teacher's classifier."""

from tests.references import maps
from tests.references.scalars import Number, Rows, dot


def simkd(student: maps.Map, teacher: maps.Map) -> list[Number]:
    return maps.mse(*maps.smaller(student, teacher))


def project(student: maps.Map, weights: list[maps.Map], size: tuple[int, int]) -> maps.Map:
    """Pooled; then 1x1, 3x3 and 1x1 convolutions, each with batch normalisation (weight 1, bias 0) and ReLU."""
    x = maps.pool(student, *size)
    for weight in weights:
        d = len(weight)
        x = maps.conv(x, weight, padding=len(weight[0][0]) // 2)
        x = maps.relu(maps.batch_norm(x, [1.0] * d, [0.0] * d))
    return x


def classify(projected: maps.Map, weight: Rows, bias: list[Number]) -> Rows:
    pooled = [[channel[0][0] for channel in sample] for sample in maps.pool(projected, 1, 1)]
    return [[dot(row, x) + b for row, b in zip(weight, bias, strict=True)] for x in pooled]
