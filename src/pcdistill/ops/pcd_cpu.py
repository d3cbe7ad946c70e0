"""PCD's two passes over float32 logits on a CPU, through NumPy: its sort is the point.

NumPy sorts 64-bit integers with vector instructions. On 256 x 1000 differences, one core with AVX-512, that took
0.44 ms where torch.sort (stable, two threads) took 5.2, torch.topk of two thirds 3.5 and torch.kthvalue 1.2 for each
boundary. So the full order costs less here than the boundary values alone, and ranked classes make segments contiguous.
"""

from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcdistill.ops.pcd_combine import Options, Statistics, combine
from pcdistill.ops.pcd_plan import Plan, Tables

Array = npt.NDArray[np.float32]

CHUNK = 131072  # elements of a matrix that one thread works on at a time: half a megabyte of float32
NARROW = 16.0  # logits / T within this of each other need no maximum per segment; rounding then stays below 1e-6


def _each_chunk(rows: int, classes: int, work: Callable[[int, int], None]) -> None:
    """work(start, stop) over chunks of rows, on as many threads as torch may use."""
    step = max(1, CHUNK // classes)
    starts = range(0, rows, step)
    threads = min(torch.get_num_threads(), len(starts))
    failures: list[BaseException] = []

    def run(first: int) -> None:
        try:
            for start in starts[first::threads]:
                work(start, min(start + step, rows))
        except BaseException as error:  # a thread must not die alone: the caller would return garbage
            failures.append(error)

    others = [Thread(target=run, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    if starts:
        run(0)
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]


def loss_and_gradient(
    student: Tensor, teacher: Tensor, plan: Plan, tables: Tables, options: Options
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C], both float32."""
    n, classes = student.shape
    starts, sizes = np.array(plan.edges[:-1]), np.array(plan.sizes)
    inverse_t = np.float32(1.0 / options.temperature)
    student_rows, teacher_rows = student.contiguous().numpy(), teacher.contiguous().numpy()
    # Probabilities in ranked order, up to a factor per segment; p becomes the gradient in the end.
    p_tensor = torch.empty_like(student, memory_format=torch.contiguous_format)
    q_tensor = torch.empty_like(p_tensor)
    p_rows, q_rows = p_tensor.numpy(), q_tensor.numpy()
    order = torch.empty(n, classes, dtype=torch.int32).numpy() if options.ranking else None
    raw: Array = np.empty((8 if options.weighting else 5, n, plan.segments), np.float32)

    def spread(x: Array) -> Array:
        """[n, K] -> [n, C]: the value of its segment for every rank."""
        return np.repeat(x, sizes, axis=1)

    def total(x: Array) -> Array:
        """[n, C] -> [n, K]: sums over the segments."""
        sums: Array = np.add.reduceat(x, starts, axis=1)
        return sums

    def shift(x: Array, out: Array) -> None:
        """Subtract, in place, a maximum from the logits of each segment."""
        if plan.segments > 8:
            top = x.max(axis=1, keepdims=True)
            if np.max(top - x.min(axis=1, keepdims=True)) * inverse_t <= NARROW:
                out[:] = top
                np.subtract(x, top, out=x)
                return
        np.maximum.reduceat(x, starts, axis=1, out=out)
        np.subtract(x, spread(out), out=x)

    def statistics(start: int, stop: int) -> None:
        s, t, p, q = (rows[start:stop] for rows in (student_rows, teacher_rows, p_rows, q_rows))
        if order is None:
            p[:], q[:] = t, s
        else:
            keys = rank_keys(s, t, p)
            keys.sort(axis=1)
            keys &= 0xFFFFFFFF
            order[start:stop] = keys
            np.take(t, keys, out=p, mode="clip")
            np.take(s, keys, out=q, mode="clip")
            del keys
        columns = raw[:, start:stop]
        shift(p, columns[0])
        shift(q, columns[1])
        work = p - q
        for x in (p, q):
            np.multiply(x, inverse_t, out=x)
            np.exp(x, out=x)
        columns[2], columns[3] = total(p), total(q)
        np.multiply(work, p, out=work)
        columns[4] = total(work)
        if options.weighting:
            columns[5], columns[6] = total(np.multiply(p, p, out=work)), total(np.multiply(q, q, out=work))
            # Half the squared distance of the unit vectors: 1 - p.q / (|p| |q|) would cancel in float32.
            np.multiply(spread(np.sqrt(columns[5] / columns[6])), q, out=work)
            np.subtract(work, p, out=work)
            columns[7] = total(np.multiply(work, work, out=work))

    with np.errstate(all="ignore"):
        _each_chunk(n, classes, statistics)
    # [K, N] rows, which the sums over groups run through fastest.
    top_p, top_q, mass_p, mass_q, gap, *squares = torch.from_numpy(raw).transpose(1, 2).double().contiguous().unbind()
    stats = Statistics(
        log_p=top_p / options.temperature + mass_p.log(),
        log_q=top_q / options.temperature + mass_q.log(),
        gap=(gap / mass_p + top_p - top_q) / options.temperature,
    )
    if options.weighting:
        pp, qq, apart = squares
        stats = Statistics(
            stats.log_p, stats.log_q, stats.gap, pp.sqrt() / mass_p, qq.sqrt() / mass_q, apart / (2 * pp)
        )
    loss, coefficients = combine(stats, plan, tables, options)
    coefficients[0] /= mass_q
    coefficients[1] /= mass_p
    if len(coefficients) == 4:
        coefficients[2] /= mass_p * mass_q
        coefficients[3] /= mass_q * mass_q
    factors = coefficients.transpose(1, 2).float().numpy()

    def gradient(start: int, stop: int) -> None:
        p, q, c = p_rows[start:stop], q_rows[start:stop], factors[:, start:stop]
        inner = spread(c[0])
        if len(c) == 4:
            part = spread(c[2])
            np.multiply(part, p, out=part)
            inner += part
            part = spread(c[3])
            np.multiply(part, q, out=part)
            inner += part
        np.multiply(inner, q, out=inner)
        np.multiply(p, spread(c[1]), out=p)
        if order is None:
            np.add(p, inner, out=p)
        else:
            inner += p
            # Every position of these rows is written: the order of a row is a permutation.
            p.reshape(-1)[order[start:stop]] = inner

    with np.errstate(all="ignore"):
        _each_chunk(n, classes, gradient)
    return loss.float(), p_tensor


def rank_keys(student: Array, teacher: Array, scratch: Array) -> npt.NDArray[np.int64]:
    """Integers [n, C] whose ascending order is the ranking; their low 32 bits are the position among all n * C.

    The bits of a float >= 0 grow with its value, so their complement falls; behind them, the position makes ties go
    to the lower class.
    """
    np.subtract(teacher, student, out=scratch)
    np.abs(scratch, out=scratch)
    bits: Any = scratch.view(np.int32)
    keys = np.invert(bits).astype(np.int64)
    keys <<= 32
    keys |= np.arange(keys.size).reshape(keys.shape)
    return keys
