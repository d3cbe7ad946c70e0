"""Cosine-similarity distillation (CSKD): each class's probabilities over the batch point where the teacher's point.

Source: Ham et al., "Cosine Similarity Knowledge Distillation for Individual Class Information Transfer", arXiv
2311.14307 (2023).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, full_precision, upcast
from pcdistill.losses._views import Views, check_views, confidence_masks
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.losses.dist import cosine_distance
from pcdistill.losses.options import takes, values_of

__all__ = ["CSKDLoss", "CSKDNoAugLoss", "cskd_loss"]

SPREAD = 1e-6  # similarities closer together than this are one similarity: float32 has no more digits near 1


def cswt_temperatures(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    min_temperature: float = 2.0,
    max_temperature: float = 6.0,
) -> Tensor:
    """A temperature per sample (CSWT): the more alike student and teacher are on it, the lower.

        s_n = cos(softmax(z_s,n), softmax(z_t,n))
        T_n = T_min + (T_max - T_min) * (max s - s_n) / max(max s - min s, 1e-6)

    Args:
        student_logits: z_s, [N, C], N >= 1.
        teacher_logits: z_t, [N, C].
        min_temperature: T_min > 0, of the batch's most similar sample.
        max_temperature: T_max >= T_min, of its least similar one.

    Returns:
        [N], a constant: no gradient flows through it. A batch of equally similar samples (one sample, say) gets T_min
        throughout (our choice: the definition divides by zero there).

    Source:
        arXiv 2311.14307, cosine similarity weighted temperature.
    """
    student, teacher = upcast(student_logits.detach()), upcast(teacher_logits.detach())
    distance = cosine_distance(student.softmax(dim=1), teacher.softmax(dim=1), eps=torch.finfo(student.dtype).tiny)
    if distance.shape[0] == 0:
        return distance
    least, most = distance.amin(), distance.amax()
    return min_temperature + (max_temperature - min_temperature) * (distance - least) / (most - least).clamp(min=SPREAD)


@dataclass(frozen=True, kw_only=True)
class CSKDOptions:
    """What :func:`cskd_loss` and its modules can be told.

    Args:
        temperature: T > 0 of the fixed part. Customary: 4.
        min_temperature: lower end of the per-sample temperatures, > 0. Customary: 2.
        max_temperature: upper end, >= min_temperature. Customary: 6.
        views: 2: the full form. 1: [N, C], the same without its strong term.
        cosine_weight: weight of L_cs, >= 0. The paper's is 2.
        fixed_weight: weight of the fixed temperature's terms, >= 0.
        cswt_weight: weight of the per-sample temperatures' terms, >= 0.
        class_weight: weight of L_cc, >= 0.
        batch_weight: weight of L_bc, >= 0.
        masks: False sets m and k to 1.
        eps: > 0, added to the product of two norms. Classes whose probabilities are smaller than its root throughout
            the batch count as unlike.

    Raises:
        ValueError: a temperature, weight, eps or number of views that does not fit.
    """

    temperature: float = 4.0
    min_temperature: float = 2.0
    max_temperature: float = 6.0
    views: Views = 2
    cosine_weight: float = 2.0
    fixed_weight: float = 1.0
    cswt_weight: float = 1.0
    class_weight: float = 1.0
    batch_weight: float = 1.0
    masks: bool = True
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_temperature(self.min_temperature, "min_temperature")
        check_temperature(self.max_temperature, "max_temperature")
        if self.max_temperature < self.min_temperature:
            least = f"at least min_temperature = {self.min_temperature}"
            raise ValueError(f"max_temperature must be {least}, got {self.max_temperature}")
        check_views(self.views)
        for name in ("cosine_weight", "fixed_weight", "cswt_weight", "class_weight", "batch_weight"):
            check_weight(getattr(self, name), name)
        check_temperature(self.eps, "eps")


@takes(CSKDOptions)
def cskd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
    """Cosine distance of the classes' probabilities over the batch, at a fixed and at a per-sample temperature.

        P = softmax(z_t / T), Q = softmax(z_s / T), [N, C], of one view; cos(a, b) = a.b / (|a| |b| + eps)
        L_cs(T) = cosine_weight * mean(T)^2 * (1 - mean_c cos(P[:, c], Q[:, c]))
        L_cc(T) = 1 - mean_c cos((P'P)[c], (Q'Q)[c])    L_bc(T) = 1 - mean_n cos((PP')[n], (QQ')[n])
        A(L) = fixed_weight * L(temperature) + cswt_weight * L(T_n), T_n by :func:`cswt_temperatures` of the weak view
        loss = m * A(L_cs)^weak + A(L_cs)^strong + class_weight * k * A(L_cc)^weak + batch_weight * m * A(L_bc)^weak
        m: share of samples whose teacher confidence in the weak view is at most the batch's median; k alike for classes

    Args:
        student_logits: z_s, [2 N, C], the N weak views first ([N, C] for views=1). Any floating dtype; the arithmetic
            is float32, or float64 for float64 input.
        teacher_logits: z_t, of the same images and shape. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike. Soft labels make no difference.
        options: the fields of :class:`CSKDOptions`.

    Returns:
        A scalar. At P = Q it is zero up to eps. It depends on the batch's size and composition. For N = 1 every cosine
        of L_cs and L_bc is 1 (up to eps): they vanish. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, weight, eps or number of views that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2311.14307; the full objective, its masks and its two Gram terms as in the code that is published with
        it, cross-entropy of both views beside it. There as here m and k are shares, so numbers near 0.5: they choose
        no samples. Where all similarities of a batch are equal we define CSWT, the code divides by zero.
    """
    check_logits(student_logits, teacher_logits)
    of = CSKDOptions(**options)
    check_views(of.views, student_logits)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    n = len(student) // of.views
    if n == 0:
        return student.sum()
    per_sample = cswt_temperatures(
        student[:n], teacher[:n], min_temperature=of.min_temperature, max_temperature=of.max_temperature
    )
    sample_share = class_share = torch.ones_like(per_sample[0])
    if of.masks:
        sample_share, class_share = (mask.mean() for mask in confidence_masks(teacher[:n]))
    loss = student[:0].sum()
    fixed = torch.full_like(per_sample, of.temperature)
    for weight, temperatures in ((of.fixed_weight, fixed), (of.cswt_weight, per_sample)):
        if weight == 0:
            continue
        q, p = (_softmax(z[:n], temperatures) for z in (student, teacher))
        scale = of.cosine_weight * temperatures.mean() ** 2
        part = sample_share * scale * cosine_distance(p.T, q.T, eps=of.eps).mean()
        if of.views == 2:
            strong_q, strong_p = (_softmax(z[n:], temperatures) for z in (student, teacher))
            part = part + scale * cosine_distance(strong_p.T, strong_q.T, eps=of.eps).mean()
        if of.class_weight:
            part = part + of.class_weight * class_share * _gram_distance(p.T, q.T, of.eps)
        if of.batch_weight:
            part = part + of.batch_weight * sample_share * _gram_distance(p, q, of.eps)
        loss = loss + weight * part
    return loss


def _softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """softmax over dim 1 with a temperature for each row."""
    return ((logits - logits.amax(dim=1, keepdim=True)) / temperatures[:, None]).softmax(dim=1)


def _gram_distance(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """1 - the mean cosine of the rows of p p' and q q'."""
    with full_precision(q):
        return cosine_distance(p @ p.T, q @ q.T, eps=eps).mean()


@takes(CSKDOptions)
class CSKDLoss(LogitLoss):
    """Module form of :func:`cskd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(views=2)
    options: type[CSKDOptions]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.chosen = self.options(**options)
        self.needs = Needs(views=self.chosen.views)

    @property
    def temperature(self) -> float:
        """T of the fixed part; it can be moved in training."""
        return self.chosen.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.chosen = replace(self.chosen, temperature=value)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return cskd_loss(student_logits, teacher_logits, **values_of(self.chosen))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in values_of(self.chosen).items())


@dataclass(frozen=True, kw_only=True)
class CSKDNoAugOptions(CSKDOptions):
    """:class:`CSKDOptions` for one view of each image, without masks."""

    views: Views = field(default=1, init=False)
    masks: bool = field(default=False, init=False)


@takes(CSKDNoAugOptions)
class CSKDNoAugLoss(CSKDLoss):
    """:class:`CSKDLoss` on one view of each image (views=1, no masks), for pipelines that load one view."""
