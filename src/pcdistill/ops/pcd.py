"""PCD on whichever backend is fastest: one function, whose backends give the same numbers."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pcdistill.ops import pcd_triton
from pcdistill.ops.pcd_eager import Options, loss_and_gradient, pcd_eager
from pcdistill.ops.segments import transformed

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def check_backend(backend: str) -> None:
    """Raise unless the backend is one of these."""
    if backend not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS[:-1]))
        raise ValueError(f"backend must be {names} or {BACKENDS[-1]!r}, got {backend!r}")


def pcd(
    student: Tensor,
    teacher: Tensor,
    stage_sizes: tuple[int, ...],
    *,
    temperature: float,
    ranking: bool,
    weighting: bool,
    detach_weight: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over the groups of all stages of lambda * KL(p || q) * T^2, [N], for logits [N, C].

    Where a gradient is wanted it is computed with the loss, and kept for the backward pass. If that pass is itself to
    be differentiated, it computes the loss again, by :func:`pcd_eager`. The transforms of torch.func (grad, vmap, jvp)
    go through :func:`pcd_eager` too, whatever the backend: they see plain operations alone.

    Args:
        student: z_s, [N, C] of any floating dtype. The arithmetic is float32, or float64 if either is float64.
        teacher: z_t, [N, C] on the same device; no gradient flows into it.
        stage_sizes: the number of groups of every stage that is summed; a number may come several times.
        temperature: T > 0.
        ranking: rank the classes of every sample by |z_t - z_s| first.
        weighting: multiply by lambda = 1 - cos(p, q).
        detach_weight: treat lambda as a constant.
        backend: "triton", kernels for CUDA that compute in float32; "eager", PyTorch on any device; "auto" chooses.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    check_backend(backend)
    options = Options(temperature, ranking, weighting, detach_weight)
    teacher = teacher.detach()
    program: Any = _ByTriton
    if choose_backend(backend, student, teacher) != "triton" or transformed():
        program = _LossAndGradient
        student, teacher = _computed(student, teacher)
        wanted = torch.is_grad_enabled() and student.requires_grad
        if torch.compiler.is_compiling() or not wanted or transformed():
            return pcd_eager(student, teacher, stage_sizes, options)
    loss: Tensor = program.apply(student, teacher, stage_sizes, options)
    return loss


def choose_backend(backend: Backend, student: Tensor, teacher: Tensor) -> Backend:
    """The backend that "auto" stands for; another one, if it can run on these logits."""
    if backend == "triton":
        pcd_triton.check_available(student, teacher)
    elif backend == "auto":
        return "triton" if pcd_triton.preferred(student, teacher) else "eager"
    return backend


def _computed(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic: half precision is too coarse for log-probabilities."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _differentiable(
    student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options, upstream: Tensor
) -> Tensor:
    """The gradient [N, C], with a graph: of a backward pass that is itself to be differentiated."""
    with torch.enable_grad():
        loss = pcd_eager(*_computed(student, teacher), stage_sizes, options)
    (result,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
    return result


class _LossAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options) -> Tensor:
        loss, gradient = loss_and_gradient(student, teacher, stage_sizes, options)
        ctx.save_for_backward(student, teacher, gradient)
        ctx.stage_sizes, ctx.options = stage_sizes, options
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        student, teacher, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the stored gradient has no graph
            result = _differentiable(student, teacher, ctx.stage_sizes, ctx.options, upstream)
        else:
            result = gradient * upstream.unsqueeze(1)
        return result, None, None, None


class _ByTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options) -> Tensor:
        loss, kept, slope = pcd_triton.loss_and_slope(student, teacher, stage_sizes, options)
        ctx.save_for_backward(student, teacher, *kept)
        ctx.slope, ctx.stage_sizes, ctx.options = slope, stage_sizes, options
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        student, teacher, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            result = _differentiable(student, teacher, ctx.stage_sizes, ctx.options, upstream)
        else:
            result = ctx.slope(*kept, upstream)
        return result, None, None, None
