"""Improved decoupled KL distillation (IKL-KD): differences of logit pairs, weighted by class, and a soft target.

Source: Cui, Tian, Zhong, Qi, Yu, Zhang, "Decoupled Kullback-Leibler Divergence Loss", arXiv 2305.13948 (2023).
"""

import torch
from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_target,
    check_temperature,
    check_weight,
    reduce_loss,
    shape,
    upcast,
)
from pcdistill.losses.base import LogitLoss, Needs
from pcdistill.ops.segments import transformed

__all__ = ["IKLLoss", "ikl_loss"]


def ikl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    pair_weight: float = 8.0,
    cross_entropy_weight: float = 1.0,
    temperature: float = 4.0,
    weight_temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Weighted squared error of all differences between two logits, and cross-entropy with the softened teacher.

        d = z_t - z_s    w = weights, in IKL the teacher's mean probabilities on the sample's class
        pairs = 1/4 sum_jk w_j w_k (d_j - d_k)^2 = 1/2 sum_j w_j (d_j - sum_k w_k d_k)^2
        soft  = -sum_c softmax(z_t / T)_c * log softmax(z_s / T)_c
        loss  = pair_weight * pairs + cross_entropy_weight * soft

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        weights: w, [N, C], rows that sum to 1, a constant. None is the sample's own softmax(z_t / T_w).
        pair_weight: the paper's alpha, the released code's beta, >= 0. Published: 4 to 12 on CIFAR-100, 0.5 or 1 on
            ImageNet.
        cross_entropy_weight: the paper's beta, the released code's alpha, >= 0. Published: 1 to 4.
        temperature: T > 0 of the soft part, no unit; there is no T^2, as in the released code. Published: 4 on
            CIFAR-100.
        weight_temperature: T_w > 0, no unit. Without effect where `weights` are given.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        Loss, the pair part in squared logits, the soft part in nats: a scalar, or [N] for "none". At equal logits the
        pair part is 0 and the soft part is least, the teacher's entropy. Blind to a shift of either side. N = 0 gives
        0.

    Raises:
        ValueError: a shape, device, temperature, weight or reduction that does not fit.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2305.13948: KL = pairs (with the sample's own w) + soft in its gradients; IKL lets the gradient of the
        pairs reach the student, and takes w from the class. The closed form is O(C), and in it nothing cancels.
    """
    check_logits(student_logits, teacher_logits)
    _check_options(pair_weight, cross_entropy_weight, temperature, weight_temperature, reduction)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    if weights is None:
        weights = (teacher / weight_temperature).softmax(dim=1)
    elif weights.shape != student.shape:
        raise ValueError(f"weights must be {shape(student)}, as the logits, got {shape(weights)}")
    w = weights.detach().to(student.dtype)
    difference = teacher - student
    centred = difference - (w * difference).sum(dim=1, keepdim=True)
    pairs = (w * centred.square()).sum(dim=1) / 2
    log_q = (student / temperature).log_softmax(dim=1)
    soft = -((teacher / temperature).softmax(dim=1) * log_q).sum(dim=1)
    return reduce_loss(pair_weight * pairs + cross_entropy_weight * soft, reduction)


def _check_options(
    pair_weight: float, cross_entropy_weight: float, temperature: float, weight_temperature: float, reduction: str
) -> None:
    check_weight(pair_weight, "pair_weight")
    check_weight(cross_entropy_weight, "cross_entropy_weight")
    check_temperature(temperature)
    check_temperature(weight_temperature, "weight_temperature")
    check_reduction(reduction)


class IKLLoss(LogitLoss):
    """:func:`ikl_loss` with the teacher's mean probabilities of every class, kept over the training.

    The means are over all samples of a class that training has shown so far, this batch among them: a class has weights
    from its first sample on. They are buffers, so that a resumed training goes on with the same ones, and take in the
    samples of all processes. In eval mode they stay as they are; a class that was never seen takes the sample's own.

    Args:
        num_classes: C.
        class_wise: False takes every sample's own probabilities as its weights; labels are then not looked at.
        pair_weight: as in the function, like all others here.
        cross_entropy_weight: see there.
        temperature: see there.
        weight_temperature: of the probabilities that are averaged, or of the sample's own.
        reduction: see there.
    """

    needs = Needs(labels=True, soft_labels=False)
    class_probabilities: Tensor
    class_counts: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        class_wise: bool = True,
        pair_weight: float = 8.0,
        cross_entropy_weight: float = 1.0,
        temperature: float = 4.0,
        weight_temperature: float = 4.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        _check_options(pair_weight, cross_entropy_weight, temperature, weight_temperature, reduction)
        self.num_classes = num_classes
        self.class_wise = class_wise
        self.pair_weight = pair_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.temperature = temperature
        self.weight_temperature = weight_temperature
        self.reduction: Reduction = reduction
        if not class_wise:
            self.needs = Needs()
        else:
            self.register_buffer("class_probabilities", torch.zeros(num_classes, num_classes))
            self.register_buffer("class_counts", torch.zeros(num_classes))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        return ikl_loss(
            student_logits,
            teacher_logits,
            weights=self.weights(teacher_logits, target) if self.class_wise else None,
            pair_weight=self.pair_weight,
            cross_entropy_weight=self.cross_entropy_weight,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            reduction=self.reduction,
        )

    @torch.no_grad()
    def weights(self, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        """Every sample's class mean [N, C], after this batch has been taken into the means, in training."""
        target = check_target(target, teacher_logits, hard_only=True)
        means, c = self.class_probabilities, self.num_classes
        if teacher_logits.shape[1] != c:
            raise ValueError(f"logits must have the {c} columns of num_classes, got {shape(teacher_logits)}")
        own = (upcast(teacher_logits) / self.weight_temperature).softmax(dim=1).to(means.dtype)
        if self.training:
            if transformed():
                raise ValueError(
                    "ikl takes every batch into its class means, which a transform of torch.func must not change; call "
                    "eval() first, or give ikl_loss the weights"
                )
            # The last column counts, so that one exchange between processes is enough.
            rows = torch.cat([own, torch.ones_like(own[:, :1])], dim=1)
            sums = _over_processes(rows.new_zeros(c, c + 1).index_add_(0, target, rows))
            self.class_counts += sums[:, c]
            # A mean that moves, not a sum that would outgrow its precision.
            means += (sums[:, :c] - sums[:, c:] * means) / self.class_counts.clamp(min=1)[:, None]
        return torch.where(self.class_counts[target][:, None] > 0, means[target], own)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, class_wise={self.class_wise}, pair_weight={self.pair_weight:g}, "
            f"cross_entropy_weight={self.cross_entropy_weight:g}, temperature={self.temperature:g}, "
            f"weight_temperature={self.weight_temperature:g}, reduction={self.reduction!r}"
        )


def _over_processes(x: Tensor) -> Tensor:
    """The sum over all processes, the same on each."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x
