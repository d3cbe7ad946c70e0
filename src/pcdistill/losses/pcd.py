"""Progressive class-level distillation (PCD): KD inside groups of classes, ranked by how far the student is off.

Source: Li, Li, Zhang, Xu, "Progressive Class-level Distillation", arXiv 2505.24310 (2025).
"""

from typing import Literal

from torch import Tensor

from pcdistill.losses._common import (
    Reduction,
    check_logits,
    check_reduction,
    check_temperature,
    reduce_loss,
)
from pcdistill.losses.base import LogitLoss
from pcdistill.ops.pcd import Backend, check_backend, pcd
from pcdistill.ops.segments import check_stages

__all__ = ["PCDLoss", "pcd_loss"]

Directions = Literal["both", "f2cl", "c2fl"]
Normalize = Literal["none", "groups"]
Schedule = Literal["joint", "progressive"]
DEFAULT_STAGES = 3


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        allowed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_options(
    temperature: float, stages: int, directions: str, normalize: str, reduction: str, backend: str
) -> None:
    check_temperature(temperature)
    check_stages(stages)
    _check_choice("directions", directions, ("both", "f2cl", "c2fl"))
    _check_choice("normalize", normalize, ("none", "groups"))
    check_reduction(reduction)
    check_backend(backend)


def stage_sizes(stages: int, directions: Directions) -> list[int]:
    """Number of groups of every stage, in training order: fine to coarse S, ..., 1, then coarse to fine 1, ..., S."""
    fine_to_coarse, coarse_to_fine = list(range(stages, 0, -1)), list(range(1, stages + 1))
    return {"both": fine_to_coarse + coarse_to_fine, "f2cl": fine_to_coarse, "c2fl": coarse_to_fine}[directions]


def _distil(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sizes: list[int],
    *,
    temperature: float,
    ranking: bool,
    weighting: bool,
    detach_weight: bool,
    normalize: Normalize,
    reduction: Reduction,
    backend: Backend,
) -> Tensor:
    """PCD over the stages with these numbers of groups; all arguments but the logits are checked already."""
    check_logits(student_logits, teacher_logits)
    check_stages(max(sizes), student_logits.shape[1])
    per_sample = pcd(
        student_logits,
        teacher_logits.detach(),
        tuple(sizes),
        temperature=temperature,
        ranking=ranking,
        weighting=weighting,
        detach_weight=detach_weight,
        backend=backend,
    )
    if normalize == "groups":
        per_sample = per_sample / sum(sizes)
    return reduce_loss(per_sample, reduction)


def pcd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    stages: int = DEFAULT_STAGES,
    directions: Directions = "both",
    ranking: bool = True,
    weighting: bool = True,
    detach_weight: bool = False,
    normalize: Normalize = "none",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """KD inside every group of every stage, each group weighted by the cosine distance of its probabilities.

        I = argsort(|z_t - z_s|, descending), per sample; a stage of k groups cuts I into k runs of about C / k classes
        p = softmax(z_t / T), q = softmax(z_s / T), both restricted to the group
        D = (1 - cos(p, q)) * T^2 * KL(p || q)
        loss = L_F2CL + L_C2FL = sum of D over the groups of stages k = S, ..., 1 and then k = 1, ..., S

    This is the distillation part alone: cross-entropy, the paper's alpha and its warm-up are terms of a recipe.
    Summed at one step the two directions hold the same groups, so that L_F2CL = L_C2FL and "both" is twice either.

    Args:
        student_logits: z_s, [N, C]. Any floating dtype; the arithmetic is float32, or float64 for float64 input.
        teacher_logits: z_t, [N, C]. A constant: no gradient flows into it.
        target: unused; here so that all logit losses are called alike.
        temperature: T > 0. Customary: 4 on CIFAR-100, 1 on ImageNet.
        stages: S, 1 to C // 2 (a group of one class carries no information). Customary: 3 where teacher and student
            share their family, 5 where they do not.
        directions: "both", "f2cl" (fine to coarse alone) or "c2fl" (coarse to fine alone).
        ranking: False cuts the classes by index instead (the paper's ablation without LDR).
        weighting: False sets the weight 1 - cos(p, q) to 1 (the paper's ablation without WDM).
        detach_weight: True treats the weight as a constant; by default the gradient flows through it too.
        normalize: "none" is the paper's plain sum. It grows about as S^2 (S (S + 1) groups in both directions), and
            with it the step that an optimiser takes: at a high learning rate S = 5 can diverge where S = 2 does not;
            clip gradients or lower the weight. "groups" divides by the number of groups summed, so that the step
            hardly depends on S; at equal weight it distils S (S + 1) times less than the plain sum.
        reduction: "mean" over samples, "sum", or "none".
        backend: which program computes it; the numbers agree to rounding. "triton" is kernels for CUDA,
            "eager" runs on any device; "auto" takes the first where it can. Both keep the gradient for the backward
            pass, and either may be differentiated twice.

    Returns:
        Loss in nats (times T^2): a scalar, or [N] for "none". Zero if and only if p = q in every group. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, temperature, number of stages or option that does not fit, or a backend that cannot
            run on these logits.
        TypeError: logits that are not floating point.

    Source:
        arXiv 2505.24310. Our choices: ties in the ranking go to the lower class index; differences are compared as
        rounded to the compute dtype; group j of k holds ranks j * C // k to (j + 1) * C // k - 1.
    """
    _check_options(temperature, stages, directions, normalize, reduction, backend)
    return _distil(
        student_logits,
        teacher_logits,
        stage_sizes(stages, directions),
        temperature=temperature,
        ranking=ranking,
        weighting=weighting,
        detach_weight=detach_weight,
        normalize=normalize,
        reduction=reduction,
        backend=backend,
    )


