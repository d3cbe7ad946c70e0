"""What the code released with the PCD paper computes, kept for comparison; :mod:`pcdistill.losses.pcd` is the paper.

Source: the code released with Li, Li, Zhang, Xu, "Progressive Class-level Distillation", arXiv 2505.24310 (2025).
"""

from torch import Tensor, nn

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    reduce_loss,
    upcast,
)
from pcdistill.losses.base import LogitLoss
from pcdistill.ops.segments import check_stages

__all__ = ["PCDReleasedLoss", "pcd_released_loss"]


def pcd_released_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    stages: int = 3,
    reduction: Reduction = "mean",
) -> Tensor:
    """Plain KD times a cosine factor: what the released PCD code amounts to.

        loss_n = 2 S T^2 * mean_m KL(p_m || q_m) * (1 - cos(p_n, log q_n))

    Its block size is C, so that every group but the first is empty and nothing is ranked; its weight compares
    probabilities with log-probabilities; and the weight of one sample multiplies the divergence of the whole batch.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        temperature: T > 0. Customary: 4 on CIFAR-100.
        stages: S >= 1; here only the factor 2 S, once per stage and direction.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, number of stages or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        The released code of arXiv 2505.24310, not the paper.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    check_reduction(reduction)
    check_stages(stages)
    log_q = (upcast(student_logits) / temperature).log_softmax(dim=1)
    log_p = (upcast(teacher_logits.detach()) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    mean_kl = (p * (log_p - log_q)).sum() / max(len(p), 1)
    cosine = nn.functional.cosine_similarity(p, log_q, dim=1)
    per_sample = 2 * stages * temperature**2 * mean_kl * (1 - cosine)
    return reduce_loss(per_sample, reduction)


class PCDReleasedLoss(LogitLoss):
    """Module form of :func:`pcd_released_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(self, *, temperature: float = 4.0, stages: int = 3, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_stages(stages)
        check_reduction(reduction)
        self.temperature = temperature
        self.stages = stages
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return pcd_released_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            stages=self.stages,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, stages={self.stages}, reduction={self.reduction!r}"
