"""RC: KD with a second teacher, the student's own logits after the true class has been raised above all others.

Source: the baseline called RC in the code released with "Knowledge Distillation with Refined Logits",
arXiv 2408.07703 (2024). The method's own paper was not found; the definition is that code's.
"""

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    check_weight,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss, Needs

__all__ = ["RCLoss", "rc_loss"]


def rc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    teacher_weight: float = 1.0,
    self_weight: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD from the teacher, and KD from the student's own corrected logits.

        r_c  = z_s,c  for c != y,   r_y = z_s,y + max_c z_s,c                                     (r is a constant)
        loss = T^2 * (teacher_weight * KL(softmax(z_t / T) || q) + self_weight * KL(softmax(r / T) || q))
        q    = softmax(z_s / T)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N], required. Soft labels are refused: one class is raised.
        temperature: T > 0. Customary: 4 on CIFAR-100, 1 on ImageNet.
        teacher_weight: weight of the teacher's part.
        self_weight: weight of the student's own part.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Never negative. N = 0 gives 0. A constant added to the
        student's logits changes the second part: r_y grows by twice as much. Where the student's largest logit is
        negative, the true class is lowered instead of raised. Both are the definition's, kept as published.

    Raises:
        ValueError: a shape, device, target, temperature, weight or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        The RC baseline in the released code of arXiv 2408.07703; weights 1 and 0.1 beside cross-entropy.
    """
    check_logits(student_logits, teacher_logits)
    index = check_target(target, student_logits, hard_only=True)[:, None]
    check_temperature(temperature)
    check_weight(teacher_weight, "teacher_weight")
    check_weight(self_weight, "self_weight")
    z_s, z_t = upcast(student_logits), upcast(teacher_logits.detach())
    fixed = z_s.detach()
    corrected = fixed.scatter(1, index, fixed.gather(1, index) + fixed.amax(dim=1, keepdim=True))
    log_q = (z_s / temperature).log_softmax(dim=1)
    per_sample = teacher_weight * _kl(z_t / temperature, log_q) + self_weight * _kl(corrected / temperature, log_q)
    return reduce_loss(per_sample * temperature**2, reduction)


def _kl(logits: Tensor, log_q: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


class RCLoss(LogitLoss):
    """Module form of :func:`rc_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        teacher_weight: float = 1.0,
        self_weight: float = 0.1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weight(teacher_weight, "teacher_weight")
        check_weight(self_weight, "self_weight")
        check_reduction(reduction)
        self.temperature = temperature
        self.teacher_weight = teacher_weight
        self.self_weight = self_weight
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return rc_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            teacher_weight=self.teacher_weight,
            self_weight=self.self_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, teacher_weight={self.teacher_weight:g}, "
            f"self_weight={self.self_weight:g}, reduction={self.reduction!r}"
        )
