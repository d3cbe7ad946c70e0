"""PCD on CUDA in one Triton kernel: a program holds a row in registers, so each logit matrix is read once in all.

Rows of more classes than registers hold go through `pcd_tiled`. Where Triton or CUDA is missing this module still
imports, and says so when its kernel is called.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pcdistill.ops.pcd_eager import Options

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    from pcdistill.ops import pcd_tiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of logits; the arithmetic is float32
MOST_HELD = 4096  # classes: both logits and the gradient of a row still fit into a program's registers
MAX_CLASSES = 1 << 20  # a class is 20 bits of its key
TILE = 4  # boundaries searched for at a time


def check_available(student: Tensor, teacher: Tensor) -> None:
    """Raise unless the kernel can run on these logits, on CUDA or in Triton's interpreter."""
    if triton is None:
        raise ValueError('backend "triton" needs the package triton, which is not installed; use backend="auto"')
    if student.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'backend "triton" needs logits on a CUDA device, got {student.device}; use backend="auto"')
    if student.dtype not in DTYPES or teacher.dtype not in DTYPES:
        raise ValueError(
            f'backend "triton" computes in float32, got {student.dtype} and {teacher.dtype} logits; use backend="auto"'
        )
    if student.shape[1] > MAX_CLASSES:
        raise ValueError(
            f'backend "triton" takes at most {MAX_CLASSES} classes, got {student.shape[1]}; use backend="auto"'
        )


def preferred(student: Tensor, teacher: Tensor) -> bool:
    """Whether "auto" means these kernels: on CUDA, if the logits suit them."""
    return (
        triton is not None
        and not INTERPRETED
        and student.device.type == "cuda"
        and student.dtype in DTYPES
        and teacher.dtype in DTYPES
        and student.shape[1] <= MAX_CLASSES
        and not torch.compiler.is_compiling()
    )


def loss_and_slope(
    student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options
) -> tuple[Tensor, tuple[Tensor, ...], Callable[..., Tensor]]:
    """Loss [N] float32 of logits [N, C] of any of the dtypes, and its slope.

    Returns:
        the loss; tensors to keep for the backward pass, which may be the logits themselves; a function of them and of
        the loss's gradient [N], which gives the student's gradient [N, C] in the student's dtype.
    """
    student, teacher = student.contiguous(), teacher.contiguous()
    n, classes = student.shape
    if n == 0:
        return student.new_empty(0, dtype=torch.float32), (student,), lambda student, _: torch.empty_like(student)
    if classes > MOST_HELD:
        loss, *kept = pcd_tiled.loss_and_coefficients(student, teacher, stage_sizes, options)
        return loss, (student, teacher, *kept), partial(pcd_tiled.slope, options=options)
    loss, gradient = _in_registers(student, teacher, stage_sizes, options)
    dtype = student.dtype
    return loss, (gradient,), lambda gradient, upstream: (gradient * upstream.unsqueeze(1)).to(dtype)


