"""Label swap as a loop: exchange two numbers, then KD."""

from tests.references import kl, softmax


def swapped(z_t: list[float], y: int) -> list[float]:
    best = max(range(len(z_t)), key=lambda c: z_t[c])
    z = list(z_t)
    z[best], z[y] = z[y], z[best]
    return z


def swap(student, teacher, target, t=4.0) -> list[float]:
    return [t * t * kl(swapped(z_t, y), z_s, t) for z_s, z_t, y in zip(student, teacher, target, strict=True)]


def swap_gradient(student, teacher, target, t=4.0) -> list[list[float]]:
    rows = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        q, p = softmax(z_s, t), softmax(swapped(z_t, y), t)
        rows.append([t * (q_c - p_c) for q_c, p_c in zip(q, p, strict=True)])
    return rows
