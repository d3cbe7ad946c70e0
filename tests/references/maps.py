"""Layers as loops over nested lists, for the references of the feature losses: x[n][d][h][w]."""

from math import ceil, floor

from tests.references.scalars import Number, sqrt

Map = list[list[list[list[Number]]]]


def shape(x: Map) -> tuple[int, int, int, int]:
    return len(x), len(x[0]), len(x[0][0]), len(x[0][0][0])


def build(n: int, d: int, h: int, w: int, at) -> Map:
    """The map whose numbers are at(n, d, h, w)."""
    return [[[[at(i, c, r, q) for q in range(w)] for r in range(h)] for c in range(d)] for i in range(n)]


def pool(x: Map, h: int, w: int) -> Map:
    """Mean over the h x w bins that cover the map; bins may overlap by a pixel."""
    n, d, old_h, old_w = shape(x)

    def bin_mean(i: int, c: int, r: int, q: int) -> Number:
        rows = range(floor(r * old_h / h), ceil((r + 1) * old_h / h))
        columns = range(floor(q * old_w / w), ceil((q + 1) * old_w / w))
        return sum(x[i][c][a][b] for a in rows for b in columns) / (len(rows) * len(columns))

    return build(n, d, h, w, bin_mean)


def nearest(x: Map, h: int, w: int) -> Map:
    n, d, old_h, old_w = shape(x)
    return build(n, d, h, w, lambda i, c, r, q: x[i][c][r * old_h // h][q * old_w // w])


def smaller(a: Map, b: Map) -> tuple[Map, Map]:
    """Both at the smaller height and width."""
    h, w = min(shape(a)[2], shape(b)[2]), min(shape(a)[3], shape(b)[3])
    return pool(a, h, w), pool(b, h, w)


def conv(x: Map, weight: Map, bias: list[Number] | None = None, *, stride: int = 1, padding: int = 0) -> Map:
    n, d, h, w = shape(x)
    out, _, k_h, k_w = shape(weight)

    def at(i: int, o: int, r: int, q: int) -> Number:
        total = 0.0 if bias is None else bias[o]
        for c in range(d):
            for a in range(k_h):
                for b in range(k_w):
                    row, column = r * stride + a - padding, q * stride + b - padding
                    if 0 <= row < h and 0 <= column < w:
                        total = total + weight[o][c][a][b] * x[i][c][row][column]
        return total

    return build(n, out, (h + 2 * padding - k_h) // stride + 1, (w + 2 * padding - k_w) // stride + 1, at)


def batch_norm(x: Map, weight: list[Number], bias: list[Number], eps: float = 1e-5) -> Map:
    """As in training: by the mean and the biased variance of each channel over the batch."""
    n, d, h, w = shape(x)
    means, deviations = [], []
    for c in range(d):
        values = [x[i][c][r][q] for i in range(n) for r in range(h) for q in range(w)]
        mean = sum(values) / len(values)
        means.append(mean)
        deviations.append(sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps))
    return build(n, d, h, w, lambda i, c, r, q: (x[i][c][r][q] - means[c]) / deviations[c] * weight[c] + bias[c])


def relu(x: Map) -> Map:
    return build(*shape(x), lambda i, c, r, q: x[i][c][r][q] if x[i][c][r][q] > 0 else 0.0 * x[i][c][r][q])


def mse(a: Map, b: Map) -> list[Number]:
    """Mean squared difference, one value per sample."""
    n, d, h, w = shape(a)
    cells = [(c, r, q) for c in range(d) for r in range(h) for q in range(w)]
    return [sum((a[i][c][r][q] - b[i][c][r][q]) ** 2 for c, r, q in cells) / len(cells) for i in range(n)]
