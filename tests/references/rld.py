"""RLD as loops: a two-way divergence, and KD among the classes that the teacher puts below the true one."""

import math

from tests.references import kl, softmax


def one_and_rest(z: list[float], c: int, t: float) -> tuple[float, float]:
    """Log-probability of class c and of all others together; the rest is a sum, never 1 - p."""
    top = max(z)
    log_total = math.log(sum(math.exp((v - top) / t) for v in z))
    others = [v for i, v in enumerate(z) if i != c]
    top_other = max(others)
    log_rest = math.log(sum(math.exp((v - top_other) / t) for v in others)) + (top_other - top) / t - log_total
    return (z[c] - top) / t - log_total, log_rest


def below(z_t: list[float], y: int) -> list[int]:
    return [c for c in range(len(z_t)) if z_t[c] < z_t[y]]


def scd(z_s: list[float], z_t: list[float], y: int, t: float) -> float:
    best = max(range(len(z_t)), key=lambda c: z_t[c])
    log_p, log_not_p = one_and_rest(z_t, best, t)
    log_q, log_not_q = one_and_rest(z_s, y, t)
    return t * t * (math.exp(log_p) * (log_p - log_q) + math.exp(log_not_p) * (log_not_p - log_not_q))


def mcd(z_s: list[float], z_t: list[float], y: int, t: float) -> float:
    inside = below(z_t, y)
    return t * t * kl([z_t[c] for c in inside], [z_s[c] for c in inside], t) if inside else 0.0


def rld(student, teacher, target, t=4.0, tc=1.0, scd_weight=1.0, mcd_weight=8.0) -> list[float]:
    return [
        scd_weight * scd(z_s, z_t, y, tc) + mcd_weight * mcd(z_s, z_t, y, t)
        for z_s, z_t, y in zip(student, teacher, target, strict=True)
    ]


def rld_gradient(student, teacher, target, t=4.0, tc=1.0, scd_weight=1.0, mcd_weight=8.0) -> list[list[float]]:
    """SCD: Tc (q_y - p_max) on y, and the opposite on the others, shared out as the student does; MCD: T (q - p)."""
    rows = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        p_max = max(softmax(z_t, tc))
        q_y = softmax(z_s, tc)[y]
        others = [c for c in range(len(z_s)) if c != y]
        share = softmax([z_s[c] for c in others], tc)
        row = [0.0] * len(z_s)
        row[y] += scd_weight * tc * (q_y - p_max)
        for c, part in zip(others, share, strict=True):
            row[c] -= scd_weight * tc * (q_y - p_max) * part
        inside = below(z_t, y)
        if inside:
            q, p = softmax([z_s[c] for c in inside], t), softmax([z_t[c] for c in inside], t)
            for c, q_c, p_c in zip(inside, q, p, strict=True):
                row[c] += mcd_weight * t * (q_c - p_c)
        rows.append(row)
    return rows
