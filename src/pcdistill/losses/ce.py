"""Cross-entropy with the labels: the part of every recipe that needs no teacher."""

import torch.nn.functional as F
from torch import Tensor

from pcdistill.losses._common import Reduction, check_logits, check_reduction, check_target, reduce_loss, upcast
from pcdistill.losses.base import LogitLoss, Needs

__all__ = ["CELoss", "ce_loss"]


def _check_label_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")


def ce_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy between the labels and the student's probabilities.

        y' = (1 - e) y + e / C    loss = -sum_c y'_c log softmax(z_s)_c    (y one-hot, or soft labels as given)

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: unused, may be None; here so that all logit losses are called alike.
        target: class indices [N], or probabilities [N, C] (mixup, cutmix). Required.
        label_smoothing: e in [0, 1), the share of the label that is spread over all classes. Customary: 0 or 0.1.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss in nats: a scalar, or [N] for "none". N = 0 gives 0.

    Raises:
        ValueError: a shape, target, label_smoothing or reduction that does not fit.
        TypeError: logits that are not floating point.
    """
    check_logits(student_logits, student_logits)
    _check_label_smoothing(label_smoothing)
    target = check_target(target, student_logits)
    logits = upcast(student_logits)
    soft = target.to(logits.dtype) if target.is_floating_point() else target
    per_sample = F.cross_entropy(logits, soft, reduction="none", label_smoothing=label_smoothing)
    return reduce_loss(per_sample, reduction)


class CELoss(LogitLoss):
    """Module form of :func:`ce_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(teacher=False, labels=True)

    def __init__(self, *, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_label_smoothing(label_smoothing)
        check_reduction(reduction)
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        return ce_loss(student_logits, target=target, label_smoothing=self.label_smoothing, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}"
