"""Tolerances by dtype, and the inputs that every loss is tried on."""

import hypothesis.strategies as st
import torch
from hypothesis.extra.numpy import arrays

# {dtype: (rtol, atol)}. Losses compute in float32 or better, and the reference sees the same rounded input,
# so only the gradient's return to half precision is coarse.
VALUE = {torch.float64: (1e-11, 1e-12), torch.float32: (2e-5, 1e-5), torch.bfloat16: (2e-5, 1e-5)}
GRAD = {torch.float64: (1e-10, 1e-11), torch.float32: (2e-5, 1e-6), torch.bfloat16: (1e-2, 1e-5)}


def make_pair(n: int, c: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits of scale 3: the student's [n, c] (a leaf that requires a gradient) and the teacher's."""
    g = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(n, c, generator=g)).to(dtype).requires_grad_()
    return student, (3 * torch.randn(n, c, generator=g)).to(dtype)


def golden_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The input of the golden values (spec, sections 0.2 and 10): student, teacher [4, 10] float64 and target [4]."""
    n, c = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(10.0, dtype=torch.float64)
    teacher = 3 * torch.sin(1.3 * n + 0.7 * c) + 0.1 * c
    student = 2 * torch.cos(0.9 * n + 0.5 * c) - 0.05 * c
    return student, teacher, torch.tensor([2, 3, 8, 9])


@st.composite
def logit_pairs(draw, max_n: int = 5, max_c: int = 12, scale: float = 50.0):
    """Float64 pairs [N, C], N >= 1, C >= 2, from flat to very peaked."""
    shape = (draw(st.integers(1, max_n)), draw(st.integers(2, max_c)))
    values = arrays("float64", shape, elements=st.floats(-scale, scale))
    return torch.from_numpy(draw(values)), torch.from_numpy(draw(values))


def extreme_pair(n: int, c: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits up to +-1e4 in half precision, with equal rows, one-hot rows and ties; and a target [n]."""
    assert n >= 4
    g = torch.Generator().manual_seed(1)
    student = (torch.rand(n, c, generator=g) * 2e4 - 1e4).to(dtype)
    teacher = (torch.rand(n, c, generator=g) * 2e4 - 1e4).to(dtype)
    student[0], teacher[0] = 0, 0  # flat
    student[1] = teacher[1]  # equal
    teacher[2], teacher[2, 0] = -1e4, 1e4  # one-hot teacher, and the student's opposite
    student[2], student[2, 0] = 1e4, -1e4
    return student.requires_grad_(), teacher, torch.arange(n) % c


def on_cpu(student=None, **train):
    """The placement of a run on the CPU."""
    from pcdistill.engine.placement import make_accelerator, make_placement  # slow to import
    from pcdistill.recipe import TrainConfig

    config = TrainConfig(device="cpu", **train)
    return make_placement(config, make_accelerator(config), student)


def data_of(name, *, seed=0, rank=0, world_size=1, **config):
    """Classification data by name and keys of the recipe's `data`, for one process."""
    from pcdistill.classification.data import build_data
    from pcdistill.data.loader import Stream
    from pcdistill.recipe import DataConfig

    return build_data(DataConfig(name, **config), Stream(seed, rank, world_size))
