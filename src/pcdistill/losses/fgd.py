"""FGD: focal distillation of what the teacher attends to inside and outside the boxes, and global relations of places.

Source: Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, "Focal and Global Knowledge Distillation for Detectors",
arXiv 2111.11837 (CVPR 2022), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pcdistill.losses._common import check_temperature, check_weight
from pcdistill.losses._pyramid import (
    AlignedLevels,
    Pyramid,
    Targets,
    cells_of_boxes,
    channel_attention,
    check_targets,
    no_autocast,
    spatial_attention,
)
from pcdistill.losses.base import Needs, PyramidLoss

__all__ = ["FGDLoss"]


class FGDLoss(PyramidLoss):
    """Four parts per level, each a sum over channels and places over the number of images, summed over the levels.

        A_S, A_C = attention over places and channels (temperature T)
        focal:     sum M A_S A_C (F_s - F_t)^2 with the teacher's attention, once with the foreground's mask M and once
                   with the background's
        attention: sum |A_C(F_s) - A_C(F_t)| + sum |A_S(F_s) - A_S(F_t)|
        relation:  sum (R_s(F_s) - R_t(F_t))^2, R a global context block, one learnt for each side

    A place in a box has the foreground mask 1 / (cells of the box), the largest of those that cover it; the
    background's mask is 1 / (cells in no box) of the image. Where the widths differ, a 1x1 convolution aligns F_s.
    The defaults are the paper's for two-stage students; anchor-based one-stage: 1e-3, 5e-4, 5e-4, 5e-6; anchor-free:
    1.6e-3, 8e-4, 8e-4, 8e-6 (FCOS with T = 0.8). They belong to photographs of 800 pixels: the sums grow with the maps.

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's; a constant, but for its context block.
        temperature: T > 0.
        foreground_weight: the paper's alpha.
        background_weight: the paper's beta.
        attention_weight: the paper's gamma.
        relation_weight: the paper's lambda.
        strides: the strides to compare; None takes all that both have.

    Raises:
        ValueError: a weight or temperature that is none, pyramids that share no stride, targets that are missing.
    """

    needs = Needs(labels=True)

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid,
        *,
        temperature: float = 0.5,
        foreground_weight: float = 5e-5,
        background_weight: float = 2.5e-5,
        attention_weight: float = 5e-5,
        relation_weight: float = 5e-7,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.weights = {
            "foreground": foreground_weight,
            "background": background_weight,
            "attention": attention_weight,
            "relation": relation_weight,
        }
        for name, weight in self.weights.items():
            check_weight(weight, f"{name}_weight")
        self.align = AlignedLevels(student, teacher, strides)
        self.student_context = nn.ModuleList(GlobalContext(width) for width in self.align.widths)
        self.teacher_context = nn.ModuleList(GlobalContext(width) for width in self.align.widths)

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        targets = check_targets(targets, len(student.levels[0]))
        with no_autocast(student):
            levels = zip(self.align(student, teacher), self.student_context, self.teacher_context, strict=True)
            losses = [
                self._level(own, wanted, targets, student.image_size, own_context, wanted_context)
                for (own, wanted), own_context, wanted_context in levels
            ]
            return torch.stack(losses).sum()

    def _level(
        self,
        own: Tensor,
        wanted: Tensor,
        targets: Targets,
        image_size: tuple[int, int],
        own_context: nn.Module,
        wanted_context: nn.Module,
    ) -> Tensor:
        places, channels = spatial_attention(wanted, self.temperature), channel_attention(wanted, self.temperature)
        size = (own.shape[2], own.shape[3])
        foreground, background = foreground_and_background(targets, size, image_size, own.dtype)
        error = ((own - wanted).square() * channels[:, :, None, None]).sum(dim=1) * places
        attention = (channel_attention(own, self.temperature) - channels).abs().sum()
        attention = attention + (spatial_attention(own, self.temperature) - places).abs().sum()
        relation = (own_context(own) - wanted_context(wanted)).square().sum()
        total = (
            self.weights["foreground"] * (error * foreground).sum()
            + self.weights["background"] * (error * background).sum()
            + self.weights["attention"] * attention
            + self.weights["relation"] * relation
        )
        scaled: Tensor = total / max(len(own), 1)
        return scaled

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}_weight={weight:g}" for name, weight in self.weights.items())
        return f"temperature={self.temperature:g}, {shown}"


class GlobalContext(nn.Module):
    """GcBlock: add to every place the same vector, made of the attention-weighted mean of all places.

        context = sum_hw softmax_hw(w . F) F    R(F) = F + W2 relu(LN(W1 context)), W2 zero at the start

    Args:
        width: D; the bottleneck has half of it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        self.score = nn.Conv2d(width, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(width, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), nn.Conv2d(inner, width, 1)
        )
        nn.init.kaiming_normal_(self.score.weight, mode="fan_in")
        last = self.transform[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """[N, D, H, W] -> [N, D, H, W]."""
        attention = self.score(features).flatten(2).softmax(dim=2)
        context = torch.einsum("ndl,nkl->nd", features.flatten(2), attention)
        made: Tensor = self.transform(context[:, :, None, None])
        return features + made


def foreground_and_background(
    targets: Targets, size: tuple[int, int], image_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """FGD's two masks on a level, [N, H, W] each; an image without boxes is background everywhere."""
    foreground, background = [], []
    for target in targets:
        inside, area = cells_of_boxes(target["boxes"], size, image_size)
        none = inside.new_zeros((1, *size), dtype=dtype)  # so that the largest over no boxes is 0
        shares = torch.cat([inside / area.to(dtype)[:, None, None], none])
        foreground.append(shares.amax(dim=0))
        outside = (~inside.any(dim=0)).to(dtype)
        background.append(outside / outside.sum().clamp(min=1))
    return torch.stack(foreground), torch.stack(background)
