"""PLD from arXiv 2506.12542, as a loop over the places of the ranking: each is a choice among what is left."""

from tests.references.scalars import Number, Rows, exp, log, plain, softmax


def ranking(teacher: list[float], y: int) -> list[int]:
    """The label, then the other classes by falling teacher logit, equal ones by index."""
    return [y, *sorted((c for c in range(len(teacher)) if c != y), key=lambda c: (-teacher[c], c))]


def pld(student: Rows, teacher: list[list[float]], target: list[int], temperature: float) -> list[Number]:
    """One value per sample."""
    values = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        weights, left = softmax(z_t, temperature), ranking(z_t, y)
        total: Number = 0.0
        while left:
            top = max(plain(z_s[c]) for c in left)
            log_total = top + log(sum(exp(z_s[c] - top) for c in left))
            chosen, *rest = left
            total = total + weights[chosen] * (log_total - z_s[chosen])
            left = rest
        values.append(total)
    return values


def pld_gradient(student: list[list[float]], teacher: list[list[float]], target: list[int], t: float) -> Rows:
    """d loss_n / d z_s: every choice pulls with its weight towards the chosen class, from those that were left."""
    rows = []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        weights, left = softmax(z_t, t), ranking(z_t, y)
        row = [0.0] * len(z_s)
        while left:
            chosen = left[0]
            for c, q in zip(left, softmax([z_s[c] for c in left]), strict=True):
                row[c] += weights[chosen] * (q - (c == chosen))
            left = left[1:]
        rows.append(row)
    return rows
