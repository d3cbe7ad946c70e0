"""Cosine-similarity distillation (CSKD): each class's probabilities over the batch point where the teacher's point.

Source: Ham et al., "Cosine Similarity Knowledge Distillation for Individual Class Information Transfer", arXiv
2311.14307 (2023).
"""

import torch
from torch import Tensor

from pcdistill.losses._common import check_logits, check_temperature, check_weight, upcast
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.losses.dist import cosine_distance
from pcdistill.losses.mlkd import Views, check_views, confidence_masks

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


def cskd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    min_temperature: float = 2.0,
    max_temperature: float = 6.0,
    views: Views = 2,
    cosine_weight: float = 2.0,
    fixed_weight: float = 1.0,
    cswt_weight: float = 1.0,
    class_weight: float = 1.0,
    batch_weight: float = 1.0,
    masks: bool = True,
    eps: float = 1e-8,
) -> Tensor:
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
    weights = (cosine_weight, fixed_weight, cswt_weight, class_weight, batch_weight)
    _check_options(temperature, min_temperature, max_temperature, views, *weights, eps)
    check_views(views, student_logits)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    n = len(student) // views
    if n == 0:
        return student.sum()
    per_sample = cswt_temperatures(
        student[:n], teacher[:n], min_temperature=min_temperature, max_temperature=max_temperature
    )
    sample_share = class_share = torch.ones_like(per_sample[0])
    if masks:
        sample_share, class_share = (mask.mean() for mask in confidence_masks(teacher[:n]))
    loss = student[:0].sum()
    for weight, temperatures in ((fixed_weight, torch.full_like(per_sample, temperature)), (cswt_weight, per_sample)):
        if weight == 0:
            continue
        q, p = (_softmax(z[:n], temperatures) for z in (student, teacher))
        scale = cosine_weight * temperatures.mean() ** 2
        part = sample_share * scale * cosine_distance(p.T, q.T, eps=eps).mean()
        if views == 2:
            strong_q, strong_p = (_softmax(z[n:], temperatures) for z in (student, teacher))
            part = part + scale * cosine_distance(strong_p.T, strong_q.T, eps=eps).mean()
        if class_weight:
            part = part + class_weight * class_share * _gram_distance(p.T, q.T, eps)
        if batch_weight:
            part = part + batch_weight * sample_share * _gram_distance(p, q, eps)
        loss = loss + weight * part
    return loss


def _check_options(
    temperature: float,
    min_temperature: float,
    max_temperature: float,
    views: int,
    cosine_weight: float,
    fixed_weight: float,
    cswt_weight: float,
    class_weight: float,
    batch_weight: float,
    eps: float,
) -> None:
    check_temperature(temperature)
    check_temperature(min_temperature, "min_temperature")
    check_temperature(max_temperature, "max_temperature")
    if max_temperature < min_temperature:
        raise ValueError(f"max_temperature must be at least min_temperature = {min_temperature}, got {max_temperature}")
    check_views(views)
    check_weight(cosine_weight, "cosine_weight")
    check_weight(fixed_weight, "fixed_weight")
    check_weight(cswt_weight, "cswt_weight")
    check_weight(class_weight, "class_weight")
    check_weight(batch_weight, "batch_weight")
    check_temperature(eps, "eps")


def _softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """softmax over dim 1 with a temperature for each row."""
    return ((logits - logits.amax(dim=1, keepdim=True)) / temperatures[:, None]).softmax(dim=1)


def _gram_distance(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """1 - the mean cosine of the rows of p p' and q q'."""
    with torch.autocast(q.device.type, enabled=False):
        return cosine_distance(p @ p.T, q @ q.T, eps=eps).mean()


class CSKDLoss(LogitLoss):
    """Module form of :func:`cskd_loss`, for recipes; arguments, shapes and errors are the function's."""

    needs = Needs(views=2)

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        min_temperature: float = 2.0,
        max_temperature: float = 6.0,
        views: Views = 2,
        cosine_weight: float = 2.0,
        fixed_weight: float = 1.0,
        cswt_weight: float = 1.0,
        class_weight: float = 1.0,
        batch_weight: float = 1.0,
        masks: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        weights = (cosine_weight, fixed_weight, cswt_weight, class_weight, batch_weight)
        _check_options(temperature, min_temperature, max_temperature, views, *weights, eps)
        self.temperature = temperature
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.views: Views = views
        self.needs = Needs(views=views)
        self.cosine_weight = cosine_weight
        self.fixed_weight = fixed_weight
        self.cswt_weight = cswt_weight
        self.class_weight = class_weight
        self.batch_weight = batch_weight
        self.masks = masks
        self.eps = eps

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return cskd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            min_temperature=self.min_temperature,
            max_temperature=self.max_temperature,
            views=self.views,
            cosine_weight=self.cosine_weight,
            fixed_weight=self.fixed_weight,
            cswt_weight=self.cswt_weight,
            class_weight=self.class_weight,
            batch_weight=self.batch_weight,
            masks=self.masks,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, min_temperature={self.min_temperature:g}, "
            f"max_temperature={self.max_temperature:g}, views={self.views}, cosine_weight={self.cosine_weight:g}, "
            f"fixed_weight={self.fixed_weight:g}, cswt_weight={self.cswt_weight:g}, "
            f"class_weight={self.class_weight:g}, batch_weight={self.batch_weight:g}, masks={self.masks}, "
            f"eps={self.eps:g}"
        )


class CSKDNoAugLoss(CSKDLoss):
    """:class:`CSKDLoss` on one view of each image (views=1, no masks), for pipelines that load one view."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        min_temperature: float = 2.0,
        max_temperature: float = 6.0,
        cosine_weight: float = 2.0,
        fixed_weight: float = 1.0,
        cswt_weight: float = 1.0,
        class_weight: float = 1.0,
        batch_weight: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            temperature=temperature,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            views=1,
            cosine_weight=cosine_weight,
            fixed_weight=fixed_weight,
            cswt_weight=cswt_weight,
            class_weight=class_weight,
            batch_weight=batch_weight,
            masks=False,
            eps=eps,
        )
