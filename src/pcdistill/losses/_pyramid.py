"""What the losses on feature pyramids share: matching of levels, adapters, attention, masks and boxes on a level."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.losses._common import shape, upcast

Targets = Sequence[Mapping[str, Tensor]]


class Pyramid(NamedTuple):
    """The feature maps of a detector.

    Attributes:
        levels: [N, D, H, W] each, finest first.
        strides: image pixels per cell, one per level.
        image_size: height and width of the padded batch of images in pixels; boxes are in these pixels.
    """

    levels: list[Tensor]
    strides: list[int]
    image_size: tuple[int, int]


class AlignedLevels(nn.Module):
    """Pairs of levels of equal stride; the student's feature is mapped to the teacher's width and size.

    A 1x1 convolution maps the width, only where the widths differ; bilinear resizing maps the size, only where the maps
    of one stride differ (by a row of padding, say). Levels that only one of the two has are left out.

    Args:
        student: the student's observed pyramid.
        teacher: the teacher's.
        strides: the strides to compare; None takes all that both have.

    Raises:
        ValueError: no stride in common, or a wanted one that a pyramid does not have.
    """

    def __init__(self, student: Pyramid, teacher: Pyramid, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        self.student_strides, self.teacher_strides = list(student.strides), list(teacher.strides)
        for stride in strides or ():
            for name, pyramid in (("student", student), ("teacher", teacher)):
                if stride not in pyramid.strides:
                    raise ValueError(f"strides: the {name} has no level of stride {stride}; it has {pyramid.strides}")
        self.strides = sorted(set(student.strides) & set(teacher.strides) & set(strides or student.strides))
        if not self.strides:
            raise ValueError(
                f"the student's pyramid has strides {student.strides} and the teacher's {teacher.strides}: no level in "
                "common to compare"
            )
        self.pairs = [(student.strides.index(s), teacher.strides.index(s)) for s in self.strides]
        self.widths = [teacher.levels[j].shape[1] for _, j in self.pairs]
        own = [student.levels[i].shape[1] for i, _ in self.pairs]
        self.adapters = nn.ModuleList(
            nn.Identity() if a == b else nn.Conv2d(a, b, 1) for a, b in zip(own, self.widths, strict=True)
        )

    def forward(self, student: Pyramid, teacher: Pyramid) -> list[tuple[Tensor, Tensor]]:
        """Pairs of the student's aligned feature and the teacher's constant one, [N, D, H, W] in float32 or float64."""
        if list(student.strides) != self.student_strides or list(teacher.strides) != self.teacher_strides:
            raise ValueError(
                f"this loss was built for strides {self.student_strides} and {self.teacher_strides}, got "
                f"{list(student.strides)} and {list(teacher.strides)}"
            )
        pairs = []
        for adapter, (i, j) in zip(self.adapters, self.pairs, strict=True):
            own, wanted = student.levels[i], upcast(teacher.levels[j].detach())
            if own.shape[0] != wanted.shape[0]:
                raise ValueError(
                    f"student {shape(own)} and teacher {shape(wanted)} must hold features of the same images"
                )
            own = adapter(upcast(own))
            if own.shape[-2:] != wanted.shape[-2:]:
                own = F.interpolate(own, size=wanted.shape[-2:], mode="bilinear", align_corners=False)
            pairs.append((own, wanted))
        return pairs


class GenerationBlock(nn.Sequential):
    """MGD's generator: a 3x3 convolution, ReLU and another 3x3 convolution, all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


def no_autocast(pyramid: Pyramid) -> AbstractContextManager[object]:
    """Arithmetic in the tensors' own precision, whatever autocast is on around the loss."""
    return torch.autocast(pyramid.levels[0].device.type, enabled=False)


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """FGD's attention over places: H W softmax_hw(mean_c |F| / T).

    Args:
        features: [N, D, H, W].
        temperature: T > 0.

    Returns:
        [N, H, W], with mean 1 over the places.
    """
    n, _, h, w = features.shape
    return h * w * (features.abs().mean(dim=1).reshape(n, h * w) / temperature).softmax(dim=1).reshape(n, h, w)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """FGD's attention over channels: D softmax_d(mean_hw |F| / T).

    Args:
        features: [N, D, H, W].
        temperature: T > 0.

    Returns:
        [N, D], with mean 1 over the channels.
    """
    return features.shape[1] * (features.abs().mean(dim=(2, 3)) / temperature).softmax(dim=1)


def keep_mask(attention: Tensor, ratio: float) -> Tensor:
    """0 where attention is highest, for the share `ratio` of the entries (rounded down), 1 elsewhere.

    Args:
        attention: [N, L]; of equal entries the one with the lower index counts as higher.
        ratio: in [0, 1].

    Returns:
        [N, L] of 0 and 1, without a graph.
    """
    count = int(ratio * attention.shape[1])
    highest = attention.detach().argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.ones_like(attention).scatter_(1, highest, 0.0)


