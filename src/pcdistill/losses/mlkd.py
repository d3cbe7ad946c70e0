"""Multi-level logit distillation (MLKD): probabilities, their correlation over samples and over classes, in two views.

Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023 (no arXiv id; CVF open access).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, shape, upcast
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.losses.lskd import standardize_logits
from pcdistill.ops.segments import kl_terms, log_softmax

__all__ = ["MLKDLoss", "MLKDNoAugLoss", "mlkd_loss"]

Views = Literal[1, 2]
TEMPERATURES = (4.0, 2.0, 3.0, 5.0, 6.0)


def check_views(views: int, logits: Tensor | None = None) -> None:
    """Raise unless views is 1 or 2 and, where logits are given, they hold that many equal views."""
    if isinstance(views, bool) or views not in (1, 2):
        raise ValueError(f"views must be 1 or 2, got {views!r}")
    if logits is not None and logits.shape[0] % views:
        raise ValueError(
            f"student_logits must be [2 N, C], the weak views before the strong ones, got {shape(logits)}; "
            "a loader with one view of each image needs views=1"
        )


def confidence_masks(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which samples [N] and classes [C] the teacher is at most as sure of as of the median one, as 0 or 1.

    The confidence of a sample is its largest probability at temperature 1, that of a class its sum over the batch.
    """
    probabilities = teacher_logits.softmax(dim=1)
    return _at_most_median(probabilities.amax(dim=1)), _at_most_median(probabilities.sum(dim=0))


def _at_most_median(confidence: Tensor) -> Tensor:
    # torch takes the lower of two middle values where the papers' code takes their mean: "at most" it is the same set.
    return (confidence <= confidence.median()).to(confidence.dtype)


def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    views: Views = 2,
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    masks: bool = True,
    average: bool = False,
    standardize_instance: bool = False,
    released: bool = False,
) -> Tensor:
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
    _check_options(temperatures, views, instance_weight, batch_weight, class_weight)
    check_views(views, student_logits)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    n = len(student) // views
    if n == 0:
        return student.sum()
    sample_mask, class_mask = confidence_masks(teacher[:n])
    if not masks:
        sample_mask, class_mask = torch.ones_like(sample_mask), torch.ones_like(class_mask)
    elif released:
        sample_mask, class_mask = (m.mean().expand_as(m) for m in (sample_mask, class_mask))
    instance_student = standardize_logits(student) if standardize_instance else student
    instance_teacher = standardize_logits(teacher) if standardize_instance else teacher
    loss = student[:0].sum()
    for i, temperature in enumerate(temperatures):
        kl = _instance(instance_student, instance_teacher, temperature)
        weak, strong = kl[:n], kl[n:]
        loss = loss + instance_weight * (sample_mask * weak).mean()
        if views == 2:
            loss = loss + instance_weight * (weak if released and i in (1, 4) else strong).mean()
        q = log_softmax(student[:n], temperature).exp()
        p = log_softmax(teacher[:n], temperature).exp()
        if batch_weight:
            loss = loss + batch_weight * (sample_mask * _gram_distance(p, q)).mean()
        if class_weight:
            loss = loss + class_weight * (class_mask * _gram_distance(p.T, q.T)).mean()
    return loss / len(temperatures) if average else loss


def _check_options(
    temperatures: Sequence[float], views: int, instance_weight: float, batch_weight: float, class_weight: float
) -> None:
    if isinstance(temperatures, str) or not isinstance(temperatures, Sequence) or not temperatures:
        raise ValueError(f"temperatures must be a list of at least one number, got {temperatures!r}")
    for i, temperature in enumerate(temperatures):
        check_temperature(temperature, f"temperatures[{i}]")
    check_views(views)
    check_weight(instance_weight, "instance_weight")
    check_weight(batch_weight, "batch_weight")
    check_weight(class_weight, "class_weight")


def _instance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p || q), [N]."""
    return kl_terms(log_softmax(teacher, temperature), log_softmax(student, temperature)).sum(dim=1) * temperature**2


def _gram_distance(p: Tensor, q: Tensor) -> Tensor:
    """Squared distance of the rows of p p' and q q', [rows of p]."""
    with torch.autocast(q.device.type, enabled=False):
        difference = p @ p.T - q @ q.T
    return difference.square().sum(dim=1)


class MLKDLoss(LogitLoss):
    """Module form of :func:`mlkd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(views=2)

    def __init__(
        self,
        *,
        temperatures: Sequence[float] = TEMPERATURES,
        views: Views = 2,
        instance_weight: float = 1.0,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
        masks: bool = True,
        average: bool = False,
        standardize_instance: bool = False,
        released: bool = False,
    ) -> None:
        super().__init__()
        _check_options(temperatures, views, instance_weight, batch_weight, class_weight)
        self.temperatures = tuple(temperatures)
        self.views: Views = views
        self.needs = Needs(views=views)
        self.instance_weight = instance_weight
        self.batch_weight = batch_weight
        self.class_weight = class_weight
        self.masks = masks
        self.average = average
        self.standardize_instance = standardize_instance
        self.released = released

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return mlkd_loss(
            student_logits,
            teacher_logits,
            temperatures=self.temperatures,
            views=self.views,
            instance_weight=self.instance_weight,
            batch_weight=self.batch_weight,
            class_weight=self.class_weight,
            masks=self.masks,
            average=self.average,
            standardize_instance=self.standardize_instance,
            released=self.released,
        )

    def extra_repr(self) -> str:
        return (
            f"temperatures={self.temperatures}, views={self.views}, instance_weight={self.instance_weight:g}, "
            f"batch_weight={self.batch_weight:g}, class_weight={self.class_weight:g}, masks={self.masks}, "
            f"average={self.average}, standardize_instance={self.standardize_instance}, released={self.released}"
        )


class MLKDNoAugLoss(MLKDLoss):
    """:class:`MLKDLoss` on one view of each image (views=1), under a name of its own for recipes and comparisons."""

    def __init__(
        self,
        *,
        temperatures: Sequence[float] = TEMPERATURES,
        instance_weight: float = 1.0,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
        masks: bool = True,
        average: bool = False,
        standardize_instance: bool = False,
        released: bool = False,
    ) -> None:
        super().__init__(
            temperatures=temperatures,
            views=1,
            instance_weight=instance_weight,
            batch_weight=batch_weight,
            class_weight=class_weight,
            masks=masks,
            average=average,
            standardize_instance=standardize_instance,
            released=released,
        )
