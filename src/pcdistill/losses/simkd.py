"""SimKD: the student keeps the teacher's classifier and learns only to reach its input.

Source: Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", arXiv
2203.14001 (2022).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill.losses._common import Reduction, reduce_loss, shape, upcast
from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    check_map_pair,
    classifier_of,
    full_precision,
    match_size,
    mse_per_sample,
    nothing,
    pool_to,
)
from pcdistill.losses.base import FeatureLoss, Needs

__all__ = ["SimKDLoss", "simkd_loss"]


def simkd_loss(student_map: Tensor, teacher_map: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference between the projected student's and the teacher's deepest feature map.

        loss = 1 / (D H W) * sum_{d,h,w} (P(F_s) - F_t)^2

    Args:
        student_map: P(F_s), [N, D, H, W], after the projector. Any floating dtype; the arithmetic is float32 or better.
        teacher_map: F_t, [N, D, H', W']. A constant: no gradient flows into it. Where the sizes differ, the larger map
            is average-pooled to the smaller.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero if and only if the maps are equal. N = 0 gives 0.

    Raises:
        ValueError: a shape, device or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 2203.14001, eq. 2.
    """
    check_map_pair(student_map, teacher_map)
    if student_map.shape[1] != teacher_map.shape[1]:
        raise ValueError(
            f"student features {shape(student_map)} and teacher features {shape(teacher_map)} must have one number of "
            "channels; pass the student's through a projector first"
        )
    f_s, f_t = match_size(upcast(student_map), upcast(teacher_map.detach()))
    return reduce_loss(mse_per_sample(f_s, f_t), reduction)


class Projector(nn.Module):
    """A bottleneck from the student's map to the teacher's channels: 1x1, 3x3, 1x1, each with normalisation and ReLU.

    Args:
        student_width: channels of the student's map.
        teacher_width: channels of the teacher's map.
        factor: the layers between have teacher_width / factor channels.
        shrink: height and width of the output over those of the input, each in (0, 1]; the map is pooled first.
    """

    def __init__(
        self, student_width: int, teacher_width: int, *, factor: int = 2, shrink: Sequence[float] = (1.0, 1.0)
    ) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be > 0, got {factor}")
        middle = max(1, teacher_width // factor)
        layers: list[nn.Module] = []
        for in_width, width, kernel in (
            (student_width, middle, 1),
            (middle, middle, 3),
            (middle, teacher_width, 1),
        ):
            conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, bias=False)
            layers += [conv, AdapterNorm(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.shrink = (float(shrink[0]), float(shrink[1]))
        self.widths, self.factor = (student_width, teacher_width), factor

    def forward(self, student_map: Tensor) -> Tensor:
        """[N, D_s, H, W] -> [N, D_t, round(shrink H), round(shrink W)]."""
        height, width = (max(1, round(s * r)) for s, r in zip(student_map.shape[2:], self.shrink, strict=True))
        out: Tensor = self.layers(pool_to(student_map, (height, width)))
        return out


class SimKDHead(nn.Module):
    """What stands in for the student's classifier: projector, global average, and the teacher's classifier, frozen.

    Args:
        student_width: channels of the student's deepest map.
        teacher_width: what the teacher's classifier reads.
        num_classes: its outputs.
        bias: whether it has a bias.
        factor: as in :class:`Projector`.
        shrink: as in :class:`Projector`.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        num_classes: int,
        *,
        bias: bool = True,
        factor: int = 2,
        shrink: Sequence[float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.projector = Projector(student_width, teacher_width, factor=factor, shrink=shrink)
        self.classifier = nn.Linear(teacher_width, num_classes, bias=bias).requires_grad_(False)

    def forward(self, student_map: Tensor) -> Tensor:
        """Maps [N, D_s, H, W] -> logits [N, C]."""
        logits: Tensor = self.classifier(self.projector(student_map).mean((2, 3)))
        return logits

    def config(self) -> dict[str, Any]:
        """The arguments that build a head like this one, as plain values: they stand beside the student's weights."""
        student_width, teacher_width = self.projector.widths
        return {
            "student_width": student_width,
            "teacher_width": teacher_width,
            "num_classes": self.classifier.out_features,
            "bias": self.classifier.bias is not None,
            "factor": self.projector.factor,
            "shrink": list(self.projector.shrink),
        }


class SimKDLoss(FeatureLoss):
    """:func:`simkd_loss` of the deepest maps, with its projector.

    The student that is trained and shipped makes its logits by :meth:`student_head`; its own classifier is not used.
    `pcdistill` swaps the head before training, and then reads the projected map from `student.projected`.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch. The last of `maps` must be what its classifier reads after averaging.
        factor: the projector's layers between have the teacher's width / factor channels.
    """

    needs = Needs(new_head=True, replaces_labels=True)

    def __init__(self, student: Features, teacher: Features, *, factor: int = 2) -> None:
        super().__init__()
        classifier = classifier_of(teacher, "SimKD")
        student_map, teacher_map = student.maps[-1], teacher.maps[-1]
        check_map_pair(student_map, teacher_map)
        if not isinstance(classifier, nn.Linear):
            raise ValueError(f"SimKD needs a linear classifier of the teacher, got {type(classifier).__name__}")
        if not _averages(teacher_map, teacher.pooled):
            raise ValueError(
                f"the teacher's last map {shape(teacher_map)} must be what its classifier reads after averaging, "
                f"{shape(teacher.pooled)}; name the layer before the global pooling as the last of teacher.features"
            )
        shrink = [min(1.0, t / s) for s, t in zip(student_map.shape[2:], teacher_map.shape[2:], strict=True)]
        widths = student_map.shape[1], teacher_map.shape[1]
        self.projector = Projector(*widths, factor=factor, shrink=shrink).to(student_map.device)
        self._hidden = (classifier,)  # a tuple: the teacher's classifier is no part of this module

    def student_head(self) -> SimKDHead:
        """The head that goes on the student's deepest map; it shares this loss's projector."""
        classifier = self._hidden[0]
        head = SimKDHead(
            *self.projector.widths,
            classifier.out_features,
            bias=classifier.bias is not None,
            factor=self.projector.factor,
            shrink=self.projector.shrink,
        )
        with torch.no_grad():
            head.classifier.weight.copy_(classifier.weight)
            if classifier.bias is not None:
                head.classifier.bias.copy_(classifier.bias)
        head.to(classifier.weight.device)
        head.projector = self.projector
        return head

    def use_head(self, head: nn.Module) -> None:
        """Learn the projector of this head, which stands on the student."""
        self.projector = head.projector  # type: ignore[assignment]

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        if student.logits.shape[0] == 0:
            return nothing(student)
        projected = student.projected
        if projected is None:
            with full_precision(student.maps[-1]):
                projected = self.projector(upcast(student.maps[-1]))
        return simkd_loss(projected, teacher.maps[-1])

    def extra_repr(self) -> str:
        return f"factor={self.projector.factor}"


def _averages(teacher_map: Tensor, pooled: Tensor) -> bool:
    """Whether the pooled features are the map's averages; of tensors without values, whether they could be."""
    if teacher_map.shape[1] != pooled.shape[1]:
        return False
    if teacher_map.is_meta:
        return True
    average, pooled = upcast(teacher_map).mean((2, 3)), upcast(pooled)
    return bool((average - pooled).abs().sum() <= 0.02 * pooled.abs().sum())  # half precision is this coarse
