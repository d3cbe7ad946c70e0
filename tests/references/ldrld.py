"""LDRLD as loops: pairs, the d-way group and the rest, each with its own softmax."""

import math

from tests.references import kl, softmax


def pair_weight(i: int, j: int, scale: float = 2.0, offset: float = 1.5, decay: float = 0.05) -> float:
    """Weight of the classes of rank i < j, counted from 1."""
    return scale / (offset + abs(i - j)) * math.exp(-decay * (i + j))


def groups(z_s: list[float], d: int, local: float, rest: float, averaged: bool, weights: tuple[float, float, float]):
    """(weight, classes) of every group of one sample."""
    ranked = sorted(range(len(z_s)), key=lambda c: (-z_s[c], c))
    found = []
    for i in range(1, d + 1):
        for j in range(i + 1, d + 1):
            found.append((pair_weight(i, j, *weights), [ranked[i - 1], ranked[j - 1]]))
    found.append((1.0, ranked[:d]))
    count = len(found) if averaged else 1
    return [(local * w / count, classes) for w, classes in found] + [(rest, ranked[d:])]


def ldrld(student, teacher, t=4.0, d=7, local=10.5, rest=7.0, averaged=True, weights=(2.0, 1.5, 0.05)) -> list[float]:
    losses = []
    for z_s, z_t in zip(student, teacher, strict=True):
        total = 0.0
        for weight, classes in groups(z_s, d, local, rest, averaged, weights):
            total += weight * t * t * kl([z_t[c] for c in classes], [z_s[c] for c in classes], t)
        losses.append(total)
    return losses


def ldrld_gradient(
    student, teacher, t=4.0, d=7, local=10.5, rest=7.0, averaged=True, weights=(2.0, 1.5, 0.05)
) -> list[list[float]]:
    """The order of the classes is a constant; each group sends back T (q - p) over its own classes."""
    rows = []
    for z_s, z_t in zip(student, teacher, strict=True):
        row = [0.0] * len(z_s)
        for weight, classes in groups(z_s, d, local, rest, averaged, weights):
            q, p = softmax([z_s[c] for c in classes], t), softmax([z_t[c] for c in classes], t)
            for c, q_c, p_c in zip(classes, q, p, strict=True):
                row[c] += weight * t * (q_c - p_c)
        rows.append(row)
    return rows
