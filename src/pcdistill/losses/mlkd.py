"""Multi-level logit distillation (MLKD): probabilities, their correlation over samples and over classes, in two views.

Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023 (no arXiv id; CVF open access).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, full_precision, upcast
from pcdistill.losses._views import Views, check_views, confidence_masks
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.losses.lskd import standardize_logits
from pcdistill.losses.options import takes, values_of
from pcdistill.ops.segments import kl_terms, log_softmax

__all__ = ["MLKDLoss", "MLKDNoAugLoss", "mlkd_loss"]

TEMPERATURES = (4.0, 2.0, 3.0, 5.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class MLKDOptions:
    """What :func:`mlkd_loss` and its modules can be told.

    Args:
        temperatures: each T > 0. Customary: 4, 2, 3, 5, 6.
        views: 2: the paper's method. 1: [N, C], the same without its strong term (MLKD_NOAUG of the RLD and PCD codes).
        instance_weight: weight of the KL, >= 0. The paper's is 1.
        batch_weight: weight of the N x N term, >= 0. The paper's is 1.
        class_weight: weight of the C x C term, >= 0. The paper's is 1.
        masks: False sets every m_n and k_c to 1.
        average: divide by the number of temperatures: the mean that is intended, where the released code sums.
        standardize_instance: z-scores (LSKD) inside the KL only, as the logit-standardisation paper does it for MLKD.
        released: what the released code computes: m and k are replaced by their means (it reduces every term to a
            scalar before it applies the mask), and the second and the fifth temperature's "strong" KL is that of the
            weak view.

    Raises:
        ValueError: a temperature, weight or number of views that does not fit.
    """

    temperatures: Sequence[float] = TEMPERATURES
    views: Views = 2
    instance_weight: float = 1.0
    batch_weight: float = 1.0
    class_weight: float = 1.0
    masks: bool = True
    average: bool = False
    standardize_instance: bool = False
    released: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.temperatures, str) or not isinstance(self.temperatures, Sequence) or not self.temperatures:
            raise ValueError(f"temperatures must be a list of at least one number, got {self.temperatures!r}")
        for i, temperature in enumerate(self.temperatures):
            check_temperature(temperature, f"temperatures[{i}]")
        check_views(self.views)
        for name in ("instance_weight", "batch_weight", "class_weight"):
            check_weight(getattr(self, name), name)


@takes(MLKDOptions)
def mlkd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
    """KL of the probabilities in both views, and Gram matrices over samples and over classes in the weak one.

        P = softmax(z_t / T), Q = softmax(z_s / T), [N, C], of one view
        I_n = T^2 KL(P_n || Q_n)    B_n = sum_m ((P P')_nm - (Q Q')_nm)^2    K_c = sum_d ((P'P)_cd - (Q'Q)_cd)^2
        L(T) = instance_weight * mean_n m_n I_n^weak + instance_weight * mean_n I_n^strong
             + batch_weight * mean_n m_n B_n^weak + class_weight * mean_c k_c K_c^weak
        loss = sum over T of L(T)
        m_n = 1 where the teacher's confidence in the weak view is at most the batch's median, else 0; k_c alike

    Args:
        student_logits: z_s, [2 N, C], the N weak views first ([N, C] for views=1). Any floating dtype; the arithmetic
            is float32, or float64 for float64 input.
        teacher_logits: z_t, of the same images and shape. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike. Soft labels make no difference.
        options: the fields of :class:`MLKDOptions`.

    Returns:
        A scalar in nats (times T^2 in the KL), zero at P = Q. N = 0 gives 0. For N = 1 the one sample is its own median
        and is kept.

    Raises:
        ValueError: a shape, device, temperature, weight or number of views that does not fit.
        TypeError: logits that are not floating point.

    Source:
        CVPR 2023 paper, section 3; customary recipe 0.1 * (CE of either view) and 0.9 * MLKD. Our choices: the masks
        act per sample and per class, on the rows of the two Gram matrices (they are symmetric), because a mask after
        the mean masks nothing; temperatures are summed by default, because the customary weights belong to the sum.
    """
    check_logits(student_logits, teacher_logits)
    of = MLKDOptions(**options)
    check_views(of.views, student_logits)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    n = len(student) // of.views
    if n == 0:
        return student.sum()
    sample_mask, class_mask = confidence_masks(teacher[:n])
    if not of.masks:
        sample_mask, class_mask = torch.ones_like(sample_mask), torch.ones_like(class_mask)
    elif of.released:
        sample_mask, class_mask = (m.mean().expand_as(m) for m in (sample_mask, class_mask))
    instance_student = standardize_logits(student) if of.standardize_instance else student
    instance_teacher = standardize_logits(teacher) if of.standardize_instance else teacher
    loss = student[:0].sum()
    for i, temperature in enumerate(of.temperatures):
        kl = _instance(instance_student, instance_teacher, temperature)
        weak, strong = kl[:n], kl[n:]
        loss = loss + of.instance_weight * (sample_mask * weak).mean()
        if of.views == 2:
            loss = loss + of.instance_weight * (weak if of.released and i in (1, 4) else strong).mean()
        q = log_softmax(student[:n], temperature).exp()
        p = log_softmax(teacher[:n], temperature).exp()
        if of.batch_weight:
            loss = loss + of.batch_weight * (sample_mask * _gram_distance(p, q)).mean()
        if of.class_weight:
            loss = loss + of.class_weight * (class_mask * _gram_distance(p.T, q.T)).mean()
    return loss / len(of.temperatures) if of.average else loss


def _instance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p || q), [N]."""
    return kl_terms(log_softmax(teacher, temperature), log_softmax(student, temperature)).sum(dim=1) * temperature**2


def _gram_distance(p: Tensor, q: Tensor) -> Tensor:
    """Squared distance of the rows of p p' and q q', [rows of p]."""
    with full_precision(q):
        difference = p @ p.T - q @ q.T
    return difference.square().sum(dim=1)


@takes(MLKDOptions)
class MLKDLoss(LogitLoss):
    """Module form of :func:`mlkd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(views=2)
    options: type[MLKDOptions]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.chosen = self.options(**options)
        self.needs = Needs(views=self.chosen.views)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return mlkd_loss(student_logits, teacher_logits, **values_of(self.chosen))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in values_of(self.chosen).items())


@dataclass(frozen=True, kw_only=True)
class MLKDNoAugOptions(MLKDOptions):
    """:class:`MLKDOptions` for one view of each image."""

    views: Views = field(default=1, init=False)


@takes(MLKDNoAugOptions)
class MLKDNoAugLoss(MLKDLoss):
    """:class:`MLKDLoss` on one view of each image (views=1), under a name of its own for recipes and comparisons."""
