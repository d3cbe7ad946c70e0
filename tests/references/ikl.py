"""IKL-KD from arXiv 2305.13948: the double sum over pairs of classes, the soft target, and the mean of every class."""

from tests.references.scalars import Number, Rows, log_softmax, softmax


def pairs(z_s: list[Number], z_t: list[float], w: list[float]) -> Number:
    """1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2."""
    classes = range(len(z_s))
    return sum(w[j] * w[k] * ((z_t[j] - z_t[k]) - (z_s[j] - z_s[k])) ** 2 for j in classes for k in classes) / 4


def soft(z_s: list[Number], z_t: list[float], temperature: float) -> Number:
    return -sum(p * log_q for p, log_q in zip(softmax(z_t, temperature), log_softmax(z_s, temperature), strict=True))


def class_means(teacher: list[list[float]], target: list[int], temperature: float) -> dict[int, list[float]]:
    """Of every class that occurs, the mean of its samples' softmax."""
    means = {}
    for y in set(target):
        rows = [softmax(z, temperature) for z, label in zip(teacher, target, strict=True) if label == y]
        means[y] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return means


def ikl(
    student: Rows,
    teacher: list[list[float]],
    weights: list[list[float]],
    *,
    pair_weight: float,
    ce_weight: float,
    t: float,
) -> list[Number]:
    """One value per sample, each with its row of weights."""
    rows = zip(student, teacher, weights, strict=True)
    return [pair_weight * pairs(z_s, z_t, w) + ce_weight * soft(z_s, z_t, t) for z_s, z_t, w in rows]


def ikl_gradient(
    student: list[list[float]],
    teacher: list[list[float]],
    weights: list[list[float]],
    *,
    pair_weight: float,
    ce_weight: float,
    t: float,
) -> Rows:
    """d loss_n / d z_s,i = -a w_i sum_k w_k (d_i - d_k) + b (q_i - p_i) / T."""
    gradients = []
    for z_s, z_t, w in zip(student, teacher, weights, strict=True):
        d = [a - b for a, b in zip(z_t, z_s, strict=True)]
        p, q = softmax(z_t, t), softmax(z_s, t)
        pulls = [w[i] * sum(w_k * (d[i] - d_k) for w_k, d_k in zip(w, d, strict=True)) for i in range(len(d))]
        gradients.append([-pair_weight * pulls[i] + ce_weight * (q[i] - p[i]) / t for i in range(len(d))])
    return gradients