def normalize_channels(features: Tensor) -> Tensor:
    """PKD's normalisation: each channel to mean 0 and deviation 1 over images and places.

        (F - mean) / (std + 1e-6), std unbiased

    Args:
        features: [N, D, H, W]; a channel of one value becomes 0.
    """
    count = features.numel() // max(features.shape[1], 1)
    std = features.std(dim=(0, 2, 3), keepdim=True, correction=min(1, count - 1))
    return (features - features.mean(dim=(0, 2, 3), keepdim=True)) / (std + 1e-6)


def check_targets(targets: Targets | None, images: int) -> Targets:
    """Raise unless there is one {"boxes": [M, 4]} per image."""
    if targets is None:
        raise ValueError('targets must be given to this loss: one {"boxes": [M, 4]} per image, got None')
    if len(targets) != images:
        raise ValueError(f"targets must be one per image, got {len(targets)} for {images} images")
    return targets


def check_ratio(ratio: float, name: str) -> None:
    """Raise unless the share is in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {ratio}")


def cells_of_boxes(boxes: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FGD's cells of a level in each box: from floor of its upper left to ceil of its lower right, inclusive.

    Args:
        boxes: [M, 4] xyxy in pixels of the padded batch.
        size: H, W of the level.
        image_size: height and width of the padded batch.

    Returns:
        Which cells belong to which box, [M, H, W] bool; and the boxes' areas in cells, [M], not cut at the map's edge.
    """
    (h, w), (image_h, image_w) = size, image_size
    scale = boxes.new_tensor([w / image_w, h / image_h])
    first, last = (boxes[:, :2] * scale).floor(), (boxes[:, 2:] * scale).ceil()
    x, y = (torch.arange(n, device=boxes.device, dtype=boxes.dtype) for n in (w, h))
    in_x = (x >= first[:, :1]) & (x <= last[:, :1])
    in_y = (y >= first[:, 1:]) & (y <= last[:, 1:])
    return in_y[:, :, None] & in_x[:, None, :], (last - first + 1).prod(dim=1)


def object_mask(targets: Targets, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Cells of a level that belong to any box, [N, H, W] bool."""
    return torch.stack([cells_of_boxes(target["boxes"], size, image_size)[0].any(dim=0) for target in targets])


class DualMasking(nn.Module):
    """Reconstruct a feature from which the places and the channels of the highest attention were taken out.

        F_S = G_S(F * M_S)    F_C = G_C(F * M_C)    fused = a F_S + (1 - a) F_C, a the softmax of two learnt numbers

    Args:
        width: D, of the feature and of the generators.
        spatial_ratio: share of places with M_S = 0.
        channel_ratio: share of channels with M_C = 0.
        masking: which of the two parts are on; with one, the fusion falls away.

    Raises:
        ValueError: a ratio outside [0, 1], or an unknown part.
    """

    def __init__(self, width: int, *, spatial_ratio: float, channel_ratio: float, masking: str = "both") -> None:
        super().__init__()
        check_ratio(spatial_ratio, "spatial_ratio")
        check_ratio(channel_ratio, "channel_ratio")
        if masking not in ("both", "spatial", "channel"):
            raise ValueError(f"masking must be 'both', 'spatial' or 'channel', got {masking!r}")
        self.spatial_ratio, self.channel_ratio = spatial_ratio, channel_ratio
        self.spatial = GenerationBlock(width) if masking != "channel" else None
        self.channel = GenerationBlock(width) if masking != "spatial" else None
        self.fusion = nn.Parameter(torch.zeros(2)) if masking == "both" else None

    def masks(self, places: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of the places [N, H, W] and of the channels [N, D], from attention of these shapes."""
        return keep_mask(places.flatten(1), self.spatial_ratio).view_as(places), keep_mask(channels, self.channel_ratio)

    def forward(self, features: Tensor, places: Tensor, channels: Tensor) -> Tensor:
        """The fused reconstruction [N, D, H, W] under attention over places [N, H, W] and channels [N, D]."""
        keep_places, keep_channels = self.masks(places, channels)
        made: list[Tensor] = []
        if self.spatial is not None:
            made.append(self.spatial(features * keep_places[:, None]))
        if self.channel is not None:
            made.append(self.channel(features * keep_channels[:, :, None, None]))
        if self.fusion is None:
            return made[0]
        share = self.fusion.softmax(dim=0)
        fused: Tensor = share[0] * made[0] + share[1] * made[1]
        return fused


def check_pyramid_reduction(reduction: str) -> str:
    """The reduction, unless it is neither "batch" nor "mean"."""
    if reduction not in ("batch", "mean"):
        raise ValueError(f"reduction must be 'batch' or 'mean', got {reduction!r}")
    return reduction


def squared_error(features: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    """Sum of squared differences over the batch's size ("batch"), or over all of their number ("mean")."""
    error = (features - wanted).square()
    return error.mean() if reduction == "mean" else error.sum() / max(len(error), 1)
