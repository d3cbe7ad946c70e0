"""Scale-decoupled distillation (SDD): a logit loss on every region of the image, not only on the image as a whole.

Source: Wei, Luo, Luo, "Scale Decoupled Distillation", arXiv 2403.13512 (2024).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_reduction,
    check_target,
    check_temperature,
    check_weight,
    reduce_loss,
    shape,
    upcast,
)
from pcdistill.losses._features import Features
from pcdistill.losses.base import FeatureLoss, Needs
from pcdistill.losses.dkd import dkd_loss
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.nkd import nkd_loss

__all__ = ["SDDLoss", "sdd_loss"]

Base = Literal["kd", "dkd", "nkd"]
BASES: dict[str, Callable[..., Tensor]] = {"kd": kd_loss, "dkd": dkd_loss, "nkd": nkd_loss}


def _check_scales(scales: Sequence[int]) -> None:
    whole = all(isinstance(scale, int) and not isinstance(scale, bool) for scale in scales)
    if not whole or not scales or scales[0] != 1 or any(a >= b for a, b in pairwise(scales)):
        raise ValueError(f"scales must be rising whole numbers from 1 on, such as [1, 2, 4], got {list(scales)}")


def scale_cells(feature_map: Tensor, classifier: Callable[[Tensor], Tensor], scales: Sequence[int] = (1, 2)) -> Tensor:
    """Logits of every cell of a feature map: its regions are averaged, and the network's own classifier reads each.

        cells = classifier(mean of the map over each cell of an s x s grid), for s in scales

    Args:
        feature_map: the map that the network averages for its classifier, [N, D, H, W].
        classifier: what makes logits of averages, [K, D] -> [K, C]; one for all cells.
        scales: grids, from coarse to fine; the first is 1, the whole map. Customary: (1, 2) for networks of one family,
            (1, 2, 4) for others. The finest must not be finer than the map.

    Returns:
        [N, C, M], M = sum of s^2: first the whole map, then the cells of each grid, row by row. They have the precision
        of the network's own logits: the classifier runs under the autocast that is on.

    Raises:
        ValueError: a map that is not [N, D, H, W] or is coarser than the finest grid, or scales that do not fit.

    Source:
        arXiv 2403.13512, section 3. Each grid is averaged from the map itself, so that the first cell is the network's
        own output; the released code averages the coarser grids from the finest, which is the same where the finest
        divides the map evenly.
    """
    _check_scales(scales)
    if feature_map.ndim != 4 or 0 in feature_map.shape[1:]:
        raise ValueError(f"feature_map must be [N, D, H, W], got {shape(feature_map)}")
    if scales[-1] > min(feature_map.shape[2:]):
        raise ValueError(
            f"scales must not be finer than the feature map, {feature_map.shape[2]} x {feature_map.shape[3]}, "
            f"got {list(scales)}; leave the larger ones out"
        )
    n, width = feature_map.shape[:2]
    pooled = torch.cat([F.adaptive_avg_pool2d(feature_map, scale).flatten(2) for scale in scales], dim=2)  # [N, D, M]
    count = pooled.shape[2]
    logits = classifier(pooled.transpose(1, 2).reshape(n * count, width))
    return logits.reshape(n, count, logits.shape[-1]).transpose(1, 2)


def sdd_loss(
    student_cells: Tensor,
    teacher_cells: Tensor,
    target: Tensor | None = None,
    *,
    base: Base = "kd",
    temperature: float | None = None,
    target_weight: float | None = None,
    non_target_weight: float | None = None,
    conflict_weight: float = 2.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """A logit loss averaged over the cells of each sample, with more weight on cells that contradict the whole.

        right_m = (argmax_c z_t,c,m = y)       w_m = 1 if right_m = right_0, else conflict_weight
        loss    = 1/M * sum_m w_m * base(z_s,m , z_t,m , y)            cell 0 is the whole image

    Args:
        student_cells: z_s, [N, C, M], from :func:`scale_cells`. Any floating dtype; the arithmetic is float32, or
            float64 for float64 input.
        teacher_cells: z_t, [N, C, M]. A constant: no gradient flows into it.
        target: y, class indices [N], required. Soft labels are refused: a cell is right or wrong about one class.
        base: the loss of one cell: "kd" (SD-KD), "dkd" (SD-DKD) or "nkd" (SD-NKD).
        temperature: of the base; None is the base's own default.
        target_weight: of "dkd" and "nkd"; None is the base's own default.
        non_target_weight: of "dkd" and "nkd"; None is the base's own default.
        conflict_weight: weight >= 0 of a cell in which the teacher is right where it is wrong on the whole, or the
            other way round. The paper's is 2; 1 weighs all cells alike.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero where the base is zero in every cell. With M = 1 it is the base on logits.
        N = 0 gives 0.

    Raises:
        ValueError: a shape, device, target, base, option or reduction that does not fit.
        TypeError: cells that are not floating point.

    Source:
        arXiv 2403.13512, section 3. SD-KD: weight 0.9 beside 0.1 cross-entropy, temperature 4. SD-DKD and SD-NKD:
        weight 1 beside cross-entropy, warm-up 20 epochs (30 in the paper). The released SD-NKD keeps the target class
        among the non-target ones by mistake; this one does not. A class that ties for a cell's largest logit counts
        as right (our choice; the code takes the first of them).
    """
    if student_cells.ndim != 3 or student_cells.shape[1] < 2 or student_cells.shape[2] < 1:
        raise ValueError(f"student_cells must be [N, C, M] with C >= 2 and M >= 1, got {shape(student_cells)}")
    if teacher_cells.shape != student_cells.shape:
        raise ValueError(
            f"teacher_cells {shape(teacher_cells)} and student_cells {shape(student_cells)} must have one shape; "
            "use the same scales for both and map the teacher's classes to the student's first"
        )
    hard = check_target(target, student_cells[:, :, 0], hard_only=True)
    options = _base_options(base, temperature, target_weight, non_target_weight)
    check_weight(conflict_weight, "conflict_weight")
    check_reduction(reduction)
    n, classes, count = student_cells.shape
    student = student_cells.transpose(1, 2).reshape(n * count, classes)
    teacher = teacher_cells.detach().transpose(1, 2).reshape(n * count, classes)
    labels = hard.repeat_interleave(count)
    per_cell = BASES[base](student, teacher, labels, reduction="none", **options).reshape(n, count)
    right = (teacher.gather(1, labels[:, None])[:, 0] >= teacher.amax(dim=1)).reshape(n, count)
    weight = torch.where(right == right[:, :1], 1.0, conflict_weight).to(per_cell.dtype)
    return reduce_loss((weight * per_cell).sum(dim=1) / count, reduction)


def _base_options(
    base: str, temperature: float | None, target_weight: float | None, non_target_weight: float | None
) -> dict[str, float]:
    """The options of the base that were given, checked."""
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(map(repr, BASES))}, got {base!r}")
    weights = {"target_weight": target_weight, "non_target_weight": non_target_weight}
    options = {name: weight for name, weight in weights.items() if weight is not None}
    for name, weight in options.items():
        if base == "kd":
            raise ValueError(f'{name} must be left out for base "kd", which has no target part, got {weight}')
        check_weight(weight, name)
    if temperature is not None:
        check_temperature(temperature)
        options["temperature"] = temperature
    return options


class SDDLoss(FeatureLoss):
    """SDD on the features of both networks: cells by :func:`scale_cells`, then :func:`sdd_loss`; options are theirs.

    The last of `maps` must be the map that the network averages for its classifier, and `classifier` the network's own:
    the student's is trained through the cells as well. It is no part of this module, whose state is empty.

    Raises:
        ValueError: also if a network shows no classifier, or a last map that its classifier does not read.
    """

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        scales: Sequence[int] = (1, 2),
        base: Base = "kd",
        temperature: float | None = None,
        target_weight: float | None = None,
        non_target_weight: float | None = None,
        conflict_weight: float = 2.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_scales(scales)
        _base_options(base, temperature, target_weight, non_target_weight)
        check_weight(conflict_weight, "conflict_weight")
        check_reduction(reduction)
        self.scales = tuple(scales)
        self.base: Base = base
        self.temperature = temperature
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.conflict_weight = conflict_weight
        self.reduction: Reduction = reduction

    def forward(self, student_features: Features, teacher_features: Features, target: Tensor | None = None) -> Tensor:
        student_cells = self._cells(student_features, "student")
        with torch.no_grad():
            teacher_cells = self._cells(teacher_features, "teacher")
        return sdd_loss(
            student_cells,
            teacher_cells,
            target,
            base=self.base,
            temperature=self.temperature,
            target_weight=self.target_weight,
            non_target_weight=self.non_target_weight,
            conflict_weight=self.conflict_weight,
            reduction=self.reduction,
        )

    def _cells(self, features: Features, owner: str) -> Tensor:
        if features.classifier is None:
            raise ValueError(
                f"the {owner} must show its classifier to SDD, the layer that makes logits of pooled features"
            )
        feature_map, width = features.maps[-1], features.pooled.shape[1]
        if feature_map.ndim != 4 or feature_map.shape[1] != width:
            raise ValueError(
                f"the {owner}'s last map must be what its classifier reads after averaging, [N, {width}, H, W], "
                f"got {shape(feature_map)}; name the layer before the global pooling"
            )
        cells = scale_cells(feature_map, features.classifier, self.scales)
        if cells.shape[1] != features.logits.shape[1]:
            classes = features.logits.shape[1]
            raise ValueError(f"the {owner}'s classifier must give its {classes} logits, got {cells.shape[1]} classes")
        return upcast(cells)

    def extra_repr(self) -> str:
        return (
            f"scales={self.scales}, base={self.base!r}, temperature={self.temperature}, "
            f"conflict_weight={self.conflict_weight:g}, reduction={self.reduction!r}"
        )
