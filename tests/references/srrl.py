"""Softmax regression representation learning, ICLR 2021: squared errors of the features and of the logits they give."""

from tests.references import maps
from tests.references.scalars import Number, Rows, dot


def srrl(
    student: Rows, teacher: Rows, predicted: Rows, logits: Rows, feature_weight: float, regression_weight: float
) -> list[Number]:
    def mse(a: list[Number], b: list[Number]) -> Number:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)

    rows = zip(student, teacher, predicted, logits, strict=True)
    return [feature_weight * mse(h_s, h_t) + regression_weight * mse(p, z) for h_s, h_t, p, z in rows]


def connect(student: maps.Map, weight: maps.Map) -> Rows:
    """1x1 convolution, batch normalisation with weight 1 and bias 0, ReLU, mean over places."""
    d = len(weight)
    x = maps.relu(maps.batch_norm(maps.conv(student, weight), [1.0] * d, [0.0] * d))
    return [[channel[0][0] for channel in sample] for sample in maps.pool(x, 1, 1)]


def classify(embedding: Rows, weight: Rows, bias: list[Number]) -> Rows:
    return [[dot(row, x) + b for row, b in zip(weight, bias, strict=True)] for x in embedding]
