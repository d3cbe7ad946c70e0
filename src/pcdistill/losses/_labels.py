"""What the losses on hard labels share: the checked input, and the split into the target class and the others."""

import torch
from torch import Tensor

from pcdistill.losses._common import (
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    check_weight,
    upcast,
)


def labelled(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits, the teacher's without a graph, both [N, C] in float32 or better, and the labels [N].

    Raises:
        ValueError: a shape, device or target that does not fit; soft labels, which name no target class.
        TypeError: logits that are not floating point.
    """
    check_logits(student_logits, teacher_logits)
    labels = check_target(target, student_logits, hard_only=True)
    return upcast(student_logits), upcast(teacher_logits.detach()), labels


def split_target(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the target class [N] and of the other classes [N, C - 1], in class order.

    Leaving the target class out is exact; lowering its logit by 1000, as the released codes do, is not: at logits of
    1e4 the target would win all the same.
    """
    label = target[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = others + (others >= label)
    return logits.gather(1, label)[:, 0], logits.gather(1, others)


def check_parts(temperature: float, target_weight: float, non_target_weight: float, reduction: str) -> None:
    """Raise unless the options of a loss with a target part and a non-target part fit."""
    check_temperature(temperature)
    check_weight(target_weight, "target_weight")
    check_weight(non_target_weight, "non_target_weight")
    check_reduction(reduction)
