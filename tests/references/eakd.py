"""EA-KD from arXiv 2311.13621, as a loop: entropies of both networks, and the weight that they give a sample."""

import math

from tests.references import log_softmax


def entropy(z: list[float], temperature: float) -> float:
    return -sum(math.exp(v) * v for v in log_softmax(z, temperature))


def weights(
    student: list[list[float]], teacher: list[list[float]], temperature: float, max_entropy: float | None = None
) -> list[float]:
    """H_t (1 + H_s / H_ub) / 2, one value per sample; H_ub is log C unless it is given."""
    return [
        entropy(z_t, temperature) * (1 + entropy(z_s, temperature) / (max_entropy or math.log(len(z_s)))) / 2
        for z_s, z_t in zip(student, teacher, strict=True)
    ]
