"""Each method once more, written from its equations as plain loops over Python floats. Slow and obvious on purpose."""

import math


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((v - top) / temperature) for v in z]
    total = sum(e)
    return [v / total for v in e]


def log_softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    log_total = math.log(sum(math.exp((v - top) / temperature) for v in z))
    return [(v - top) / temperature - log_total for v in z]


def kl(teacher: list[float], student: list[float], temperature: float = 1.0) -> float:
    """KL(p || q) of two lists of logits, without tau^2."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
