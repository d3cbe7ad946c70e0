"""Logit standardisation (LSKD): the student matches the shape of the teacher's logits, not their size.

Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", arXiv 2403.01427 (2024).
"""

import torch
from torch import Tensor, nn

from pcdistill.losses._common import Reduction, check_logits, check_reduction, check_temperature, upcast
from pcdistill.losses._wrapper import WrappedLoss
from pcdistill.losses.base import LogitLoss
from pcdistill.losses.kd import kd_loss

__all__ = ["LSKDLoss", "StandardizedLoss", "lskd_loss", "standardize_logits"]

EPSILON = 1e-7  # as in the released code; it only matters for rows that are almost constant


def standardize_logits(logits: Tensor, *, unbiased: bool = True) -> Tensor:
    """Z-score of each sample's logits over the classes.

        z' = (z - mean(z)) / (std(z) + 1e-7)

    Args:
        logits: z, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        unbiased: divide the variance by C - 1, as the released code does; False divides by C, as the paper writes.

    Returns:
        [N, C], float32 or float64. A constant row gives zeros and no gradient (our choice: its z-score is 0 / 0, and
        dividing by 1e-7 instead would send back gradients that half precision cannot hold).

    Source:
        arXiv 2403.01427, section 4. The default is the released code's, which made the published numbers; the two
        differ by the constant factor sqrt(C / (C - 1)).
    """
    z = upcast(logits)
    centred = z - z.mean(dim=1, keepdim=True)
    flat = (z == z[:, :1]).all(dim=1, keepdim=True)
    # Scaling by the largest magnitude first keeps the squares of tiny or huge logits inside the range of float32.
    size = centred.detach().abs().amax(dim=1, keepdim=True).masked_fill(flat, 1.0)
    square_sum = (centred / size).square().sum(dim=1, keepdim=True).masked_fill(flat, 1.0)
    std = size * (square_sum / (z.shape[1] - int(unbiased))).sqrt()
    return torch.where(flat, torch.zeros_like(z), centred / (std + EPSILON))


class StandardizedLoss(WrappedLoss):
    """Any logit loss, on standardised logits: both inputs pass :func:`standardize_logits`, then the loss sees them.

    Args:
        loss: a module with forward(student_logits, teacher_logits, target=None). Its parameters stay its own, and
            its needs, its temperature and its `set_progress` are passed on.
        unbiased: as in :func:`standardize_logits`.
    """

    def __init__(self, loss: nn.Module, *, unbiased: bool = True) -> None:
        super().__init__(loss)
        self.unbiased = unbiased

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        student = standardize_logits(student_logits, unbiased=self.unbiased)
        teacher = standardize_logits(teacher_logits.detach(), unbiased=self.unbiased)
        loss: Tensor = self.loss(student, teacher, target)
        return loss


def lskd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 2.0,
    unbiased: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD on standardised logits: T^2 * KL(softmax(z'_t / T) || softmax(z'_s / T)), z' by :func:`standardize_logits`.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        temperature: T > 0 of the standardised logits, the paper's base temperature. Customary: 2.
        unbiased: as in :func:`standardize_logits`.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Zero where z_s is an increasing linear function of z_t.

    Raises:
        ValueError: a shape, device, temperature or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2403.01427, section 4; customary weight 9 beside 0.1 cross-entropy.
    """
    check_logits(student_logits, teacher_logits)
    student = standardize_logits(student_logits, unbiased=unbiased)
    teacher = standardize_logits(teacher_logits.detach(), unbiased=unbiased)
    return kd_loss(student, teacher, temperature=temperature, reduction=reduction)


class LSKDLoss(LogitLoss):
    """Module form of :func:`lskd_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(self, *, temperature: float = 2.0, unbiased: bool = True, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.unbiased = unbiased
        self.reduction: Reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return lskd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            unbiased=self.unbiased,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, unbiased={self.unbiased}, reduction={self.reduction!r}"