class PCDLoss(LogitLoss):
    """Module form of :func:`pcd_loss`, with the choice of a schedule; other arguments and errors are the function's.

    Args:
        schedule: "joint", the paper's objective, sums every stage at every step. "progressive", our extension,
            spreads them over training: with progress u in [0, 1) and M stages in all (2 S for "both" directions),
            phase floor(M u) distils its stage alone, fine to coarse first, then coarse to fine.
        stages: S; None is 3, or C // 2 where `num_classes` tells of fewer than six classes.
        num_classes: C, where it is known: the engine gives it.
        cumulative: in the progressive schedule, keep the stages of earlier phases on as well.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        stages: int | None = None,
        directions: Directions = "both",
        ranking: bool = True,
        weighting: bool = True,
        detach_weight: bool = False,
        normalize: Normalize = "none",
        schedule: Schedule = "joint",
        cumulative: bool = False,
        num_classes: int | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if stages is None:
            stages = DEFAULT_STAGES if num_classes is None else max(min(DEFAULT_STAGES, num_classes // 2), 1)
            if stages < DEFAULT_STAGES:
                self.note = f"S is {stages}, not {DEFAULT_STAGES}: logits of {num_classes} classes allow no more"
        _check_options(temperature, stages, directions, normalize, reduction, backend)
        _check_choice("schedule", schedule, ("joint", "progressive"))
        if cumulative and schedule == "joint":
            raise ValueError('cumulative must be False with schedule="joint", which sums every stage at every step')
        self.temperature = temperature
        self.stages = stages
        self.directions: Directions = directions
        self.ranking = ranking
        self.weighting = weighting
        self.detach_weight = detach_weight
        self.normalize: Normalize = normalize
        self.schedule: Schedule = schedule
        self.cumulative = cumulative
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.progress = 0.0

    def set_progress(self, *, progress: float, epoch: float) -> None:
        """Tell the progressive schedule where training is: progress in [0, 1]; the epoch does not matter to it."""
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be from 0 to 1, got {progress}")
        self.progress = progress

    @property
    def moves(self) -> bool:
        """Only the progressive schedule asks where training is."""
        return self.schedule == "progressive"

    def active_stages(self) -> list[int]:
        """Number of groups of every stage that the next call distils. Derived from the progress, hence never saved."""
        sizes = stage_sizes(self.stages, self.directions)
        if self.schedule == "joint":
            return sizes
        phase = min(int(len(sizes) * self.progress), len(sizes) - 1)
        return sizes[: phase + 1] if self.cumulative else sizes[phase : phase + 1]

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        check_logits(student_logits, teacher_logits)
        # Checked against S, not the active stage: a progressive run must not stop at the phase with too many groups.
        check_stages(self.stages, student_logits.shape[1])
        return _distil(
            student_logits,
            teacher_logits,
            self.active_stages(),
            temperature=self.temperature,
            ranking=self.ranking,
            weighting=self.weighting,
            detach_weight=self.detach_weight,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        names = ["temperature", "stages", "directions", "ranking", "weighting", "detach_weight", "normalize"]
        names += ["schedule", "cumulative", "reduction", "backend"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
