"""PCD's two passes over float32 logits on a CPU, through NumPy: its sort is the point.

NumPy sorts 64-bit integers with vector instructions. On 256 x 1000 differences, one core with AVX-512, that took
0.44 ms where torch.sort (stable, two threads) took 5.2, torch.topk of two thirds 3.5 and torch.kthvalue 1.2 for each
boundary. So the full order costs less here than the boundary values alone, and ranked classes make segments contiguous.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcdistill.ops.pcd_combine import Options, Statistics, combine, distil_groups
from pcdistill.ops.pcd_plan import Plan, Tables, make_tables

Array = npt.NDArray[np.float32]
Keys = npt.NDArray[np.int64]
Wide = npt.NDArray[np.float64]

CHUNK = 32768  # elements of a matrix that are worked on at a time: they stay in the cache
NARROW = 24.0  # logits / T within this of the middle need no maximum: exp(2 * 24) and exp(-2 * 24) are float32's


def loss_and_gradient(student: Tensor, teacher: Tensor, plan: Plan, options: Options) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C], both float32."""
    tables = make_tables(plan, student.device)
    student, teacher = student.detach().contiguous(), teacher.detach().contiguous()
    n, classes = student.shape
    if n == 0:
        return student.new_empty(0), torch.empty_like(student)
    starts, sizes = np.array(plan.edges[:-1]), np.array(plan.sizes)
    inverse_t = np.float32(1.0 / options.temperature)
    student_rows, teacher_rows = student.numpy(), teacher.numpy()
    # exp(z / T) in ranked order, up to a factor per row or segment; p becomes the gradient in the end.
    p_tensor, q_tensor = torch.empty_like(student), torch.empty_like(student)
    p_rows, q_rows = p_tensor.numpy(), q_tensor.numpy()
    order = torch.empty(n, classes, dtype=torch.int32).numpy() if options.ranking else None
    raw: Array = np.empty((6 if options.weighting else 3, n, plan.segments), np.float32)
    # Each segment's own maximum is taken off before exp, unless the logits are so close that it may as well be one
    # number for the whole batch. On a CPU, looking costs nothing.
    middles, reach = zip(*(_middle(logits) for logits in (teacher, student)), strict=True)
    narrow = all(distance <= NARROW * options.temperature for distance in reach)  # a NaN is not
    tops: list[Array] = [] if narrow else [np.empty((n, plan.segments), np.float32) for _ in range(2)]

    def spread(x: Array) -> Array:
        """[n, K] -> [n, C]: the value of its segment for every rank."""
        return np.repeat(x, sizes, axis=1)

    def total(x: Array, out: Array) -> None:
        """[n, C] -> [n, K]: sums over the segments."""
        np.add.reduceat(x, starts, axis=1, out=out)

    def statistics(start: int, stop: int, work: Array, keys: Keys) -> None:
        p, q = p_rows[start:stop], q_rows[start:stop]
        if order is None:
            p[:], q[:] = teacher_rows[start:stop], student_rows[start:stop]
        else:
            rank_keys(student_rows[start:stop], teacher_rows[start:stop], work, keys)
            keys.sort(axis=1)
            keys &= 0xFFFFFFFF
            order[start:stop] = keys
            index = torch.from_numpy(keys)
            torch.gather(teacher[start:stop], 1, index, out=p_tensor[start:stop])
            torch.gather(student[start:stop], 1, index, out=q_tensor[start:stop])
        if narrow:
            for x, middle in zip((p, q), middles, strict=True):
                np.subtract(x, middle, out=x)
        else:
            for x, top in zip((p, q), tops, strict=True):
                np.maximum.reduceat(x, starts, axis=1, out=top[start:stop])
                np.subtract(x, spread(top[start:stop]), out=x)
        np.subtract(p, q, out=work)
        for x in (p, q):
            np.multiply(x, inverse_t, out=x)
            np.exp(x, out=x)
        columns = raw[:, start:stop]
        total(p, columns[0])
        total(q, columns[1])
        if options.weighting:
            total(np.multiply(work, p, out=work), columns[2])
            pp, qq, apart = columns[3:]
            total(np.multiply(p, p, out=work), pp)
            total(np.multiply(q, q, out=work), qq)
            # The squared distance of p and q at one norm: 1 - p.q / (|p| |q|) itself would cancel in float32.
            np.multiply(spread(np.sqrt(pp / qq)), q, out=work)
            np.subtract(work, p, out=work)
            total(np.multiply(work, work, out=work), apart)
        else:
            # No small weight hides the rounding of KL here: its terms that do not cancel.
            np.multiply(work, -inverse_t, out=work)
            ratio = columns[0] / columns[1]
            work += spread(np.log(ratio))
            total(_kl_terms(p, q * spread(ratio), work), columns[2])

    _each_chunk(n, classes, statistics)
    # [K, N] rows are what sums over groups run through fastest.
    wide: Wide = np.ascontiguousarray(raw.transpose(0, 2, 1), dtype=np.float64)
    with np.errstate(all="ignore"):
        if narrow:
            if options.weighting:
                wide[2] /= options.temperature
            else:
                wide[2] += wide[0] * np.log(wide[0] / wide[1])
            loss, coefficients = _combine_narrow(wide, plan, tables, options)
        else:
            loss, coefficients = _combine(wide, tops, plan, tables, options)
    factors = coefficients.transpose(0, 2, 1).astype(np.float32, order="C")

    def gradient(start: int, stop: int, work: Array, keys: Keys) -> None:
        p, q, c = p_rows[start:stop], q_rows[start:stop], factors[:, start:stop]
        inner = spread(c[0])
        if len(c) == 4:
            inner += np.multiply(spread(c[2]), p, out=work)
            inner += np.multiply(spread(c[3]), q, out=work)
        inner *= q
        np.multiply(spread(c[1]), p, out=work)
        if order is None:
            np.add(work, inner, out=p)
        else:
            work += inner
            keys[:] = order[start:stop]
            # Every class of these rows is written: an order is a permutation.
            p_tensor[start:stop].scatter_(1, torch.from_numpy(keys), torch.from_numpy(work))

    _each_chunk(n, classes, gradient)
    return torch.from_numpy(loss).float(), p_tensor


