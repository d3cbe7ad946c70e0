"""Label revision as loops: the samples are sorted into two heaps, each with its own mean."""

from tests.references import log_softmax, softmax


def revised_label(z_t: list[float], y: int, share: float) -> list[float]:
    p = softmax(z_t)
    b = share / (max(p) - p[y] + 1)
    return [b * p_c + (1 - b if c == y else 0.0) for c, p_c in enumerate(p)]


def revision(student, teacher, target, ce=1.0, logit=4.0, revised=1.0, share=0.8) -> float:
    right, wrong = [], []
    for z_s, z_t, y in zip(student, teacher, target, strict=True):
        if z_t[y] == max(z_t):
            square = sum((s - t) ** 2 for s, t in zip(z_s, z_t, strict=True)) / len(z_s)
            right.append(-ce * log_softmax(z_s)[y] + logit * square)
        else:
            label = revised_label(z_t, y, share)
            wrong.append(revised * sum((q - p) ** 2 for q, p in zip(softmax(z_s), label, strict=True)) / len(z_s))
    return sum(right) / max(len(right), 1) + sum(wrong) / max(len(wrong), 1)


def revision_gradient(student, teacher, target, ce=1.0, logit=4.0, revised=1.0, share=0.8) -> list[list[float]]:
    is_right = [z_t[y] == max(z_t) for z_t, y in zip(teacher, target, strict=True)]
    rows = []
    for z_s, z_t, y, right in zip(student, teacher, target, is_right, strict=True):
        count, classes, q = is_right.count(right), len(z_s), softmax(z_s)
        if right:
            row = [ce * (q[c] - (c == y)) + logit * 2 * (z_s[c] - z_t[c]) / classes for c in range(classes)]
        else:
            error = [q_c - p_c for q_c, p_c in zip(q, revised_label(z_t, y, share), strict=True)]
            mean = sum(e * q_c for e, q_c in zip(error, q, strict=True))
            row = [revised * 2 / classes * q_c * (e - mean) for e, q_c in zip(error, q, strict=True)]
        rows.append([v / count for v in row])
    return rows
