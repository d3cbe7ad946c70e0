"""Curriculum temperature (CTKD): the temperature of KD is learned against the student, ever harder for it.

Source: "Curriculum Temperature for Knowledge Distillation", arXiv 2211.16231 (2023).
"""

import math

import torch
from torch import Tensor, nn

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    check_weight,
    reduce_loss,
    shape,
    upcast,
)
from pcdistill.losses.base import LogitLoss

__all__ = ["CTKDLoss", "ctkd_loss"]


def ctkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: Tensor,
    reversal: float | Tensor = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD whose temperature receives its gradient turned round: descent on the loss makes the student better, T worse.

        p = softmax(z_t / T)    q = softmax(z_s / T)    loss = T^2 * sum_c p_c * (log p_c - log q_c)
        d loss / d T  is multiplied by  -reversal       (the value and the student's gradient are plain KD's)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused, so labels may be soft or missing.
        temperature: T > 0, a scalar tensor, or [N] with one for each sample. Its values are not looked at.
        reversal: how much of the turned gradient reaches T: 0 holds T still, 1 is the whole.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Zero if and only if p = q. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature or reduction that does not fit.
        TypeError: logits or a temperature that are not floating point.

    Source:
        arXiv 2211.16231. T keeps its gradient through both softmaxes and through T^2, as in the released code.
    """
    check_logits(student_logits, teacher_logits)
    if not isinstance(temperature, Tensor) or not temperature.is_floating_point():
        kind = temperature.dtype if isinstance(temperature, Tensor) else type(temperature).__name__
        raise TypeError(f"temperature must be a floating-point tensor, got {kind}; for a fixed number use kd_loss")
    if list(temperature.shape) not in ([], [len(student_logits)]):
        raise ValueError(f"temperature must be [] or [N] = [{len(student_logits)}], got {shape(temperature)}")
    z_s, z_t = upcast(student_logits), upcast(teacher_logits.detach())
    fixed = temperature.detach()
    tau = (fixed - reversal * (temperature - fixed)).to(z_s.dtype)  # the value of T, the gradient of -reversal * T
    column = tau if tau.ndim == 0 else tau[:, None]
    log_q = (z_s / column).log_softmax(dim=1)
    log_p = (z_t / column).log_softmax(dim=1)
    per_sample = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return reduce_loss(per_sample * tau**2, reduction)


class CTKDLoss(LogitLoss):
    """KD with one learned temperature and its curriculum; the function is :func:`ctkd_loss`.

        T = min_temperature + (max_temperature - min_temperature) * sigmoid(theta)
        reversal(e) = (1 - cos(pi * min(e / curriculum_epochs, 1))) / 2

    `theta` is a parameter of this module: give it to the optimiser that trains the student. The engine calls
    `set_progress` before each step; whoever never calls it has the whole reversal from the start. Weight decay, if the
    optimiser has any, pulls theta to 0, as it does in the released code.

    Args:
        min_temperature: lower end of the range of T, > 0.
        max_temperature: upper end, above the lower.
        initial_theta: theta at the start; 1 makes T 15.6 in the default range.
        curriculum_epochs: epochs in which the reversal grows from 0 to 1; 0 starts with the whole. Customary: 10 on
            CIFAR-100, 5 on ImageNet.
        reduction: "mean" over samples, "sum", or "none".

    Raises:
        ValueError: a temperature range, theta, length of the curriculum or reduction that does not fit.

    Source:
        arXiv 2211.16231, the one global temperature of the released code; the paper's variant with one temperature for
        each sample needs a network of one's own, whose output [N] :func:`ctkd_loss` takes. The released code holds the
        reversal still within an epoch; our choice is the curve itself, at the fraction of the epoch that is done.
    """

    def __init__(
        self,
        *,
        min_temperature: float = 1.0,
        max_temperature: float = 21.0,
        initial_theta: float = 1.0,
        curriculum_epochs: float = 10.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(min_temperature, "min_temperature")
        check_temperature(max_temperature, "max_temperature")
        if max_temperature <= min_temperature:
            raise ValueError(
                f"max_temperature must be above min_temperature = {min_temperature:g}, got {max_temperature:g}"
            )
        if not math.isfinite(initial_theta):
            raise ValueError(f"initial_theta must be a finite number, got {initial_theta}")
        check_weight(curriculum_epochs, "curriculum_epochs")
        check_reduction(reduction)
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.curriculum_epochs = curriculum_epochs
        self.reduction: Reduction = reduction
        self.theta = nn.Parameter(torch.tensor(float(initial_theta)))
        # a tensor, so that a compiled loss sees a new value and not a new constant; where training is says its value,
        # so it is in no checkpoint
        self.reversal: Tensor
        self.register_buffer("reversal", torch.tensor(1.0), persistent=False)

    @property
    def temperature(self) -> Tensor:
        """T, a scalar with the graph to theta."""
        return self.min_temperature + (self.max_temperature - self.min_temperature) * self.theta.sigmoid()

    def set_progress(self, *, progress: float, epoch: float) -> None:
        """Set the reversal: `epoch` is counted from 0, with its fraction."""
        done = min(epoch / self.curriculum_epochs, 1.0) if self.curriculum_epochs > 0 else 1.0
        self.reversal.fill_(0.5 * (1.0 - math.cos(math.pi * done)))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return ctkd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reversal=self.reversal,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"min_temperature={self.min_temperature:g}, max_temperature={self.max_temperature:g}, "
            f"curriculum_epochs={self.curriculum_epochs:g}, reduction={self.reduction!r}"
        )
