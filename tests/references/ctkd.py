"""CTKD as loops: KD, its derivative by the temperature, the sigmoid and the curriculum."""

import math

from tests.references import kl, softmax


def ctkd(student, teacher, temperature) -> list[float]:
    """`temperature` is one number, or a list with one for each sample."""
    each = temperature if isinstance(temperature, list) else [temperature] * len(student)
    return [t * t * kl(z_t, z_s, t) for z_s, z_t, t in zip(student, teacher, each, strict=True)]


def ctkd_gradient(student, teacher, temperature) -> list[list[float]]:
    """By the student's logits: T (q - p), never turned round."""
    rows = []
    for z_s, z_t in zip(student, teacher, strict=True):
        q, p = softmax(z_s, temperature), softmax(z_t, temperature)
        rows.append([temperature * (q_c - p_c) for q_c, p_c in zip(q, p, strict=True)])
    return rows


def slope(z_s: list[float], z_t: list[float], t: float) -> float:
    """d/dT of T^2 KL(p || q) for one sample, not turned round."""
    q, p = softmax(z_s, t), softmax(z_t, t)
    mean_t = sum(p_c * v for p_c, v in zip(p, z_t, strict=True))  # under p
    mean_s = sum(q_c * v for q_c, v in zip(q, z_s, strict=True))  # under q
    # d log p_c / dT = (mean_t - z_t,c) / T^2, the same for q with its own mean
    change = 0.0
    for p_c, q_c, s, v in zip(p, q, z_s, z_t, strict=True):
        d_log_p, d_log_q = (mean_t - v) / t**2, (mean_s - s) / t**2
        change += p_c * d_log_p * (math.log(p_c) - math.log(q_c)) + p_c * (d_log_p - d_log_q)
    return 2 * t * kl(z_t, z_s, t) + t * t * change


def theta_gradient(student, teacher, theta, reversal, low=1.0, high=21.0) -> float:
    """Gradient of the mean loss that reaches theta."""
    sigmoid = 1 / (1 + math.exp(-theta))
    t = low + (high - low) * sigmoid
    mean = sum(slope(z_s, z_t, t) for z_s, z_t in zip(student, teacher, strict=True)) / len(student)
    return -reversal * mean * (high - low) * sigmoid * (1 - sigmoid)


def reversal(epoch: float, length: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * min(epoch, length) / length))
