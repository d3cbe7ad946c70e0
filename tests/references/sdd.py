"""SDD as loops: cells of a map one by one, and a loss in each of them."""

import math

from tests.references import kl, log_softmax, softmax

Options = dict[str, float]


def cells(feature_map, weight, bias, scales) -> list[list[float]]:
    """Logits [C][M] of one map [D][H][W] whose sides the scales divide; weight [C][D], bias [C]."""
    height, width = len(feature_map[0]), len(feature_map[0][0])
    columns = []
    for s in scales:
        for i in range(s):
            for j in range(s):
                rows = range(i * height // s, (i + 1) * height // s)
                places = [(y, x) for y in rows for x in range(j * width // s, (j + 1) * width // s)]
                mean = [sum(channel[y][x] for y, x in places) / len(places) for channel in feature_map]
                columns.append(
                    [b + sum(a * v for a, v in zip(w, mean, strict=True)) for w, b in zip(weight, bias, strict=True)]
                )
    return [[column[c] for column in columns] for c in range(len(weight))]


def others(z: list[float], y: int) -> list[float]:
    return [v for c, v in enumerate(z) if c != y]


def base_loss(base: str, z_s: list[float], z_t: list[float], y: int, options: Options) -> float:
    t = options["temperature"]
    if base == "kd":
        return t * t * kl(z_t, z_s, t)
    a, b = options["target_weight"], options["non_target_weight"]
    if base == "dkd":
        p_y, q_y = softmax(z_t, t)[y], softmax(z_s, t)[y]
        binary = p_y * math.log(p_y / q_y) + (1 - p_y) * math.log((1 - p_y) / (1 - q_y))
        return t * t * (a * binary + b * kl(others(z_t, y), others(z_s, y), t))
    rest = sum(p * log_q for p, log_q in zip(softmax(others(z_t, y), t), log_softmax(others(z_s, y), t), strict=True))
    return -a * softmax(z_t)[y] * log_softmax(z_s)[y] - b * t * t * rest


def base_gradient(base: str, z_s: list[float], z_t: list[float], y: int, options: Options) -> list[float]:
    t = options["temperature"]
    q, p = softmax(z_s, t), softmax(z_t, t)
    if base == "kd":
        return [t * (q_c - p_c) for q_c, p_c in zip(q, p, strict=True)]
    a, b = options["target_weight"], options["non_target_weight"]
    share_s, share_t = softmax(others(z_s, y), t), softmax(others(z_t, y), t)
    rest = [b * t * (s - r) for s, r in zip(share_s, share_t, strict=True)]
    if base == "dkd":
        target_part = a * t * (q[y] - p[y])
        rest = [v - target_part * s for v, s in zip(rest, share_s, strict=True)]
    else:
        q_one, p_y = softmax(z_s), softmax(z_t)[y]
        target_part = a * p_y * (q_one[y] - 1)
        rest = [v + a * p_y * q_c for v, q_c in zip(rest, others(q_one, y), strict=True)]
    return [*rest[:y], target_part, *rest[y:]]


def columns(sample: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*sample, strict=True)]


def weights(z_t: list[list[float]], y: int, conflict: float) -> list[float]:
    """`z_t` is [M][C]."""
    right = [z[y] == max(z) for z in z_t]
    return [1.0 if r == right[0] else conflict for r in right]


def sdd(student, teacher, target, base: str, options: Options, conflict=2.0) -> list[float]:
    """`student` and `teacher` are [N][C][M]."""
    losses = []
    for z_s, z_t, y in zip(map(columns, student), map(columns, teacher), target, strict=True):
        w = weights(z_t, y, conflict)
        each = [w_m * base_loss(base, s, t, y, options) for w_m, s, t in zip(w, z_s, z_t, strict=True)]
        losses.append(sum(each) / len(each))
    return losses


def sdd_gradient(student, teacher, target, base: str, options: Options, conflict=2.0) -> list[list[list[float]]]:
    rows = []
    for z_s, z_t, y in zip(map(columns, student), map(columns, teacher), target, strict=True):
        w = weights(z_t, y, conflict)
        each = [
            [w_m / len(w) * v for v in base_gradient(base, s, t, y, options)]
            for w_m, s, t in zip(w, z_s, z_t, strict=True)
        ]
        rows.append(columns(each))
    return rows
