"""Knowledge distillation (KD): the student matches the teacher's softened class probabilities.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531 (2015), section 2.
"""

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss

__all__ = ["KDLoss", "kd_loss"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence between softened teacher and student probabilities, times the squared temperature.

        p = softmax(z_t / T)    q = softmax(z_s / T)    loss = T^2 * sum_c p_c * (log p_c - log q_c)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        temperature: T > 0, no unit. Customary: 4 on CIFAR-100, 1 on ImageNet.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Zero if and only if p = q. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 1503.02531, section 2. T^2 keeps the gradient's size independent of T, as there.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    log_q = (upcast(student_logits) / temperature).log_softmax(dim=1)
    log_p = (upcast(teacher_logits.detach()) / temperature).log_softmax(dim=1)
    per_sample = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return reduce_loss(per_sample * temperature**2, reduction)


class KDLoss(LogitLoss):
    """Module form of :func:`kd_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return kd_loss(student_logits, teacher_logits, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}"
