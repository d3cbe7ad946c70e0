"""RC as loops: two teachers, one of them made of the student."""

from tests.references import kl, softmax


def corrected(z_s: list[float], y: int) -> list[float]:
    return [v + max(z_s) if c == y else v for c, v in enumerate(z_s)]


def rc(student, teacher, target, t=4.0, teacher_weight=1.0, self_weight=0.1) -> list[float]:
    return [
        t * t * (teacher_weight * kl(z_t, z_s, t) + self_weight * kl(corrected(z_s, y), z_s, t))
        for z_s, z_t, y in zip(student, teacher, target, strict=True)
    ]


def rc_gradient(student, teacher, target, t=4.0, teacher_weight=1.0, self_weight=0.1) -> list[list[float]]:
    rows = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        q, p, r = softmax(z_s, t), softmax(z_t, t), softmax(corrected(z_s, y), t)
        rows.append(
            [
                t * (teacher_weight * (q_c - p_c) + self_weight * (q_c - r_c))
                for q_c, p_c, r_c in zip(q, p, r, strict=True)
            ]
        )
    return rows
