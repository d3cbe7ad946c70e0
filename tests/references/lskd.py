"""Logit standardisation from arXiv 2403.01427, as a loop; ddof 0 is the paper's deviation, 1 the released code's."""

import math

from tests.references import kl


def standardize(logits: list[list[float]], ddof: int) -> list[list[float]]:
    rows = []
    for z in logits:
        mean = math.fsum(z) / len(z)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in z) / (len(z) - ddof))
        rows.append([(v - mean) / (deviation + 1e-7) for v in z])
    return rows


def lskd(student: list[list[float]], teacher: list[list[float]], temperature: float, ddof: int) -> list[float]:
    rows = zip(standardize(student, ddof), standardize(teacher, ddof), strict=True)
    return [temperature**2 * kl(z_t, z_s, temperature) for z_s, z_t in rows]
