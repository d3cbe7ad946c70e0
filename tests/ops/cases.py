"""Inputs that PCD's backends must agree on, and the check against float64, group by group."""

from dataclasses import dataclass, field

import torch

from pcdistill.ops.pcd import pcd
from pcdistill.ops.segments import difference
from tests.references.pcd import pcd_by_group

DEFAULTS = {"ranking": True, "weighting": True, "detach_weight": False}
OPTIONS = [{}, {"ranking": False}, {"weighting": False}, {"detach_weight": True}]


@dataclass(frozen=True)
class Case:
    """Logits of one of the KINDS, the stages whose groups are summed, a temperature and options."""

    kind: str
    n: int
    c: int
    sizes: tuple[int, ...]
    temperature: float = 4.0
    options: dict[str, bool] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def stages(s: int) -> tuple[int, ...]:
    """Both directions of S stages."""
    return (*range(s, 0, -1), *range(1, s + 1))


def logits(kind: str, n: int, c: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher, [n, c] float64."""
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(n, c, generator=g, dtype=torch.float64) for _ in range(2))
    if kind == "usual":
        return 3 * s, 3 * t
    if kind == "close":  # the student has almost learnt the teacher
        return 3 * t + 0.01 * s, 3 * t
    if kind == "small":
        return 0.1 * s, 0.1 * t
    if kind == "huge":
        return (1e4 * s).clamp(-1e4, 1e4), (1e4 * t).clamp(-1e4, 1e4)
    if kind == "spread":  # groups whose logits all lie far below the row's maximum
        levels = torch.arange(c, dtype=torch.float64) * (3000.0 / c)
        return s - levels, t - levels.flip(0)
    if kind == "offset":  # one row far above the others, the student far above the teacher
        return 3 * s + 1000 * torch.arange(n)[:, None] + 500, 3 * t
    if kind == "ties":  # a handful of different values, so that boundaries fall among equal differences
        return s.round(), t.round()
    if kind == "one difference":  # almost: equal in pairs, larger for later classes, and of either sign
        s = (4 * s).round() / 4
        return s, s + t.sign() * (1 + torch.arange(c).div(2, rounding_mode="floor") * 2.0**-18)
    if kind == "equal rows":
        t[: n // 2] = s[: n // 2]
        s[-1], t[-1] = 2.0, -1.0  # all differences equal, both softmaxes flat
        return 3 * s, 3 * t
    raise ValueError(kind)


KINDS = ("usual", "close", "small", "huge", "spread", "offset", "ties", "one difference", "equal rows")


def in_one_ranking(
    student: torch.Tensor, teacher: torch.Tensor, ranking: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both logits in float64 with their classes in the order that the compute dtype ranks them in; and the order.

    Float64 would break ties that differences rounded to float32 have: the order is part of the question, not of the
    answer, and is taken by a plain Python sort.
    """
    rows = difference(student, teacher).tolist()
    order = [
        sorted(range(len(row)), key=lambda c, row=row: (-row[c], c)) if ranking else range(len(row)) for row in rows
    ]
    index = torch.tensor([list(row) for row in order])
    return student.double().gather(1, index), teacher.double().gather(1, index), index


def expected(
    student: torch.Tensor,
    teacher: torch.Tensor,
    sizes: tuple[int, ...],
    temperature: float,
    options: dict[str, bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient from the group-by-group program in float64."""
    s, t, index = in_one_ranking(student, teacher, options["ranking"])
    s.requires_grad_()
    told = {name: options[name] for name in ("weighting", "detach_weight")}
    loss = pcd_by_group(s, t, sizes, temperature, **told)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), torch.empty_like(gradient).scatter_(1, index, gradient)


def check(backend: str, case: Case, seed: int = 0, device: str = "cpu") -> None:
    """Raise AssertionError unless value and gradient lie within the error that is allowed against float64."""
    compute = torch.promote_types(case.dtype, torch.float32)
    student, teacher = (x.to(case.dtype).to(compute) for x in logits(case.kind, case.n, case.c, seed))
    options = DEFAULTS | case.options
    value, gradient = expected(student, teacher, case.sizes, case.temperature, options)
    student.requires_grad_()
    there = student.to(device), teacher.to(device)
    loss = pcd(*there, case.sizes, temperature=case.temperature, **options, backend=backend).cpu()
    upstream = torch.linspace(0.5, 2.0, case.n, dtype=compute)
    (actual,) = torch.autograd.grad(loss, student, upstream)
    assert loss.dtype == actual.dtype == compute
    rtol, atol = (1e-11, 1e-12) if compute == torch.float64 else (2e-5, 1e-6)
    tau = case.temperature
    torch.testing.assert_close(loss.detach().double(), value, rtol=rtol, atol=atol * tau**2)
    # The gradient on the scale of its row, since its elements are differences of q and p, times KL: where that is in
    # the thousands, float32 leaves less of the difference.
    kl, _ = expected(student.detach(), teacher, case.sizes, tau, {**options, "weighting": False})
    scale = gradient.abs().amax(dim=1) + 0.05 * tau * sum({*case.sizes}) + 0.02 * kl / tau
    error = (actual.double() / upstream[:, None] - gradient).abs() / scale[:, None]
    assert error.max() <= max(2.5 * rtol, 1e-10), f"gradient off by {error.max():.1e} of its row's scale"


HARD = [
    *(Case(kind, 4, 37, stages(3), 4.0) for kind in KINDS),
    *(Case(kind, 3, 101, stages(10), 1.0) for kind in KINDS),
    *(Case("usual", 3, 24, stages(4), 2.0, options) for options in OPTIONS),
    *(Case("spread", 3, 24, stages(4), 0.5, options) for options in OPTIONS),
    Case("usual", 1, 2, stages(1)),
    Case("ties", 2, 3, stages(1), 0.5),
    *(Case("one difference", 2, c, stages(4)) for c in (16, 17)),
    Case("spread", 2, 64, stages(32), 4.0),
    Case("usual", 2, 64, stages(32), 4.0),  # S = C // 2: almost every rank is a boundary
    Case("ties", 2, 33, stages(16), 4.0),
    Case("usual", 2, 50, (7,), 4.0),  # one stage of a progressive schedule
    Case("usual", 2, 50, (6, 5), 4.0),
    Case("usual", 2, 1000, stages(3), 4.0, {}, torch.float16),
    Case("huge", 2, 200, stages(5), 1.0, {}, torch.bfloat16),
    Case("close", 2, 1000, stages(5), 1.0),
    *(Case(kind, 2, 500, stages(10), 1.0, {"weighting": False}) for kind in KINDS),
]

# Triton's interpreter runs the kernel in Python, so fewer and smaller ones.
INTERPRETED = [
    *(Case(kind, 2, 21, stages(3), 4.0) for kind in KINDS),
    *(Case("usual", 2, 16, stages(3), 2.0, options) for options in OPTIONS[1:]),
    Case("spread", 2, 19, stages(5), 0.5),
    Case("usual", 1, 2, stages(1)),
    Case("ties", 2, 12, stages(6)),
    Case("usual", 1, 50, (7,)),
    Case("usual", 1, 300, stages(3), 4.0, {}, torch.float16),
]

# Every pass over tiles of 16 or 32 classes.
TILED = [
    *(Case(kind, 2, 35, (3, 1), 4.0) for kind in KINDS),
    *(Case(kind, 1, 70, stages(2), 1.0) for kind in KINDS),
    *(Case("usual", 2, 20, stages(3), 2.0, options) for options in OPTIONS[1:]),
    Case("spread", 1, 45, (5, 1), 0.5, {"weighting": False}),
    Case("close", 1, 130, (4,), 1.0, {"weighting": False}),
    Case("usual", 2, 32, (7,)),
    Case("usual", 1, 300, stages(3), 4.0, {}, torch.float16),
    Case("huge", 2, 60, stages(2), 1.0, {}, torch.bfloat16),
]
