"""ACAM-KD: masks over channels and places that follow from student and teacher together, and are learnt.

Source: "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation" (ICCV 2025). Its code was not
at hand: this is after its equations. Where they leave a choice open, :class:`ACAMLoss` says ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.losses._common import check_weight
from pcdistill.losses._pyramid import AlignedLevels, Pyramid, Targets, no_autocast
from pcdistill.losses.base import PyramidLoss

__all__ = ["ACAMLoss"]


class ACAMLoss(PyramidLoss):
    """Squared error of features under learnt masks, mean over the masks, summed over the levels.

        Q = W_q F_t    K = W_k F_s    V = W_v F_s    F = softmax(Q^T K / sqrt(D / 2)) V, over places
        M_c = sigmoid(m_c * mean of F over places) [M, D]    M_s = sigmoid(m_s F) [M, H W]
        L_c = mean over masks of 1 / (H W sum_d M_c) sum |M_c (F_t - F_s)|^2    L_s: with 1 / (D sum_hw M_s)
        L_div = sum over pairs i != j of 2 M_i . M_j / (|M_i|^2 + |M_j|^2), of M_c and of M_s
        loss = sum over levels of L_c + L_s + diversity * L_div

    F_s is the aligned student feature. Dividing by the masks' sums is our reading: a mask weighs what it shows, and not
    how much it shows; masks of one value c still weigh c. So is m_c, one number for each mask and channel. The paper's
    weights are 1 for both parts.

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's; a constant.
        masks: M, of each kind.
        diversity: weight >= 0 of L_div.
        strides: the strides to compare; None takes all that both have.

    Raises:
        ValueError: no masks, a negative weight, pyramids that share no stride.
    """

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid,
        *,
        masks: int = 6,
        diversity: float = 1.0,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if masks < 1:
            raise ValueError(f"masks must be at least 1, got {masks}")
        check_weight(diversity, "diversity")
        self.diversity = diversity
        self.align = AlignedLevels(student, teacher, strides)
        self.levels = nn.ModuleList(CooperativeMasks(width, masks) for width in self.align.widths)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        with no_autocast(student):
            losses = []
            for level, (own, wanted) in zip(self.levels, self.align(student, teacher), strict=True):
                channels, places = level(own, wanted)
                error = (wanted - own).flatten(2).square()
                losses.append(masked_error(error.mean(dim=2), channels) + masked_error(error.mean(dim=1), places))
                if self.diversity:
                    losses.append(self.diversity * (dice_overlap(channels) + dice_overlap(places)))
            return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"diversity={self.diversity:g}"


class CooperativeMasks(nn.Module):
    """The masks of one level, from the student's features as the teacher's attend to them.

    Args:
        width: D of both features.
        masks: M of each kind.
    """

    def __init__(self, width: int, masks: int) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        self.query = nn.Conv2d(width, inner, 1, bias=False)
        self.key = nn.Conv2d(width, inner, 1, bias=False)
        self.value = nn.Conv2d(width, width, 1, bias=False)
        self.channel_units = nn.Parameter(torch.randn(masks, width))
        self.place_units = nn.Parameter(torch.randn(masks, width) / width**0.5)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Masks over channels [N, M, D] and over places [N, M, H W], in 0..1, from features [N, D, H, W] of both."""
        query, key, value = (
            part.flatten(2).transpose(1, 2)[:, None]
            for part in (self.query(teacher), self.key(student), self.value(student))
        )
        fused = F.scaled_dot_product_attention(query, key, value)[:, 0]  # [N, H W, D]
        channels = (self.channel_units * fused.mean(dim=1, keepdim=True)).sigmoid()
        places = (self.place_units @ fused.transpose(1, 2)).sigmoid()
        return channels, places


def masked_error(error: Tensor, masks: Tensor) -> Tensor:
    """Mean over images and masks of sum(M^2 e) / sum(M), for squared errors [N, L] and masks [N, M, L]."""
    return ((masks.square() * error[:, None]).sum(dim=2) / masks.sum(dim=2).clamp(min=1e-6)).mean()


def dice_overlap(masks: Tensor) -> Tensor:
    """Sum over ordered pairs of different masks of 2 M_i . M_j / (|M_i|^2 + |M_j|^2), mean over images [N, M, L]."""
    products = masks @ masks.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (squares[:, :, None] + squares[:, None, :]).clamp(min=1e-6)
    others = 1 - torch.eye(masks.shape[1], dtype=masks.dtype, device=masks.device)
    return (dice * others).sum(dim=(1, 2)).mean()
