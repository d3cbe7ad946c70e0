"""NKD (without its cross-entropy term) from arXiv 2303.13005, as a loop."""

from tests.references.scalars import Number, Rows, exp, log_softmax


def nkd(
    student: Rows,
    teacher: Rows,
    target: list[int],
    temperature: float,
    target_weight: float,
    gamma: float,
) -> list[Number]:
    losses = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        own = -exp(log_softmax(z_t)[y]) * log_softmax(z_s)[y]
        others = [c for c in range(len(z_s)) if c != y]
        log_p = log_softmax([z_t[c] for c in others], temperature)
        log_q = log_softmax([z_s[c] for c in others], temperature)
        rest = -sum(exp(a) * b for a, b in zip(log_p, log_q, strict=True))
        losses.append(target_weight * own + gamma * temperature**2 * rest)
    return losses
