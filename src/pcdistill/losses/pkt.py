"""Probabilistic knowledge transfer (PKT): the student's neighbourhoods of samples follow the teacher's.

Source: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", arXiv 1803.10837 (2018).
"""

import torch
from torch import Tensor

from pcdistill.losses._common import upcast
from pcdistill.losses._features import Features, check_vector_pair, full_precision
from pcdistill.losses.base import FeatureLoss

__all__ = ["PKTLoss", "pkt_loss"]

EPS = 1e-7


def pkt_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Mean, over all pairs of samples, of the terms of the KL divergence between neighbourhood distributions.

        K_ij = (cos(x_i, x_j) + 1) / 2    P_ij = K_ij / sum_j K_ij
        loss = 1 / N^2 * sum_ij P^t_ij * log((P^t_ij + 1e-7) / (P^s_ij + 1e-7))

    Args:
        student_embedding: x of the student, [N, D]. Any floating dtype; the arithmetic is float32 or better.
        teacher_embedding: x of the teacher, [N, D'], of any width. A constant: no gradient flows into it.

    Returns:
        A scalar. Zero if all cosines are the same. N = 0 gives 0. An embedding of length 0 is at cosine 0 to all and
        gets no gradient.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: embeddings that are not floating point.

    Source:
        arXiv 1803.10837, section 3, with the cosine kernel. As in the authors' code, and unlike the paper's formula,
        the sum over j includes i and the mean is over pairs: the weight 30000 is meant for that.
    """
    check_vector_pair(student_embedding, teacher_embedding)
    x_s, x_t = upcast(student_embedding), upcast(teacher_embedding.detach())
    with full_precision(x_s):
        p_s, p_t = _neighbourhood(x_s), _neighbourhood(x_t)
    return (p_t * ((p_t + EPS) / (p_s + EPS)).log()).sum() / max(x_s.shape[0], 1) ** 2


def _neighbourhood(x: Tensor) -> Tensor:
    """P, [N, N]; every row sums to 1."""
    square = x.square().sum(1, keepdim=True)
    has_length = square > 0
    direction = x / (torch.where(has_length, square, 1.0).sqrt() * has_length + EPS)
    kernel = (direction @ direction.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


class PKTLoss(FeatureLoss):
    """:func:`pkt_loss` on what the classifiers read; the example features are not needed and may be left out."""

    def __init__(self, student: Features | None = None, teacher: Features | None = None) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        return pkt_loss(student.pooled, teacher.pooled)
