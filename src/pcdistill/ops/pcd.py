"""PCD on whichever backend is fastest: one function, whose backends give the same numbers."""

from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pcdistill.ops import pcd_cpu, pcd_eager, pcd_native, pcd_triton
from pcdistill.ops.pcd_combine import Options
from pcdistill.ops.pcd_eager import Kernel
from pcdistill.ops.pcd_plan import Plan, make_plan
from pcdistill.ops.pcd_reference import pcd_reference
from pcdistill.ops.segments import Group

Backend = Literal["auto", "reference", "eager", "compile", "native", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

MAX_COMPILED_SEGMENTS = 64  # Inductor writes code for every segment


def check_backend(backend: str) -> None:
    """Raise unless the backend is one of these."""
    if backend not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS[:-1]))
        raise ValueError(f"backend must be {names} or {BACKENDS[-1]!r}, got {backend!r}")


def pcd(
    student: Tensor,
    teacher: Tensor,
    groups: tuple[Group, ...],
    *,
    temperature: float,
    ranking: bool,
    weighting: bool,
    detach_weight: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over the groups of count * lambda * KL(p || q) * T^2, [N], for logits [N, C] of one dtype.

    All backends but the reference compute loss and gradient together, in closed form, and keep the gradient for
    the backward pass. If that is itself to be differentiated, they fall back to the reference there.

    Args:
        student: z_s, [N, C] float32 or float64.
        teacher: z_t, [N, C] of the same dtype and device; no gradient flows into it.
        groups: what the stages sum, from :func:`pcdistill.ops.segments.summed_groups`.
        temperature: T > 0.
        ranking: rank the classes of every sample by |z_t - z_s| first.
        weighting: multiply by lambda = 1 - cos(p, q).
        detach_weight: treat lambda as a constant.
        backend: "auto" takes Triton on a CUDA device, C ("native") on a CPU with a compiler, else one pass in eager
            mode, and the reference on devices other than CPU and CUDA and where there are so many stages that eager
            mode costs more. Any other name forces it.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    check_backend(backend)
    options = Options(temperature, ranking, weighting, detach_weight)
    plan = make_plan(groups, student.shape[1])
    name = choose_backend(backend, student, plan)
    if name == "reference":
        return pcd_reference(student, teacher, groups, **vars(options))
    kernel = _kernel(name, student)
    loss: Tensor = _OnePass.apply(student, teacher.detach(), groups, plan, options, kernel)
    return loss


def choose_backend(backend: Backend, student: Tensor, plan: Plan) -> Backend:
    """The backend that "auto" stands for; another one, if it can run on these logits."""
    if backend == "triton":
        pcd_triton.check_available(student, plan)
    elif backend == "native":
        pcd_native.check_available(student)
    elif backend == "compile":
        if plan.segments > MAX_COMPILED_SEGMENTS:
            raise ValueError(
                f'backend must not be "compile" for groups with {plan.segments} segments in all: it compiles '
                f"code for every one, at most {MAX_COMPILED_SEGMENTS}"
            )
    elif backend == "auto":
        if student.numel() and pcd_native.preferred(student):
            return "native"
        # One pass combines its statistics in float64, which not every device has (Apple's does not).
        known = student.device.type in ("cpu", "cuda")
        if not known or plan.crowded or student.numel() == 0:
            return "reference"
        return "triton" if pcd_triton.preferred(student, plan) else "eager"
    return backend


def _kernel(name: Backend, student: Tensor) -> Kernel:
    if name == "triton":
        return pcd_triton.loss_and_gradient
    if name == "native":
        return pcd_native.loss_and_gradient
    if name == "compile":
        return _compiled()
    # NumPy is called only outside of torch.compile, whose tracer would replace it by torch.
    plain = student.device.type == "cpu" and student.dtype == torch.float32 and not torch.compiler.is_compiling()
    return pcd_cpu.loss_and_gradient if plain else pcd_eager.loss_and_gradient


@lru_cache(maxsize=1)
def _compiled() -> Kernel:
    # The ranking stays outside: Inductor would hand it to torch.sort, which is slow on a CPU.
    return partial(pcd_eager.loss_and_gradient, ranked=torch.compile(pcd_eager.ranked_loss_and_gradient))


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        groups: tuple[Group, ...],
        plan: Plan,
        options: Options,
        kernel: Kernel,
    ) -> Tensor:
        loss, gradient = kernel(student, teacher, plan, options)
        ctx.save_for_backward(student, teacher, gradient)
        ctx.groups, ctx.options = groups, options
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        student, teacher, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: this pass is to be differentiated too, which the stored gradient cannot be.
            with torch.enable_grad():
                loss = pcd_reference(student, teacher, ctx.groups, **vars(ctx.options))
            (result,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
        else:
            result = gradient * upstream.unsqueeze(1)
        return result, None, None, None, None, None