def rank_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """What :func:`pcdistill.ops.segments.rank_classes` returns, for float32 logits on a CPU."""
    keys = np.empty(student.shape, np.int64)
    rank_keys(student.detach().numpy(), teacher.detach().numpy(), np.empty(student.shape, np.float32), keys)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)


def _middle(logits: Tensor) -> tuple[np.float32, float]:
    """The middle of the range of all logits, and the distance to its ends (NaN if any logit is)."""
    low, high = logits.min().item(), logits.max().item()
    return np.float32((low + high) / 2), (high - low) / 2


def _combine_narrow(raw: Wide, plan: Plan, tables: Tables, options: Options) -> tuple[Wide, Wide]:
    """Loss [N] and coefficients [4 or 2, K, N] from the statistics [6 or 3, K, N] of unnormalised p and q.

    All are relative to the same numbers, so that those of a group are plain sums over its segments.
    """
    if options.weighting:
        pp, qq, apart = raw[3:]
        raw[5] = np.sqrt(pp * qq) * (1.0 - apart / (2.0 * pp))
    columns, segments, n = raw.shape
    # One product for all columns: [G, K] times [K, columns * N].
    joined = torch.from_numpy(raw.transpose(1, 0, 2).reshape(segments, columns * n))
    sums = torch.mm(tables.dense, joined).numpy().reshape(-1, columns, n).transpose(1, 0, 2)
    loss, factors = distil_groups(np, list(sums), 0.0, tables.count.numpy(), options)
    joined = torch.from_numpy(np.concatenate(factors, axis=1))
    coefficients = torch.mm(tables.dense.t(), joined).numpy().reshape(segments, -1, n).transpose(1, 0, 2)
    return loss, coefficients


def _combine(raw: Wide, tops: list[Array], plan: Plan, tables: Tables, options: Options) -> tuple[Wide, Wide]:
    """The same from statistics relative to the maxima of the segments, [N, K] for the teacher and the student."""
    mass_p, mass_q = raw[:2]
    top_p, top_q = (top.T.astype(np.float64) / options.temperature for top in tops)
    log_p, log_q = top_p + np.log(mass_p), top_q + np.log(mass_q)
    columns = [log_p, log_q, raw[2] / mass_p]
    if not options.weighting:
        columns[2] += log_p - log_q
    else:
        columns[2] = columns[2] / options.temperature + top_p - top_q
        pp, qq, apart = raw[3:]
        columns += [np.sqrt(pp) / mass_p, np.sqrt(qq) / mass_q, apart / (2.0 * pp)]
    loss, joined = combine(Statistics(*map(torch.from_numpy, columns)), plan, tables, options)
    coefficients = joined.numpy()
    coefficients[0] /= mass_q
    coefficients[1] /= mass_p
    if len(coefficients) == 4:
        coefficients[2] /= mass_p * mass_q
        coefficients[3] /= mass_q * mass_q
    return loss.numpy(), coefficients


def _kl_terms(p: Array, q: Array, d: Array) -> Array:
    """p (expm1(d) - d) as :func:`pcdistill.ops.segments.kl_terms` has it, for d = log q - log p."""
    near = np.clip(d, -0.5, 0.5)
    series = np.full_like(near, 1.0 / 362880)
    for factorial in (40320, 5040, 720, 120, 24, 6, 2):
        series *= near
        series += np.float32(1.0 / factorial)
    series *= near
    series *= near
    terms: Array = np.where(np.abs(d) < 0.5, p * series, q - p - p * d)
    return terms


def rank_keys(student: Array, teacher: Array, scratch: Array, keys: Keys) -> None:
    """Fill `keys` [n, C] with integers whose ascending order is the ranking and whose low 32 bits are the class.

    The bits of a float >= 0 grow with its value, so their complement falls; behind them, the class breaks ties.
    """
    np.subtract(teacher, student, out=scratch)
    np.abs(scratch, out=scratch)
    bits: Any = scratch.view(np.int32)
    np.invert(bits, out=bits)
    keys[:] = bits
    keys <<= 32
    keys |= np.arange(keys.shape[1])


def _each_chunk(rows: int, classes: int, work: Callable[[int, int, Array, Keys], None]) -> None:
    """work(start, stop, scratch, keys) over chunks of rows.

    One thread: two, each of which calls torch and NumPy in turn, took 1.2 to 1.5 times as long on two cores. The
    scratch arrays are allocated once, because fresh memory for every operation costs more than the arithmetic.
    """
    step = max(1, min(rows, CHUNK // classes))
    scratch, keys = np.empty((step, classes), np.float32), np.empty((step, classes), np.int64)
    with np.errstate(all="ignore"):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            work(start, stop, scratch[: stop - start], keys[: stop - start])
