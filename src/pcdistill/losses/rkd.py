"""Relational knowledge distillation (RKD): distances and angles between samples are the teacher's.

Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", arXiv 1904.05068 (2019).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pcdistill.losses._common import check_weight, upcast
from pcdistill.losses._features import Features, check_vector_pair, full_precision
from pcdistill.losses.base import FeatureLoss

__all__ = ["RKDLoss", "rkd_loss"]

SMALLEST_SQUARE = 1e-12


def rkd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Smooth-L1 differences of normalised pairwise distances and of the angles of all triplets.

        D_ij = |x_i - x_j| / mean_{i != j} |x_i - x_j|    A_ijk = cos of the angle at x_i between x_j and x_k
        loss = distance_weight * mean_ij h(D^s - D^t) + angle_weight * mean_ijk h(A^s - A^t)
        h(d) = d^2 / 2 for |d| < 1, else |d| - 1/2

    The means run over all N^2 pairs and N^3 triplets, also those that repeat a sample (which add 0); memory is N^3 and
    N^2 D numbers.

    Args:
        student_embedding: x of the student, [N, D]. Any floating dtype; the arithmetic is float32 or better.
        teacher_embedding: x of the teacher, [N, D'], of any width. A constant: no gradient flows into it.
        distance_weight: >= 0; 0 leaves the distances out.
        angle_weight: >= 0; 0 leaves the angles out.

    Returns:
        A scalar. Zero if the two embeddings differ by a rotation, a shift and one scale. N < 2 gives 0. Two equal
        samples have distance 1e-6 and no angle, and get no gradient from each other.

    Raises:
        ValueError: a shape, device or weight that does not fit.
        TypeError: embeddings that are not floating point.

    Source:
        arXiv 1904.05068, eq. 5 to 10. The two weights are the literature's for classification (the paper's lambda).
    """
    check_vector_pair(student_embedding, teacher_embedding)
    check_weight(distance_weight, "distance_weight")
    check_weight(angle_weight, "angle_weight")
    x_s, x_t = upcast(student_embedding), upcast(teacher_embedding.detach())
    n = x_s.shape[0]
    if n < 2:
        return x_s.sum() * 0
    with full_precision(x_s):
        diff_s, square_s = _differences(x_s)
        diff_t, square_t = _differences(x_t)
        loss = x_s.new_zeros(())
        if distance_weight > 0:
            d_s, d_t = _distances(square_s), _distances(square_t)
            loss = loss + distance_weight * F.smooth_l1_loss(d_s, d_t)
        if angle_weight > 0:
            a_s, a_t = _angles(diff_s, square_s), _angles(diff_t, square_t)
            loss = loss + angle_weight * F.smooth_l1_loss(a_s, a_t)
    return loss


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_j - x_i at [i, j], [N, N, D], and their squared lengths [N, N]; not by products, which cancel in float32."""
    difference = x[None, :] - x[:, None]
    return difference, difference.square().sum(2)


def _distances(square: Tensor) -> Tensor:
    n = square.shape[0]
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=square.device)
    distance = square.clamp(min=SMALLEST_SQUARE).sqrt() * off_diagonal
    return distance * (n * (n - 1)) / distance.sum()


def _angles(difference: Tensor, square: Tensor) -> Tensor:
    apart = (square > SMALLEST_SQUARE)[..., None]
    direction = difference * torch.where(apart, square[..., None], 1.0).rsqrt() * apart
    return direction @ direction.transpose(1, 2)


class RKDLoss(FeatureLoss):
    """:func:`rkd_loss` on what the classifiers read; the example features are not needed and may be left out.

    Args:
        student: features of an example batch.
        teacher: features of the same batch.
        distance_weight: weight of the distances.
        angle_weight: weight of the angles.
    """

    def __init__(
        self,
        student: Features | None = None,
        teacher: Features | None = None,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__()
        check_weight(distance_weight, "distance_weight")
        check_weight(angle_weight, "angle_weight")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        return rkd_loss(
            student.pooled, teacher.pooled, distance_weight=self.distance_weight, angle_weight=self.angle_weight
        )

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}"
