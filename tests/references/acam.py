"""ACAM-KD, ICCV 2025, as loops over its equations; the masks' sums divide, which is our reading."""

import math

from tests.references import pyramid


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def projected(x: list, weight: list) -> list:
    """[places][outputs] of a 1x1 convolution without bias, of x[d][i][j]."""
    depth, height, width = pyramid.size(x)
    places = [(i, j) for i in range(height) for j in range(width)]
    return [[sum(row[d] * x[d][i][j] for d in range(depth)) for row in weight] for i, j in places]


def dice(masks: list) -> float:
    total = 0.0
    for i, one in enumerate(masks):
        for j, other in enumerate(masks):
            if i != j:
                both = sum(a * b for a, b in zip(one, other, strict=True))
                total += 2 * both / (sum(a * a for a in one) + sum(b * b for b in other))
    return total


def image_loss(own: list, wanted: list, parts: dict, diversity: float) -> float:
    """One image and level; `parts` holds the weights query, key, value, and the units of channels and places."""
    depth, height, width = pyramid.size(own)
    length = height * width
    q, k, v = projected(wanted, parts["query"]), projected(own, parts["key"]), projected(own, parts["value"])
    root = math.sqrt(len(q[0]))
    fused = []
    for p in range(length):
        attention = pyramid.softmax([sum(a * b for a, b in zip(q[p], k[r], strict=True)) / root for r in range(length)])
        fused.append([sum(attention[r] * v[r][d] for r in range(length)) for d in range(depth)])
    means = [sum(fused[p][d] for p in range(length)) / length for d in range(depth)]
    channels = [[sigmoid(u[d] * means[d]) for d in range(depth)] for u in parts["channels"]]
    places = [[sigmoid(sum(u[d] * f[d] for d in range(depth))) for f in fused] for u in parts["places"]]
    error = [[(wanted[d][p // width][p % width] - own[d][p // width][p % width]) ** 2 for p in range(length)]
             for d in range(depth)]  # fmt: skip
    total = 0.0
    for mask in channels:
        masked = sum((mask[d] ** 2) * error[d][p] for d in range(depth) for p in range(length))
        total += masked / (length * sum(mask)) / len(channels)
    for mask in places:
        masked = sum((mask[p] ** 2) * error[d][p] for d in range(depth) for p in range(length))
        total += masked / (depth * sum(mask)) / len(places)
    return total + diversity * (dice(channels) + dice(places))


def acam(student_levels: list, teacher_levels: list, levels: list, diversity: float) -> float:
    total = 0.0
    for student, teacher, parts in zip(student_levels, teacher_levels, levels, strict=True):
        images = zip(student, teacher, strict=True)
        total += sum(image_loss(own, wanted, parts, diversity) for own, wanted in images) / len(student)
    return total
