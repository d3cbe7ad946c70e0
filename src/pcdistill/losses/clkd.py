"""Class-aware logit distillation (CLKD): match rows of the logits, their columns, and how the classes correlate.

Source: Zhang, Liu, Hopcroft, He, "Class-aware Information for Logit-based Knowledge Distillation", arXiv 2211.14773
(2022). No code of the authors was found; what is unclear in the correlation term is an option.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, full_precision, upcast
from pcdistill.losses.base import LogitLoss

__all__ = ["CLKDLoss", "clkd_loss"]

Correlation = Literal["class", "class-norm", "class-cosine", "sample", "sample-centred"]
_CORRELATIONS = ("class", "class-norm", "class-cosine", "sample", "sample-centred")


def clkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    instance_weight: float = 0.5,
    class_weight: float = 1.0,
    correlation_weight: float = 0.4,
    correlation: Correlation = "class",
    eps: float = 1e-8,
) -> Tensor:
    """Squared distance of unit-length rows and of unit-length columns of the logits, and of the class correlations.

        r(Z) = rows of Z over their L2 norms, k(Z) = columns over theirs; raw logits, no softmax, no temperature
        L_ins = sum (r(Z_s) - r(Z_t))^2 / (N C)    L_cla = sum (k(Z_s) - k(Z_t))^2 / (N C)
        L_cc = ||B_s - B_t||_F^2 / C^2, with H = Z - mean over the batch and B by `correlation`:
            "class"           B = H'H / (C - 1), [C, C]
            "class-norm"      the same B, the norm not squared
            "class-cosine"    B = r(Z'Z), [C, C]: not centred, every row of unit length
            "sample"          B = HH' / (C - 1), [N, N]
            "sample-centred"  the same, [N, N], with H = Z - mean over the classes: the samples' covariance
        loss = instance_weight * L_ins + class_weight * L_cla + correlation_weight * L_cc

    Args:
        student_logits: Z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: Z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike. Soft labels make no difference.
        instance_weight: the paper's mu, >= 0; 0 leaves the term out.
        class_weight: the paper's mu * beta = 0.5 * 2, >= 0; 0 leaves the term out.
        correlation_weight: the paper's nu, >= 0; 0 leaves the term out.
        correlation: which reading of the correlation term.
        eps: > 0; a row or column whose norm is at most this counts as zero, and gets no gradient of L_ins or L_cla.

    Returns:
        A scalar, zero at equal logits. L_ins <= 4 / C and L_cla <= 4 / N, so both are small beside a cross-entropy.
        L_cc grows with the fourth power of the logits ("class-norm": the second; "class-cosine": not at all) and with
        the batch. For N = 1, L_cla compares signs, without a gradient, and the forms of L_cc that are centred over the
        batch are 0. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, weight, correlation or eps that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2211.14773, L = lambda CE + mu (L_ins + beta L_cla) + nu L_cc with 0.1, 0.5, 2 and 0.4. Descriptions of
        L_cc disagree. Our choice: "class", because the name and the factor 1 / C^2 speak of a C x C matrix; "sample" is
        the formula as it is written, and "sample-centred" the only reading that explains C - 1. A float16 gradient of
        L_cc can exceed 65504, the largest float16; it is then scaled down as a whole to fit, which keeps its direction
        (our choice: the alternative is infinity).
    """
    check_logits(student_logits, teacher_logits)
    _check_options(instance_weight, class_weight, correlation_weight, correlation, eps)
    student, teacher = _upcast_fitting(student_logits), upcast(teacher_logits.detach())
    n, c = student.shape
    loss = student[:0].sum()  # 0, with a graph whatever the weights are
    if n and instance_weight:
        loss = loss + instance_weight * (_unit(student, 1, eps) - _unit(teacher, 1, eps)).square().sum() / (n * c)
    if n and class_weight:
        loss = loss + class_weight * (_unit(student, 0, eps) - _unit(teacher, 0, eps)).square().sum() / (n * c)
    if n and correlation_weight:
        with full_precision(student):
            difference = _correlation(student, correlation, eps) - _correlation(teacher, correlation, eps)
        if correlation == "class-norm":
            loss = loss + correlation_weight * torch.linalg.vector_norm(difference) / c**2
        else:
            loss = loss + correlation_weight * difference.square().sum() / c**2
    return loss


def _check_options(
    instance_weight: float, class_weight: float, correlation_weight: float, correlation: str, eps: float
) -> None:
    check_weight(instance_weight, "instance_weight")
    check_weight(class_weight, "class_weight")
    check_weight(correlation_weight, "correlation_weight")
    if correlation not in _CORRELATIONS:
        raise ValueError(f"correlation must be one of {', '.join(map(repr, _CORRELATIONS))}, got {correlation!r}")
    check_temperature(eps, "eps")


def _unit(z: Tensor, dim: int, eps: float) -> Tensor:
    """z over its L2 norm along `dim`; zeros, without a gradient, where that norm is at most eps."""
    norm = torch.linalg.vector_norm(z, dim=dim, keepdim=True)
    small = norm <= eps
    unit: Tensor = (z / norm.masked_fill(small, 1.0)).masked_fill(small, 0.0)
    return unit


def _correlation(z: Tensor, correlation: Correlation, eps: float) -> Tensor:
    """The matrix B of the chosen reading."""
    if correlation == "class-cosine":
        return _unit(z.T @ z, 1, eps)
    centred = z - (z.mean(dim=1, keepdim=True) if correlation == "sample-centred" else z.mean(dim=0))
    product = centred.T @ centred if correlation.startswith("class") else centred @ centred.T
    return product / (z.shape[1] - 1)


class _Float16ToFloat32(torch.autograd.Function):
    """float16 to float32; on the way back the gradient is scaled down, as a whole, to what float16 can hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        limit = torch.finfo(torch.float16).max
        return (gradient * (limit / gradient.abs().amax().clamp(min=limit))).half()


def _upcast_fitting(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float16 or logits.numel() == 0:
        return upcast(logits)
    widened: Tensor = _Float16ToFloat32.apply(logits)
    return widened


class CLKDLoss(LogitLoss):
    """Module form of :func:`clkd_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(
        self,
        *,
        instance_weight: float = 0.5,
        class_weight: float = 1.0,
        correlation_weight: float = 0.4,
        correlation: Correlation = "class",
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        _check_options(instance_weight, class_weight, correlation_weight, correlation, eps)
        self.instance_weight = instance_weight
        self.class_weight = class_weight
        self.correlation_weight = correlation_weight
        self.correlation: Correlation = correlation
        self.eps = eps

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return clkd_loss(
            student_logits,
            teacher_logits,
            instance_weight=self.instance_weight,
            class_weight=self.class_weight,
            correlation_weight=self.correlation_weight,
            correlation=self.correlation,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"instance_weight={self.instance_weight:g}, class_weight={self.class_weight:g}, "
            f"correlation_weight={self.correlation_weight:g}, correlation={self.correlation!r}, eps={self.eps:g}"
        )