def _in_registers(
    student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C], both float32."""
    n, classes = student.shape
    edges, spans = pcd_tiled.cuts(classes, stage_sizes, student.device)
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    gradient = torch.empty((n, classes), dtype=torch.float32, device=student.device)
    block = triton.next_power_of_2(classes)
    with pcd_tiled.on_device(student):
        _kernel[(n,)](
            student,
            teacher,
            edges,
            spans,
            loss,
            gradient,
            classes,
            len(spans),
            options.temperature,
            RANKING=options.ranking,
            WEIGHTING=options.weighting,
            DETACH=options.detach_weight,
            BLOCK=block,
            INDEX_BITS=block.bit_length() - 1,
            BOUNDARIES=len(edges),
            TILE=TILE,
            num_warps=4 if block <= 1024 else 8,
        )
    return loss, gradient


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]  # triton has no types
    def _kernel(  # type: ignore[no-untyped-def]
        student,
        teacher,
        edges,
        spans,
        loss,
        gradient,
        classes,
        groups,
        temperature,
        RANKING: tl.constexpr,
        WEIGHTING: tl.constexpr,
        DETACH: tl.constexpr,
        BLOCK: tl.constexpr,
        INDEX_BITS: tl.constexpr,
        BOUNDARIES: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        index = tl.arange(0, BLOCK)
        inside = index < classes
        s = tl.load(student + row * classes + index, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + row * classes + index, mask=inside, other=0.0).to(tl.float32)

        # The segment of a class is the number of boundaries that it ranks below.
        segment = tl.zeros([BLOCK], tl.int32)
        # The bits of a float >= 0 grow with its value, so its selection is one of integers.
        bits = (t - s).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.where(inside, bits, -1)
        for first in range(0, BOUNDARIES, TILE):
            b = first + tl.arange(0, TILE)
            wanted = tl.load(edges + b, mask=b < BOUNDARIES, other=classes)
            if RANKING:
                # The value that `wanted` classes reach, bit by bit; then, among the classes with that very value,
                # the index of the last one above the boundary.
                value = tl.zeros([TILE], tl.int32)
                for i in range(31):
                    tried = value | (1 << (30 - i))
                    reached = tl.sum((bits[:, None] >= tried[None, :]).to(tl.int32), axis=0)
                    value = tl.where(reached >= wanted, tried, value)
                greater = bits[:, None] > value[None, :]
                equal = bits[:, None] == value[None, :]
                left = wanted - tl.sum(greater.to(tl.int32), axis=0)
                last = tl.zeros([TILE], tl.int32)
                for i in range(INDEX_BITS):
                    tried = last | (1 << (INDEX_BITS - 1 - i))
                    lower = tl.sum((equal & (index[:, None] < tried[None, :])).to(tl.int32), axis=0)
                    last = tl.where(lower < left, tried, last)
                above = greater | (equal & (index[:, None] <= last[None, :]))
            else:
                above = index[:, None] < wanted[None, :]
            segment += tl.sum((~above & (b < BOUNDARIES)[None, :]).to(tl.int32), axis=1)

        total = 0.0
        result = tl.zeros([BLOCK], tl.float32)
        for g in range(groups):
            start = tl.load(spans + 3 * g)
            stop = tl.load(spans + 3 * g + 1)
            count = tl.load(spans + 3 * g + 2).to(tl.float32)
            member = inside & (segment >= start) & (segment < stop)
            u = (t - tl.max(tl.where(member, t, float("-inf")), axis=0)) / temperature
            v = (s - tl.max(tl.where(member, s, float("-inf")), axis=0)) / temperature
            # Classes outside of the group would overflow exp: theirs is taken of 0 and masked.
            u = tl.where(member, u, 0.0)
            v = tl.where(member, v, 0.0)
            p = tl.where(member, tl.exp(u), 0.0)
            q = tl.where(member, tl.exp(v), 0.0)
            p_mass = tl.sum(p, axis=0)
            q_mass = tl.sum(q, axis=0)
            p = p / p_mass
            q = q / q_mass
            # KL as a sum of p (exp(d) - 1 - d), every term >= 0; by its series where the difference would cancel.
            d = tl.where(member, (v - u) - (tl.log(q_mass) - tl.log(p_mass)), 0.0)
            near = tl.minimum(tl.maximum(d, -0.5), 0.5)
            series = 1.0 / 40320 + near / 362880
            series = series * near + 1.0 / 5040
            series = series * near + 1.0 / 720
            series = series * near + 1.0 / 120
            series = series * near + 1.0 / 24
            series = series * near + 1.0 / 6
            series = series * near + 0.5
            kl = tl.sum(tl.where(tl.abs(d) < 0.5, p * series * near * near, q - p - p * d), axis=0)
            if WEIGHTING:
                unit_p = p / tl.sqrt(tl.sum(p * p, axis=0))
                q_norm = tl.sqrt(tl.sum(q * q, axis=0))
                unit_q = q / q_norm
                apart = unit_p - unit_q
                weight = tl.sum(apart * apart, axis=0) / 2
                total += count * weight * kl
                result += count * weight * (q - p)
                if not DETACH:
                    # unit_p - cos * unit_q, in the form that does not cancel, for KL may be huge.
                    cosine = tl.sum(unit_p * unit_q, axis=0)
                    slope = tl.where(weight < 0.5, apart + weight * unit_q, unit_p - cosine * unit_q)
                    result -= count * kl * unit_q * slope
            else:
                total += count * kl
                result += count * (q - p)
        tl.store(loss + row, total * temperature * temperature)
        tl.store(gradient + row * classes + index, result * temperature, mask=inside)

    INTERPRETED = not isinstance(_kernel, triton.JITFunction)
else:
    INTERPRETED = False
