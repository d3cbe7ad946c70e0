"""Label revision (LR): the teacher's logits where it is right, its probabilities moved to the label where it is not.

Source: "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693 (2024), without its
selection of data, as the baseline called LR, class name REVISION, in the released code of arXiv 2408.07703.
"""

import torch.nn.functional as F
from torch import Tensor

from pcdistill.losses._common import check_logits, check_target, check_weight, upcast
from pcdistill.losses.base import LogitLoss, Needs

__all__ = ["RevisionLoss", "revision_loss"]


def _check_teacher_share(teacher_share: float) -> None:
    if not 0.0 <= teacher_share <= 1.0:
        raise ValueError(f"teacher_share must be from 0 to 1, got {teacher_share}")


def revision_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    logit_weight: float = 4.0,
    revised_weight: float = 1.0,
    teacher_share: float = 0.8,
) -> Tensor:
    """Cross-entropy and squared logit error where the teacher is right; squared error to revised labels where not.

        right samples:  ce_weight * CE(z_s, y) + logit_weight * mean_c (z_s,c - z_t,c)^2
        wrong samples:  revised_weight * mean_c (softmax(z_s)_c - p'_c)^2
        p = softmax(z_t)    b = teacher_share / (max_c p_c - p_y + 1)    p' = b p + (1 - b) onehot(y)
        loss = mean over the right samples + mean over the wrong samples

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: y, class indices [N], required. Soft labels are refused: the teacher is right or wrong about one class.
        ce_weight: weight of the cross-entropy, which the method has on the right samples only. With 1 the loss is the
            whole objective and no `ce` term belongs beside it; 0 leaves it out, for a `ce` term over all samples.
        logit_weight: weight of the logits' squared error.
        revised_weight: weight of the revised labels' squared error.
        teacher_share: the paper's eta in [0, 1], what is left of the teacher's probabilities; below 1 the true class
            is always the largest of p'. Customary: 0.8.

    Returns:
        A scalar. Never negative; without cross-entropy zero if z_s = z_t on the right samples and softmax(z_s) = p'
        on the wrong ones. A kind without samples counts 0; N = 0 gives 0. There is no `reduction`: each kind is
        averaged over its own samples, so that the loss is no mean over all.

    Raises:
        ValueError: a shape, device, target, weight or teacher_share that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2404.03693, with weights and averages of the LR baseline in the released code of arXiv 2408.07703. A label
        that ties for the teacher's largest logit counts as right (our choice; the code takes the first of them). The
        squared error of logits grows without bound: a float16 gradient holds differences up to 8000 C (right samples).
    """
    check_logits(student_logits, teacher_logits)
    hard = check_target(target, student_logits, hard_only=True)
    index = hard[:, None]
    check_weight(ce_weight, "ce_weight")
    check_weight(logit_weight, "logit_weight")
    check_weight(revised_weight, "revised_weight")
    _check_teacher_share(teacher_share)
    z_s, z_t = upcast(student_logits), upcast(teacher_logits.detach())
    right = z_t.gather(1, index)[:, 0] >= z_t.amax(dim=1)

    ce = F.cross_entropy(z_s, hard, reduction="none")
    logit_error = (z_s - z_t).square().mean(dim=1)

    p = z_t.softmax(dim=1)
    keep = teacher_share / (p.amax(dim=1, keepdim=True) - p.gather(1, index) + 1)
    revised = keep * p
    revised = revised.scatter(1, index, revised.gather(1, index) + (1 - keep))
    revised_error = (z_s.softmax(dim=1) - revised).square().mean(dim=1)

    on_right = _mean_where(right, ce_weight * ce + logit_weight * logit_error)
    return on_right + _mean_where(~right, revised_weight * revised_error)


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values [N] where the mask is true; 0 with a graph where it nowhere is."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


class RevisionLoss(LogitLoss):
    """Module form of :func:`revision_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(labels=True, soft_labels=False)

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        logit_weight: float = 4.0,
        revised_weight: float = 1.0,
        teacher_share: float = 0.8,
    ) -> None:
        super().__init__()
        check_weight(ce_weight, "ce_weight")
        check_weight(logit_weight, "logit_weight")
        check_weight(revised_weight, "revised_weight")
        _check_teacher_share(teacher_share)
        self.ce_weight = ce_weight
        self.logit_weight = logit_weight
        self.revised_weight = revised_weight
        self.teacher_share = teacher_share

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return revision_loss(
            student_logits,
            teacher_logits,
            target,
            ce_weight=self.ce_weight,
            logit_weight=self.logit_weight,
            revised_weight=self.revised_weight,
            teacher_share=self.teacher_share,
        )

    def extra_repr(self) -> str:
        return (
            f"ce_weight={self.ce_weight:g}, logit_weight={self.logit_weight:g}, "
            f"revised_weight={self.revised_weight:g}, teacher_share={self.teacher_share:g}"
        )
