"""PCD on whichever backend is fastest: one function, whose backends give the same numbers."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pcdistill.ops import pcd_triton
from pcdistill.ops.pcd_eager import Options, loss_and_gradient, pcd_eager
from pcdistill.ops.segments import transformed

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Kernel = Callable[[Tensor, Tensor, tuple[int, ...], Options], tuple[Tensor, Tensor]]


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
    """Sum over the groups of all stages of lambda * KL(p || q) * T^2, [N], for logits [N, C] of one dtype.

    Where a gradient is wanted it is computed with the loss, and kept for the backward pass. If that pass is itself to
    be differentiated, it computes the loss again, by :func:`pcd_eager`. The transforms of torch.func (grad, vmap, jvp)
    go through :func:`pcd_eager` too, whatever the backend: they see plain operations alone.

    Args:
        student: z_s, [N, C] float32 or float64.
        teacher: z_t, [N, C] of the same dtype and device; no gradient flows into it.
        stage_sizes: the number of groups of every stage that is summed; a number may come several times.
        temperature: T > 0.
        ranking: rank the classes of every sample by |z_t - z_s| first.
        weighting: multiply by lambda = 1 - cos(p, q).
        detach_weight: treat lambda as a constant.
        backend: "triton", one kernel for float32 on CUDA; "eager", PyTorch on any device; "auto" chooses.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    check_backend(backend)
    options = Options(temperature, ranking, weighting, detach_weight)
    name = choose_backend(backend, student)
    wanted = torch.is_grad_enabled() and student.requires_grad
    plain = name == "eager" and (torch.compiler.is_compiling() or not wanted)
    if plain or transformed():
        return pcd_eager(student, teacher.detach(), stage_sizes, options)
    kernel = pcd_triton.loss_and_gradient if name == "triton" else loss_and_gradient
    loss: Tensor = _LossAndGradient.apply(student, teacher.detach(), stage_sizes, options, kernel)
    return loss


def choose_backend(backend: Backend, student: Tensor) -> Backend:
    """The backend that "auto" stands for; another one, if it can run on these logits."""
    if backend == "triton":
        pcd_triton.check_available(student)
    elif backend == "auto":
        return "triton" if pcd_triton.preferred(student) else "eager"
    return backend


class _LossAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        stage_sizes: tuple[int, ...],
        options: Options,
        kernel: Kernel,
    ) -> Tensor:
        loss, gradient = kernel(student, teacher, stage_sizes, options)
        ctx.save_for_backward(student, teacher, gradient)
        ctx.stage_sizes, ctx.options = stage_sizes, options
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        student, teacher, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: this pass is to be differentiated too, which the stored gradient cannot be.
            with torch.enable_grad():
                loss = pcd_eager(student, teacher, ctx.stage_sizes, ctx.options)
            (result,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
        else:
            result = gradient * upstream.unsqueeze(1)
        return result, None, None, None, None
