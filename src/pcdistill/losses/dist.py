"""DIST: the student matches how the teacher's probabilities vary, over the classes and over the batch, not their size.

Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
"""

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, upcast
from pcdistill.losses.base import LogitLoss
from pcdistill.ops.segments import log_softmax

__all__ = ["DISTLoss", "dist_loss"]


def cosine_distance(a: Tensor, b: Tensor, *, eps: float) -> Tensor:
    """1 - a.b / (|a| |b| + eps) for each row, [R, K] and [R, K] -> [R].

    Written with |a/|a| - b/|b||^2 / 2, which does not cancel as b comes close to a. A row of zeros is at distance 1
    from everything and gets no gradient: it has no direction that could be turned. So is a row so short that the
    square of its length has no normal number: its gradient would pass through 1 / |a|^2, which is infinite.
    """
    size_a, size_b = (torch.linalg.vector_norm(x, dim=1) for x in (a, b))
    least = torch.finfo(a.dtype).tiny ** 0.5
    unit_a, unit_b = (x / s.masked_fill(s < least, 1.0)[:, None] for x, s in ((a, size_a), (b, size_b)))
    product = size_a * size_b
    distance: Tensor = (product * (unit_a - unit_b).square().sum(dim=1) / 2 + eps) / (product + eps)
    return distance


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Pearson distance between the probabilities of each sample (inter-class) and those of each class (intra-class).

        P = softmax(z_t / T), Q = softmax(z_s / T), [N, C]
        rho(a, b) = a'.b' / (|a'| |b'| + eps), a' = a - mean(a)
        inter = 1 - mean_n rho(P[n, :], Q[n, :])    intra = 1 - mean_c rho(P[:, c], Q[:, c])
        loss = T^2 * (inter_weight * inter + intra_weight * intra)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike. Soft labels make no difference.
        temperature: T > 0, no unit. Customary: 4 on CIFAR-100, 1 on ImageNet.
        inter_weight: weight of the rows' part, >= 0. The paper's beta over its common factor: 1.
        intra_weight: weight of the columns' part, >= 0. The paper's gamma over its common factor: 1.
        eps: > 0, added to |a'| |b'|. Rows or columns that vary less than this count as uncorrelated.

    Returns:
        A scalar, times T^2: each part is in [0, 2 T^2], zero where student and teacher are increasing linear functions
        of each other. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, weight or eps that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2205.10536, section 3; the product with eps as in the released code. Customary recipe: cross-entropy 1,
        DIST 2. Our choice: a row or column of the student that does not vary at all (one sample, an output layer that
        starts at zero) counts as uncorrelated, as in the released code, but gets no gradient; the released code sends
        back one of size 1 / eps.
    """
    check_logits(student_logits, teacher_logits)
    _check_options(temperature, inter_weight, intra_weight, eps)
    student = log_softmax(upcast(student_logits), temperature).exp()
    teacher = log_softmax(upcast(teacher_logits.detach()), temperature).exp()
    if student.shape[0] == 0:
        return student.sum()
    inter = cosine_distance(_centre(student), _centre(teacher), eps=eps).mean()
    intra = cosine_distance(_centre(student.T), _centre(teacher.T), eps=eps).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _check_options(temperature: float, inter_weight: float, intra_weight: float, eps: float) -> None:
    check_temperature(temperature)
    check_weight(inter_weight, "inter_weight")
    check_weight(intra_weight, "intra_weight")
    check_temperature(eps, "eps")


def _centre(rows: Tensor) -> Tensor:
    """Rows less their means; exactly zero where a row is constant: rounding would make up a direction for it."""
    flat = (rows == rows[:, :1]).all(dim=1, keepdim=True)
    return (rows - rows.mean(dim=1, keepdim=True)).masked_fill(flat, 0.0)


class DISTLoss(LogitLoss):
    """Module form of :func:`dist_loss`, for recipes; arguments, shapes and errors are the function's."""

    def __init__(
        self, *, temperature: float = 4.0, inter_weight: float = 1.0, intra_weight: float = 1.0, eps: float = 1e-8
    ) -> None:
        super().__init__()
        _check_options(temperature, inter_weight, intra_weight, eps)
        self.temperature = temperature
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.eps = eps

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return dist_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, inter_weight={self.inter_weight:g}, "
            f"intra_weight={self.intra_weight:g}, eps={self.eps:g}"
        )
