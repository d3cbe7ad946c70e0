"""FGD, arXiv 2111.11837, section 3: focal loss on foreground and background, attention loss, relation loss."""

import math

from tests.references import pyramid


def masks(boxes: list, level_size: tuple, image_size: tuple) -> tuple[list, list]:
    """Foreground: 1 / cells of the smallest box that covers a place; background: 1 / places in no box."""
    height, width = level_size
    foreground = [[0.0] * width for _ in range(height)]
    for box in boxes:
        x0, y0, x1, y1 = pyramid.cells(box, level_size, image_size)
        share = 1.0 / ((x1 - x0 + 1) * (y1 - y0 + 1))
        for i in range(max(y0, 0), min(y1, height - 1) + 1):
            for j in range(max(x0, 0), min(x1, width - 1) + 1):
                foreground[i][j] = max(foreground[i][j], share)
    free = sum(v == 0 for row in foreground for v in row)
    return foreground, [[(v == 0) / max(free, 1) for v in row] for row in foreground]


def context(x: list, block: dict) -> list:
    """R(F): F plus a vector made of the attention-weighted mean place."""
    depth, height, width = pyramid.size(x)
    scores = [
        block["score_bias"] + sum(block["score"][d] * x[d][i][j] for d in range(depth))
        for i in range(height)
        for j in range(width)
    ]
    shares = pyramid.softmax(scores)
    mean = [sum(shares[i * width + j] * x[d][i][j] for i in range(height) for j in range(width)) for d in range(depth)]
    inner = [
        b + sum(w * m for w, m in zip(row, mean, strict=True)) for row, b in zip(block["w1"], block["b1"], strict=True)
    ]
    centre = sum(inner) / len(inner)
    deviation = math.sqrt(sum((v - centre) ** 2 for v in inner) / len(inner) + 1e-5)
    normal = [
        max((v - centre) / deviation * g + b, 0.0) for v, g, b in zip(inner, block["gain"], block["shift"], strict=True)
    ]
    added = [
        b + sum(w * v for w, v in zip(row, normal, strict=True))
        for row, b in zip(block["w2"], block["b2"], strict=True)
    ]
    return [[[v + add for v in row] for row in plane] for plane, add in zip(x, added, strict=True)]


def fgd(
    student_levels: list,
    teacher_levels: list,
    boxes: list,
    image_size: tuple,
    temperature: float,
    weights: dict,
    contexts: list,
) -> float:
    """`contexts[level]` holds the student's and the teacher's block; `boxes[n]` the boxes of an image."""
    total = 0.0
    for students, teachers, (own_block, wanted_block) in zip(student_levels, teacher_levels, contexts, strict=True):
        for x, y, image_boxes in zip(students, teachers, boxes, strict=True):
            depth, height, width = pyramid.size(x)
            foreground, background = masks(image_boxes, (height, width), image_size)
            places, channels = pyramid.spatial_attention(y, temperature), pyramid.channel_attention(y, temperature)
            own_places = pyramid.spatial_attention(x, temperature)
            own_channels = pyramid.channel_attention(x, temperature)
            value = 0.0
            for d in range(depth):
                for i in range(height):
                    for j in range(width):
                        error = places[i][j] * channels[d] * (x[d][i][j] - y[d][i][j]) ** 2
                        value += weights["foreground"] * foreground[i][j] * error
                        value += weights["background"] * background[i][j] * error
            value += weights["attention"] * sum(abs(a - b) for a, b in zip(own_channels, channels, strict=True))
            for i in range(height):
                for j in range(width):
                    value += weights["attention"] * abs(own_places[i][j] - places[i][j])
            value += weights["relation"] * pyramid.squared_error([context(x, own_block)], [context(y, wanted_block)])
            total += value / len(students)
    return total
