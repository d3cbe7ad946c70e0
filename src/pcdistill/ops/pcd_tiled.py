"""PCD on CUDA for rows too long for one program: every pass goes over tiles, however many stages are summed.

Forward: `_bracket` and `_select` find where the ranking of a row is cut, `_moments` sums eleven numbers of every tile
and segment, `_combine` makes the loss and a segment's coefficients of them. Backward: `_slope`. So a logit matrix is
read three times.

With E_t = exp((t - max t) / T), E_s likewise, and x the difference of their exponents, the moments of a segment are

    the maxima;  sum E_t, E_s;  sum E_t^2, E_s^2, E_t E_s;  sum (E_t - E_s)^2, (E_t - E_s) E_s;
    sum E_t x;  sum E_t (exp(x) - 1 - x)

From them follow p, q, KL(p || q) and 1 - cos(p, q) of every union of segments. Each pair of sums that would cancel as
q nears p has a form here that is small itself.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdistill.ops.pcd_eager import Options
from pcdistill.ops.segments import refinement, remember, summed_groups

INDEX_BITS = 20  # of a key: its low bits are the class, its high 31 the difference
FIELDS = tl.constexpr(11)
COEFFICIENTS = tl.constexpr(6)
RUN = tl.constexpr(8)  # neighbouring classes in a sample: a sector of 32 bytes
BOUNDARIES = 4  # searched for in one pass over a row


class Plan(NamedTuple):
    """Sizes in classes: of the tiles; of the sample of a row that is ranked first; of what is kept for a boundary.

    Small programs of `_select` wait less for one another: it reduces a tile again and again.
    """

    select: int
    tile: int
    sample: int
    kept: int
    select_warps: int = 4


def plan(classes: int) -> Plan:
    """The sizes that suit a card."""
    return Plan(select=1024, tile=2048, sample=4096, kept=classes // 8)


class Cuts(NamedTuple):
    """Inner boundaries of the segments, in ranks [B]; and of every group [G, 3] its first segment, end and count."""

    edges: Tensor
    spans: Tensor


@remember
def cuts(classes: int, stage_sizes: tuple[int, ...], device: torch.device) -> Cuts:
    """Where the classes are cut, on the device."""
    groups = summed_groups(classes, stage_sizes)
    edges = refinement(groups)
    segment = {edge: i for i, edge in enumerate(edges)}
    spans = [(segment[group.start], segment[group.stop], group.count) for group in groups]
    with torch.inference_mode(False):
        return Cuts(*(torch.tensor(values, dtype=torch.int32, device=device) for values in (edges[1:-1], spans)))


def on_device(x: Tensor) -> Any:
    """The context in which kernels run where this tensor is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def loss_and_coefficients(
    student: Tensor, teacher: Tensor, stage_sizes: tuple[int, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N] float32 of logits [N, C], and what its gradient needs.

    Returns:
        the loss; thresholds [N, B] int64: a class ranks above a boundary if its key reaches it; coefficients
        [N, B + 1, 6] float32 of every segment: the maxima of t and s, then of E_s, -E_t, -E_s E_t and E_s E_s.
    """
    n, classes = student.shape
    edges, spans = cuts(classes, stage_sizes, student.device)
    boundaries, sizes = len(edges), plan(classes)
    tiles, segments = triton.cdiv(classes, sizes.tile), boundaries + 1
    width = max(triton.next_power_of_2(segments), 2)
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    sums = torch.empty((n, tiles, FIELDS.value, segments), dtype=torch.float32, device=student.device)
    coefficients = torch.empty((n, segments, COEFFICIENTS.value), dtype=torch.float32, device=student.device)
    with on_device(student):
        thresholds = _thresholds(student, teacher, edges, options.ranking)
        _moments[(n, tiles)](
            student,
            teacher,
            thresholds,
            sums,
            classes,
            boundaries,
            options.temperature,
            RANKING=options.ranking,
            TILE=sizes.tile,
            INDEX_BITS=INDEX_BITS,
            num_warps=8,
        )
        _combine[(n,)](
            sums,
            spans,
            loss,
            coefficients,
            tiles,
            segments,
            len(spans),
            options.temperature,
            WEIGHTING=options.weighting,
            DETACH=options.detach_weight,
            SEGMENTS=width,
            TILES=max(512 // width, 1),
            num_warps=4,
        )
    return loss, thresholds, coefficients


def slope(
    student: Tensor, teacher: Tensor, thresholds: Tensor, coefficients: Tensor, upstream: Tensor, options: Options
) -> Tensor:
    """Gradient [N, C] with respect to the student's logits, in their dtype, for the loss's gradient [N]."""
    n, classes = student.shape
    tile = plan(classes).tile
    gradient = torch.empty_like(student)
    with on_device(student):
        _slope[(n, triton.cdiv(classes, tile))](
            student,
            teacher,
            thresholds,
            coefficients,
            upstream.float().contiguous(),
            gradient,
            classes,
            thresholds.shape[1],
            options.temperature,
            RANKING=options.ranking,
            TILE=tile,
            INDEX_BITS=INDEX_BITS,
            num_warps=8,
        )
    return gradient


def _thresholds(student: Tensor, teacher: Tensor, edges: Tensor, ranking: bool) -> Tensor:
    """The key [N, B] that the classes above a boundary reach, and no other class."""
    n, classes = student.shape
    boundaries, sizes = len(edges), plan(classes)
    if not ranking:
        return ((1 << INDEX_BITS) - edges.long()).expand(n, boundaries).contiguous()
    thresholds = torch.empty((n, boundaries), dtype=torch.int64, device=student.device)
    if boundaries:
        cores = torch.cuda.get_device_properties(student.device).multi_processor_count if student.is_cuda else 1
        programs, capacity = min(n, 4 * cores), sizes.kept
        kept = torch.empty((programs, BOUNDARIES, capacity), dtype=torch.int64, device=student.device)
        brackets = torch.empty((n, boundaries, 2), dtype=torch.int64, device=student.device)
        _bracket[(n, triton.cdiv(boundaries, BOUNDARIES))](
            student,
            teacher,
            edges,
            brackets,
            classes,
            boundaries,
            SAMPLE=sizes.sample,
            BOUNDARIES=BOUNDARIES,
            INDEX_BITS=INDEX_BITS,
            num_warps=8,
        )
        _select[(programs,)](
            student,
            teacher,
            edges,
            brackets,
            thresholds,
            kept,
            n,
            classes,
            boundaries,
            capacity,
            TILE=sizes.select,
            BOUNDARIES=BOUNDARIES,
            INDEX_BITS=INDEX_BITS,
            num_warps=sizes.select_warps,
        )
    return thresholds


@triton.jit
def _logits(student, teacher, row, index, classes):  # type: ignore[no-untyped-def]
    """Both logits of some classes of a row, float32."""
    place = row * classes + index
    s = tl.load(student + place, mask=index < classes, other=0.0).to(tl.float32)
    t = tl.load(teacher + place, mask=index < classes, other=0.0).to(tl.float32)
    return s, t


@triton.jit  # type: ignore[untyped-decorator]
def _keys(s, t, index, classes, RANKING: tl.constexpr, INDEX_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """An int64 that falls with the rank, and that no two classes share; -1 beyond the last class."""
    key = ((1 << INDEX_BITS) - 1 - index).to(tl.int64)
    if RANKING:
        # The bits of a float >= 0 grow with its value.
        key = key | (((t - s).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64) << INDEX_BITS)
    return tl.where(index < classes, key, -1)


@triton.jit
def _item(values, lane, i):  # type: ignore[no-untyped-def]
    """One element of a small block, as a scalar."""
    return tl.sum(tl.where(lane == i, values, 0), axis=0)


@triton.jit(do_not_specialize=["boundaries"])  # type: ignore[untyped-decorator]
def _bracket(  # type: ignore[no-untyped-def]
    student,
    teacher,
    edges,
    brackets,
    classes,
    boundaries,
    SAMPLE: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Two keys for every boundary of a row, that it very likely lies between: from the ranks of a sample."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BOUNDARIES + tl.arange(0, BOUNDARIES)
    wanted = tl.load(edges + b, mask=b < boundaries, other=1)
    i = tl.arange(0, SAMPLE)
    index = (i // RUN) * (classes // (SAMPLE // RUN)) + i % RUN
    s, t = _logits(student, teacher, row, index, classes)
    bits = (t - s).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    share = wanted.to(tl.float32) / classes
    # Four standard deviations of the sample's rank to either side.
    slack = 4 * tl.sqrt(SAMPLE * share * (1 - share)) + 1
    rank_low = tl.ceil(share * SAMPLE + slack).to(tl.int32)
    rank_high = tl.floor(share * SAMPLE - slack).to(tl.int32)
    low = tl.zeros_like(wanted)
    high = tl.zeros_like(wanted)
    # 22 of 31 bits: finer than the sample is.
    for k in range(22):
        step = 1 << (30 - k)
        reached = tl.sum((bits[:, None] >= (low | step)[None, :]).to(tl.int32), axis=0)
        low = tl.where(reached >= rank_low, low | step, low)
        reached = tl.sum((bits[:, None] >= (high | step)[None, :]).to(tl.int32), axis=0)
        high = tl.where(reached >= rank_high, high | step, high)
    out = brackets + 2 * (row * boundaries + b)
    tl.store(out, low.to(tl.int64) << INDEX_BITS, mask=b < boundaries)
    tl.store(out + 1, ((high | 511).to(tl.int64) + 1) << INDEX_BITS, mask=b < boundaries)


@triton.jit(do_not_specialize=["rows", "boundaries"])  # type: ignore[untyped-decorator]
def _select(  # type: ignore[no-untyped-def]
    student,
    teacher,
    edges,
    brackets,
    thresholds,
    kept,
    rows,
    classes,
    boundaries,
    capacity,
    TILE: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """Thresholds of rows: one pass over a row keeps the keys inside the brackets, then those are searched."""
    lane = tl.arange(0, BOUNDARIES)
    offset = tl.arange(0, TILE)
    kept += tl.program_id(0).to(tl.int64) * BOUNDARIES * capacity
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + number
        for first in range(0, boundaries, BOUNDARIES):
            real = first + lane < boundaries
            wanted = tl.load(edges + first + lane, mask=real, other=1)
            at = brackets + 2 * (row * boundaries + first + lane)
            low = tl.load(at, mask=real, other=0)
            high = tl.load(at + 1, mask=real, other=0)
            inner = tl.zeros_like(wanted)  # keys inside the bracket
            above = tl.zeros_like(wanted)  # keys above it
            for start in range(0, classes, TILE):
                s, t = _logits(student, teacher, row, start + offset, classes)
                keys = _keys(s, t, start + offset, classes, True, INDEX_BITS)
                for j in range(BOUNDARIES):
                    below_top = keys < _item(high, lane, j)
                    inside = below_top & (keys >= _item(low, lane, j))
                    flag = inside.to(tl.int32)
                    place = _item(inner, lane, j) + tl.cumsum(flag, axis=0) - 1
                    tl.store(kept + j * capacity + place, keys, mask=inside & (place < capacity))
                    both = tl.sum(flag + ((~below_top).to(tl.int32) << 16), axis=0)
                    inner += tl.where(lane == j, both & 0xFFFF, 0)
                    above += tl.where(lane == j, both >> 16, 0)
            tl.debug_barrier()
            for j in range(tl.minimum(boundaries - first, BOUNDARIES)):
                inner_j = _item(inner, lane, j)
                goal = _item(wanted, lane, j)
                left = goal - _item(above, lane, j)
                found = (left >= 1) & (left <= inner_j) & (inner_j <= capacity)
                bottom = tl.where(found, _item(low, lane, j), 0)
                top = tl.where(found, _item(high, lane, j), 1 << (31 + INDEX_BITS)) - 1
                goal = tl.where(found, left, goal)
                while bottom < top:
                    middle = bottom + (top - bottom + 1) // 2
                    reached = tl.full((), 0, tl.int32)
                    if found:
                        for start in range(0, inner_j, TILE):
                            k = tl.load(kept + j * capacity + start + offset, mask=start + offset < inner_j, other=-1)
                            reached += tl.sum((k >= middle).to(tl.int32), axis=0)
                    else:
                        for start in range(0, classes, TILE):
                            s, t = _logits(student, teacher, row, start + offset, classes)
                            k = _keys(s, t, start + offset, classes, True, INDEX_BITS)
                            reached += tl.sum((k >= middle).to(tl.int32), axis=0)
                    bottom = tl.where(reached >= goal, middle, bottom)
                    top = tl.where(reached > goal, top, tl.where(reached == goal, middle, middle - 1))
                tl.store(thresholds + row * boundaries + first + j, bottom)
            tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _segments(  # type: ignore[no-untyped-def]
    s, t, thresholds, row, index, classes, boundaries, RANKING: tl.constexpr, INDEX_BITS: tl.constexpr
):
    """The segment of every class: the number of boundaries that it ranks below. -1 beyond the last class."""
    keys = _keys(s, t, index, classes, RANKING, INDEX_BITS)
    segment = tl.zeros_like(index)
    for b in range(boundaries):
        segment += (keys < tl.load(thresholds + row * boundaries + b)).to(tl.int32)
    return tl.where(index < classes, segment, -1)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8
):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit(do_not_specialize=["boundaries"])  # type: ignore[untyped-decorator]
def _moments(  # type: ignore[no-untyped-def]
    student,
    teacher,
    thresholds,
    sums,
    classes,
    boundaries,
    temperature,
    RANKING: tl.constexpr,
    TILE: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """The eleven numbers of every segment, of one tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s, t = _logits(student, teacher, row, index, classes)
    segment = _segments(s, t, thresholds, row, index, classes, boundaries, RANKING, INDEX_BITS)
    segments = boundaries + 1
    out = sums + (row * tl.num_programs(1) + tl.program_id(1)) * FIELDS * segments
    top_t = tl.zeros_like(t)
    top_s = tl.zeros_like(s)
    for j in range(segments):
        member = segment == j
        most_t = tl.max(tl.where(member, t, float("-inf")), axis=0)
        most_s = tl.max(tl.where(member, s, float("-inf")), axis=0)
        top_t = tl.where(member, most_t, top_t)
        top_s = tl.where(member, most_s, top_s)
        tl.store(out + j, most_t)
        tl.store(out + segments + j, most_s)
    u = (t - top_t) / temperature
    v = (s - top_s) / temperature
    e_t = tl.exp(u)
    e_s = tl.exp(v)
    x = v - u
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = 1.0 / 40320 + near / 362880
    series = series * near + 1.0 / 5040
    series = series * near + 1.0 / 720
    series = series * near + 1.0 / 120
    series = series * near + 1.0 / 24
    series = series * near + 1.0 / 6
    series = series * near + 0.5
    bent = tl.where(tl.abs(x) < 0.5, e_t * series * near * near, e_s - e_t - e_t * x)
    apart = e_t - e_s
    for j in range(segments):
        one = (segment == j).to(tl.float32)
        m_t = e_t * one
        m_s = e_s * one
        m_a = apart * one
        r0, r1, r2, r3, r4, r5, r6, r7, r8 = tl.reduce(
            (m_t, m_s, m_t * e_t, m_s * e_s, m_t * e_s, m_a * apart, m_a * e_s, m_t * x, bent * one), 0, _add
        )
        at = out + 2 * segments + j
        tl.store(at, r0)
        tl.store(at + segments, r1)
        tl.store(at + 2 * segments, r2)
        tl.store(at + 3 * segments, r3)
        tl.store(at + 4 * segments, r4)
        tl.store(at + 5 * segments, r5)
        tl.store(at + 6 * segments, r6)
        tl.store(at + 7 * segments, r7)
        tl.store(at + 8 * segments, r8)


@triton.jit
def _squares(a, b, ss, dd, ds):  # type: ignore[no-untyped-def]
    """Sum of (a E_t - b E_s)^2."""
    return a * a * dd + 2 * a * (a - b) * ds + (a - b) * (a - b) * ss


@triton.jit
def _divergence(a, b, c, m_t, m_s, xx, hh):  # type: ignore[no-untyped-def]
    """Sum of a E_t (exp(d) - 1 - d), where d = x + c and b = a exp(c)."""
    near = b * hh + (b - a) * xx + (b - a - a * c) * m_t
    return tl.where(tl.abs(c) < 0.5, near, b * m_s - a * m_t - a * (xx + c * m_t))


@triton.jit(do_not_specialize=["tiles", "segments", "groups"])  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    sums,
    spans,
    loss,
    coefficients,
    tiles,
    segments,
    groups,
    temperature,
    WEIGHTING: tl.constexpr,
    DETACH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The loss of a row and its segments' coefficients, in float64: tiles into segments, segments into groups."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SEGMENTS)
    line = tl.arange(0, TILES)
    none = float("-inf")
    temperature = tl.full((), 1.0, tl.float64) * temperature
    sums += row * tiles * FIELDS * segments
    zero = tl.zeros([SEGMENTS], tl.float64)
    top_t = zero + none
    top_s = zero + none
    for start in range(0, tiles, TILES):
        at = sums + (start + line)[:, None] * (FIELDS * segments) + column[None, :]
        real = (start + line < tiles)[:, None] & (column < segments)[None, :]
        top_t = tl.maximum(top_t, tl.max(tl.load(at, mask=real, other=none).to(tl.float64), axis=0))
        top_s = tl.maximum(top_s, tl.max(tl.load(at + segments, mask=real, other=none).to(tl.float64), axis=0))
    m_t, m_s, tt, ss, ts, dd, ds, xx, hh = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(0, tiles, TILES):
        at = sums + (start + line)[:, None] * (FIELDS * segments) + column[None, :]
        real = (start + line < tiles)[:, None] & (column < segments)[None, :]
        most_t = tl.load(at, mask=real, other=none).to(tl.float64)
        most_s = tl.load(at + segments, mask=real, other=none).to(tl.float64)
        real = real & (most_t > none)
        log_a = tl.where(real, (most_t - top_t[None, :]) / temperature, 0.0)
        log_b = tl.where(real, (most_s - top_s[None, :]) / temperature, 0.0)
        a, b, c = tl.exp(log_a), tl.exp(log_b), log_b - log_a
        p_t = tl.load(at + 2 * segments, mask=real, other=0.0).to(tl.float64)
        p_s = tl.load(at + 3 * segments, mask=real, other=0.0).to(tl.float64)
        p_ss = tl.load(at + 5 * segments, mask=real, other=0.0).to(tl.float64)
        p_ds = tl.load(at + 8 * segments, mask=real, other=0.0).to(tl.float64)
        p_xx = tl.load(at + 9 * segments, mask=real, other=0.0).to(tl.float64)
        m_t += tl.sum(a * p_t, axis=0)
        m_s += tl.sum(b * p_s, axis=0)
        tt += tl.sum(a * a * tl.load(at + 4 * segments, mask=real, other=0.0), axis=0)
        ss += tl.sum(b * b * p_ss, axis=0)
        ts += tl.sum(a * b * tl.load(at + 6 * segments, mask=real, other=0.0), axis=0)
        p_dd = tl.load(at + 7 * segments, mask=real, other=0.0).to(tl.float64)
        dd += tl.sum(_squares(a, b, p_ss, p_dd, p_ds), axis=0)
        ds += tl.sum(a * b * p_ds + b * (a - b) * p_ss, axis=0)
        xx += tl.sum(a * (p_xx + c * p_t), axis=0)
        p_hh = tl.load(at + 10 * segments, mask=real, other=0.0).to(tl.float64)
        hh += tl.sum(_divergence(a, b, c, p_t, p_s, p_xx, p_hh), axis=0)

    total = tl.full((), 0.0, tl.float64)
    of_s, of_t, of_both, of_square = zero, zero, zero, zero
    for g in range(groups):
        start = tl.load(spans + 3 * g)
        stop = tl.load(spans + 3 * g + 1)
        count = tl.load(spans + 3 * g + 2).to(tl.float64)
        member = (column >= start) & (column < stop)
        log_a = (top_t - tl.max(tl.where(member, top_t, none), axis=0)) / temperature
        log_b = (top_s - tl.max(tl.where(member, top_s, none), axis=0)) / temperature
        log_a = tl.where(member, log_a, 0.0)
        log_b = tl.where(member, log_b, 0.0)
        a = tl.where(member, tl.exp(log_a), 0.0)
        b = tl.where(member, tl.exp(log_b), 0.0)
        p_mass = tl.sum(a * m_t, axis=0)
        q_mass = tl.sum(b * m_s, axis=0)
        c = tl.where(member, log_b - log_a - tl.log(q_mass) + tl.log(p_mass), 0.0)
        kl = tl.sum(_divergence(a / p_mass, b / q_mass, c, m_t, m_s, xx, hh), axis=0)
        kl = tl.where(kl < 0, 0.0, kl)  # not the maximum, which would hide a NaN
        if WEIGHTING:
            p_norm = tl.sqrt(tl.sum(a * a * tt, axis=0))
            q_norm = tl.sqrt(tl.sum(b * b * ss, axis=0))
            cosine = tl.sum(a * b * ts, axis=0) / (p_norm * q_norm)
            weight = tl.sum(_squares(a / p_norm, b / q_norm, ss, dd, ds), axis=0) / 2
            weight = tl.where(weight < 0, 0.0, weight)
            # The squares are exact as q nears p, the cosine where sums of one of them are large.
            weight = tl.where(cosine < 0.99, 1 - cosine, weight)
            if not DETACH:
                of_both += count * kl * a * b / (p_norm * q_norm)
                of_square += count * kl * (1 - weight) * b * b / (q_norm * q_norm)
        else:
            weight = tl.full((), 1.0, tl.float64)
        total += count * weight * kl
        of_t += count * weight * a / p_mass
        of_s += count * weight * b / q_mass

    tl.store(loss + row, total * temperature * temperature)
    out = coefficients + (row * segments + column) * COEFFICIENTS
    there = column < segments
    tl.store(out, top_t, mask=there)
    tl.store(out + 1, top_s, mask=there)
    tl.store(out + 2, of_s * temperature, mask=there)
    tl.store(out + 3, of_t * temperature, mask=there)
    tl.store(out + 4, of_both * temperature, mask=there)
    tl.store(out + 5, of_square * temperature, mask=there)


@triton.jit(do_not_specialize=["boundaries"])  # type: ignore[untyped-decorator]
def _slope(  # type: ignore[no-untyped-def]
    student,
    teacher,
    thresholds,
    coefficients,
    upstream,
    gradient,
    classes,
    boundaries,
    temperature,
    RANKING: tl.constexpr,
    TILE: tl.constexpr,
    INDEX_BITS: tl.constexpr,
):
    """The gradient of one tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s, t = _logits(student, teacher, row, index, classes)
    segment = _segments(s, t, thresholds, row, index, classes, boundaries, RANKING, INDEX_BITS)
    inside = index < classes
    at = coefficients + (row * (boundaries + 1) + segment) * COEFFICIENTS
    top_t = tl.load(at, mask=inside, other=0.0)
    top_s = tl.load(at + 1, mask=inside, other=0.0)
    of_s = tl.load(at + 2, mask=inside, other=0.0)
    of_t = tl.load(at + 3, mask=inside, other=0.0)
    of_both = tl.load(at + 4, mask=inside, other=0.0)
    of_square = tl.load(at + 5, mask=inside, other=0.0)
    e_t = tl.exp((t - top_t) / temperature)
    e_s = tl.exp((s - top_s) / temperature)
    result = e_s * of_s - e_t * of_t - e_s * (e_t * of_both - e_s * of_square)
    tl.store(gradient + row * classes + index, result * tl.load(upstream + row), mask=inside)
