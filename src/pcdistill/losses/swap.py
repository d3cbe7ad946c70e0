"""Label swap (LA): KD from a teacher whose logits of its best class and of the true class have changed places.

Source: the baseline called LA, class name SWAP, in the code released with "Knowledge Distillation with Refined Logits",
arXiv 2408.07703 (2024).
"""

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss, Needs

__all__ = ["SwapLoss", "swap_loss"]


def swap_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD after the teacher's errors have been put right by an exchange of two logits.

        z' = z_t with the entries at argmax(z_t) and at y exchanged     (z_t itself where the teacher is right)
        loss = T^2 * KL(softmax(z' / T) || softmax(z_s / T))

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N], required. Soft labels are refused: two single classes are exchanged.
        temperature: T > 0. Customary: 4 on CIFAR-100, 1 on ImageNet.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Zero if and only if the softened probabilities of z_s
        and z' are the same. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, target, temperature or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        The LA baseline in the released code of arXiv 2408.07703, which trains with this term alone: no cross-entropy.
    """
    check_logits(student_logits, teacher_logits)
    index = check_target(target, student_logits, hard_only=True)[:, None]
    check_temperature(temperature)
    z_t = upcast(teacher_logits.detach())
    best, position = z_t.max(dim=1, keepdim=True)
    swapped = z_t.scatter(1, position, z_t.gather(1, index)).scatter(1, index, best)
    log_q = (upcast(student_logits) / temperature).log_softmax(dim=1)
    log_p = (swapped / temperature).log_softmax(dim=1)
    per_sample = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return reduce_loss(per_sample * temperature**2, reduction)


class SwapLoss(LogitLoss):
    """Module form of :func:`swap_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return swap_loss(student_logits, teacher_logits, target, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}"
