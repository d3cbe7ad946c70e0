"""DFMSD: dual feature masking, object-aware and stage by stage, of teachers that may be of another family.

Source: Zhang, Li, Wu, Shen, Xu, "DFMSD: Dual Feature Masking Stage-wise Knowledge Distillation for Object Detection",
arXiv 2407.13147 (2024). Its equations were not at hand: this is after DFMSD, the abstract's parts with our equations,
built from what the methods of the same line define (FGD's attention, MGD's generator, DMKD's dual masks, PKD's
normalisation). Its numbers are therefore not to be expected from it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pcdistill.losses._common import check_temperature
from pcdistill.losses._pyramid import (
    AlignedLevels,
    DualMasking,
    Pyramid,
    Targets,
    channel_attention,
    check_targets,
    no_autocast,
    normalize_channels,
    object_mask,
    spatial_attention,
)
from pcdistill.losses.base import Needs, PyramidLoss

__all__ = ["DFMSDLoss"]


class DFMSDLoss(PyramidLoss):
    """Squared error between fused reconstructions of the masked student feature and the teacher's, summed over levels.

        A_S, A_C = attention of F_t over places and channels (temperature T)
        A_S is multiplied by 1 + u inside ground-truth boxes (masking enhancement; u is training progress in [0, 1))
        F_f = a G_S(align(F_s) * M_S) + (1 - a) G_C(align(F_s) * M_C), M = 0 on the shares with the highest attention
        loss = sum over levels of mean((norm(F_f) - target)^2), norm per channel as in PKD (semantic alignment)
        target = norm(F_t); with one teacher, in the first third of training, the mean of norm(F_t) and of
        norm(align(F_s)), a constant (stage-wise adaptation)

    Every part can be switched off alone: `masking`, `enhancement`, `stages`, `alignment`. With masking "none" the
    aligned feature itself is compared: then, without stages, the loss is twice PKD's. Weight: 6 for two-stage and 10
    for one-stage students, as PKD, with gradients clipped.

    With two teachers, the weaker or more similar first, `stages` distils from the first in the first half of training
    and from the second in the rest; `teacher_index` says whose pyramid to pass in. The masks of an object's cells are
    FGD's: from floor to ceil of the box on the level.

    Args:
        student: the student's observed pyramid, levels [N, D, H, W].
        teacher: the teacher's, or one for each of two teachers; constants.
        masking: "both", "spatial", "channel" or "none".
        enhancement: strengthen attention inside boxes as training goes on; needs targets.
        stages: stage-wise adaptation.
        alignment: normalise per channel before the squared error.
        spatial_ratio: share of places that is masked.
        channel_ratio: share of channels that is masked.
        temperature: T > 0 of the attention.
        strides: the strides to compare; None takes all that student and teacher have.

    Raises:
        ValueError: an option that is none of its values, pyramids that share no stride, targets that are missing.
    """

    needs = Needs(labels=True)

    def __init__(
        self,
        student: Pyramid,
        teacher: Pyramid | Sequence[Pyramid],
        *,
        masking: str = "both",
        enhancement: bool = True,
        stages: bool = True,
        alignment: bool = True,
        spatial_ratio: float = 0.5,
        channel_ratio: float = 0.3,
        temperature: float = 0.5,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if masking not in ("both", "spatial", "channel", "none"):
            raise ValueError(f"masking must be 'both', 'spatial', 'channel' or 'none', got {masking!r}")
        teachers = [teacher] if isinstance(teacher, Pyramid) else list(teacher)
        if not 1 <= len(teachers) <= 2:
            raise ValueError(f"teacher must be one pyramid or two, got {len(teachers)}")
        self.masking, self.enhancement, self.stages, self.alignment = masking, enhancement, stages, alignment
        self.needs = Needs(labels=enhancement and masking in ("both", "spatial"))
        self.temperature = temperature
        self.spatial_ratio, self.channel_ratio = spatial_ratio, channel_ratio
        self.progress = 0.0
        aligned = [AlignedLevels(student, one, strides) for one in teachers]
        self.align = nn.ModuleList(aligned)
        self.masked = nn.ModuleList(
            nn.ModuleList() if masking == "none" else self._generators(one.widths) for one in aligned
        )

    @property
    def teacher_index(self) -> int:
        """Which teacher's pyramid the current stage compares with: 0, or 1 in the second stage of two."""
        last = len(self.align) - 1
        return min(int(self.progress * len(self.align)), last) if self.stages else last

    def set_progress(self, *, progress: float, epoch: float) -> None:
        """Tell where training is: `progress` in [0, 1) decides the stage and the enhancement."""
        self.progress = progress

    def forward(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> Tensor:
        """The loss against the pyramid of the teacher of the current stage; targets hold boxes [M, 4] per image."""
        if self.needs.labels:
            targets = check_targets(targets, len(student.levels[0]))
        adapting = self.stages and len(self.align) == 1 and self.progress < 1 / 3
        masked = cast(nn.ModuleList, self.masked[self.teacher_index])
        with no_autocast(student):
            losses = []
            for k, (own, wanted) in enumerate(self.align[self.teacher_index](student, teacher)):
                made = own
                if self.masking != "none":
                    made = masked[k](own, *self._attention(wanted, targets, student.image_size))
                own, wanted, made = (self._normalized(x) for x in (own, wanted, made))
                if adapting:
                    wanted = (wanted + own.detach()) / 2
                losses.append((made - wanted).square().mean())
            return torch.stack(losses).sum()

    @torch.no_grad()
    def masks(self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None) -> list[tuple[Tensor, Tensor]]:
        """What the current masks keep: per compared level 0 or 1 for places [N, H, W] and channels [N, D]."""
        if self.masking == "none":
            raise ValueError('masking is "none": there are no masks')
        found, masked = [], cast(nn.ModuleList, self.masked[self.teacher_index])
        for k, (_, wanted) in enumerate(self.align[self.teacher_index](student, teacher)):
            attention = self._attention(wanted, targets, student.image_size)
            found.append(cast(Any, masked[k]).masks(*attention))
        return found

    def kept(
        self, student: Pyramid, teacher: Pyramid, targets: Targets | None = None
    ) -> list[tuple[int, Tensor, Tensor]]:
        if self.masking == "none":
            return []
        strides = cast(Sequence[int], self.align[self.teacher_index].strides)
        masks = self.masks(student, teacher, targets)
        return [(stride, *both) for stride, both in zip(strides, masks, strict=True)]

    def _attention(self, wanted: Tensor, targets: Targets | None, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        places = spatial_attention(wanted, self.temperature)
        if self.needs.labels:
            inside = object_mask(check_targets(targets, len(wanted)), (wanted.shape[2], wanted.shape[3]), image_size)
            places = places * (1 + self.progress * inside)
        return places, channel_attention(wanted, self.temperature)

    def _normalized(self, features: Tensor) -> Tensor:
        return normalize_channels(features) if self.alignment else features

    def _generators(self, widths: Sequence[int]) -> nn.ModuleList:
        return nn.ModuleList(
            DualMasking(width, spatial_ratio=self.spatial_ratio, channel_ratio=self.channel_ratio, masking=self.masking)
            for width in widths
        )

    def extra_repr(self) -> str:
        return (
            f"masking={self.masking!r}, enhancement={self.enhancement}, stages={self.stages}, "
            f"alignment={self.alignment}, temperature={self.temperature:g}"
        )
