"""DKD from arXiv 2203.08679, section 3, as a loop: the target part and the non-target part, each times T^2."""

from tests.references.scalars import Number, Rows, exp, kl, log, plain


def binary_kl(teacher: list[Number], student: list[Number], y: int, temperature: float) -> Number:
    """KL between [p_y, 1 - p_y] and [q_y, 1 - q_y], with 1 - p_y summed over the other classes."""

    def target_or_not(z: list[Number]) -> list[Number]:
        top = max(plain(v) for v in z)
        e = [exp((v - top) / temperature) for v in z]
        rest = sum(v for c, v in enumerate(e) if c != y)
        return [e[y] / (e[y] + rest), rest / (e[y] + rest)]

    pairs = zip(target_or_not(teacher), target_or_not(student), strict=True)
    return sum(p * (log(p) - log(q)) for p, q in pairs)


def parts(student: Rows, teacher: Rows, target: list[int], temperature: float) -> list[tuple[Number, Number]]:
    """(TCKD, NCKD), one pair per sample."""
    values = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        others_s = [v for c, v in enumerate(z_s) if c != y]
        others_t = [v for c, v in enumerate(z_t) if c != y]
        tckd = temperature**2 * binary_kl(z_t, z_s, y, temperature)
        values.append((tckd, temperature**2 * kl(others_t, others_s, temperature)))
    return values


def dkd(student: Rows, teacher: Rows, target: list[int], temperature: float, alpha: float, beta: float) -> list[Number]:
    return [alpha * tckd + beta * nckd for tckd, nckd in parts(student, teacher, target, temperature)]
