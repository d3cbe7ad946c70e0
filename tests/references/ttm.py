"""TTM and WTTM as loops over the equation: powers of probabilities, not tempered logits."""

import math

from tests.references import log_softmax, softmax


def transformed(z_t: list[float], power: float) -> tuple[list[float], float]:
    """p^g / U and U; by logarithms only where p^g would be a power of zero."""
    powers = [math.exp(power * log_p) for log_p in log_softmax(z_t)]
    total = sum(powers)
    return [v / total for v in powers], total


def ttm(student, teacher, power=0.1, weighted=False) -> list[float]:
    losses = []
    for z_s, z_t in zip(student, teacher, strict=True):
        p, total = transformed(z_t, power)
        log_q = log_softmax(z_s)
        kl = sum(p_c * (math.log(p_c) - log_q_c) for p_c, log_q_c in zip(p, log_q, strict=True) if p_c > 0)
        losses.append(kl * total if weighted else kl)
    return losses


def ttm_gradient(student, teacher, power=0.1, weighted=False) -> list[list[float]]:
    rows = []
    for z_s, z_t in zip(student, teacher, strict=True):
        p, total = transformed(z_t, power)
        factor = total if weighted else 1.0
        rows.append([factor * (q_c - p_c) for q_c, p_c in zip(softmax(z_s), p, strict=True)])
    return rows
