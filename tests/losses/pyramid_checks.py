"""What every loss on pyramids must stand, as functions: each test file names its loss and its reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pcdistill.losses._pyramid import Pyramid
from tests.helpers import GRAD, VALUE

DTYPES = pytest.mark.parametrize("dtype", VALUE, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
IMAGE_SIZE = (32, 48)
BOXES = [[[3.0, 5.0, 20.0, 17.0], [10.0, 0.0, 47.5, 31.0]], []]
Build = Callable[[Pyramid, Pyramid], nn.Module]


def make_pyramid(
    width: int = 3,
    *,
    n: int = 2,
    sizes: tuple = ((4, 6), (2, 3)),
    strides: tuple = (8, 16),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
    leaf: bool = False,
) -> Pyramid:
    """Random levels; leaves that collect gradients with `leaf`."""
    g = torch.Generator().manual_seed(seed)
    levels = [(scale * torch.randn(n, width, h, w, generator=g)).to(dtype) for h, w in sizes]
    return Pyramid([x.requires_grad_(leaf) for x in levels], list(strides), IMAGE_SIZE)


def make_targets(n: int = 2, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """One image with two overlapping boxes, the next without any."""
    return [{"boxes": torch.tensor(BOXES[i % 2], dtype=dtype).reshape(-1, 4)} for i in range(n)]


def shake(loss: nn.Module, seed: int = 5) -> nn.Module:
    """Give every parameter a random value, so that no part is hidden by its start at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return loss


def plain(pyramid: Pyramid) -> list:
    """The levels as nested lists of floats."""
    return [level.detach().double().tolist() for level in pyramid.levels]


def generator_of(block: nn.Module) -> list:
    """Weights and biases of a generation block as the references take them."""
    return [p.detach().double().tolist() for p in block.parameters()]


def masking_of(part: nn.Module) -> dict:
    """Parameters of a DualMasking as the references take them."""
    return {
        "spatial": None if part.spatial is None else generator_of(part.spatial),
        "channel": None if part.channel is None else generator_of(part.channel),
        "fusion": None if part.fusion is None else part.fusion.detach().double().tolist(),
    }


def check_dtypes(build: Build, expected: Callable[[nn.Module, Pyramid, Pyramid], float], dtype: torch.dtype) -> None:
    """Value against the reference on the same rounded input, gradient against float64's."""
    student, teacher = make_pyramid(dtype=dtype, leaf=True), make_pyramid(dtype=dtype, seed=1)
    precise = Pyramid([x.detach().double().requires_grad_() for x in student.levels], *student[1:])
    loss = shake(build(student, teacher))
    twin = shake(build(student, teacher)).double()
    if dtype == torch.float64:
        loss = loss.double()
    torch.manual_seed(3)
    actual = loss(student, teacher, make_targets())
    rtol, atol = VALUE[dtype]
    wanted = torch.tensor(expected(twin, precise, teacher), dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=max(rtol, 1e-10), atol=atol)
    actual.backward()
    torch.manual_seed(3)
    twin(precise, Pyramid([x.double() for x in teacher.levels], *teacher[1:]), make_targets()).backward()
    rtol, atol = GRAD[dtype]
    for own, other in zip(student.levels, precise.levels, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=rtol, atol=atol)


def check_gradient(build: Build) -> None:
    """gradcheck in float64, through adapters of another width."""
    student = make_pyramid(2, n=1, sizes=((2, 3), (1, 2)), leaf=True)
    teacher = make_pyramid(3, n=1, sizes=((2, 3), (1, 2)), seed=1)
    loss = shake(build(student, teacher)).double()
    targets = make_targets(1, torch.float64)

    def value(*levels: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(Pyramid(list(levels), *student[1:]), teacher, targets)

    assert torch.autograd.gradcheck(value, tuple(student.levels))


def check_parameters_learn(build: Build) -> None:
    """Every parameter of the loss receives a gradient that is not zero."""
    student, teacher = make_pyramid(2, leaf=True), make_pyramid(3, seed=1)
    loss = shake(build(student, teacher)).double()
    loss(student, teacher, make_targets()).backward()
    still = [name for name, p in loss.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still


def check_teacher_is_constant(build: Build) -> None:
    student, teacher = make_pyramid(leaf=True), make_pyramid(seed=1, leaf=True)
    loss = shake(build(student, teacher)).double()
    value = loss(student, teacher, make_targets())
    value.backward()
    assert value.ndim == 0
    assert all(x.grad is None for x in teacher.levels)
    assert all(x.grad is not None and x.grad.any() for x in student.levels)


def check_half(build: Build, dtype: torch.dtype, weight: float) -> None:
    """Finite loss and gradient at features up to thousands, flat maps and one-hot maps, under autocast too."""
    student, teacher = make_pyramid(dtype=dtype, scale=3e3, leaf=True), make_pyramid(dtype=dtype, scale=3e3, seed=1)
    with torch.no_grad():
        student.levels[0][0], teacher.levels[0][0] = 0, 0
        teacher.levels[1][0], teacher.levels[1][0, 0, 0, 0] = 0, 1e4
        student.levels[1][1] = teacher.levels[1][1]
    loss = build(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = weight * loss(student, teacher, make_targets())
    assert value.dtype == torch.float32
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(x.grad).all() for x in student.levels)


def check_one_image(build: Build) -> None:
    """One image, one cell a level, and no boxes."""
    student = make_pyramid(n=1, sizes=((1, 1), (1, 1)), dtype=torch.float32, leaf=True)
    teacher = make_pyramid(n=1, sizes=((1, 1), (1, 1)), dtype=torch.float32, seed=1)
    value = build(student, teacher)(student, teacher, [{"boxes": torch.zeros(0, 4)}])
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(x.grad).all() for x in student.levels)


def check_matching(build: Build) -> None:
    """Levels are matched by stride, in any width; maps of another size are resized; misfits are refused by name."""
    student = make_pyramid(2, sizes=((8, 12), (4, 6), (2, 3)), strides=(4, 8, 16), dtype=torch.float32, leaf=True)
    teacher = make_pyramid(5, sizes=((4, 6), (2, 3), (1, 2)), strides=(8, 16, 32), dtype=torch.float32, seed=1)
    loss = build(student, teacher)
    loss(student, teacher, make_targets()).backward()
    assert student.levels[0].grad is None
    assert all(x.grad.any() for x in student.levels[1:])
    bigger = make_pyramid(2, sizes=((9, 13), (5, 7), (3, 4)), strides=(4, 8, 16), dtype=torch.float32)
    assert torch.isfinite(loss(bigger, teacher, make_targets()))
    with pytest.raises(ValueError, match=r"built for strides \[4, 8, 16\] and \[8, 16, 32\], got"):
        loss(teacher, teacher, make_targets())
    with pytest.raises(ValueError, match="features of the same images"):
        loss(student, make_pyramid(5, n=3, sizes=((4, 6), (2, 3), (1, 2)), strides=(8, 16, 32)), make_targets())
    other = make_pyramid(5, sizes=((1, 2),), strides=(64,), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"strides \[4, 8, 16\] and the teacher's \[64\]: no level in common"):
        build(student, other)


def check_strides_option(loss_class: type[nn.Module]) -> None:
    student = make_pyramid(2, dtype=torch.float32, leaf=True)
    teacher = make_pyramid(3, dtype=torch.float32, seed=1)
    loss_class(student, teacher, strides=[16])(student, teacher, make_targets()).backward()
    assert student.levels[0].grad is None
    assert student.levels[1].grad is not None
    with pytest.raises(ValueError, match=r"strides: the student has no level of stride 32; it has \[8, 16\]"):
        loss_class(student, teacher, strides=[8, 32])


def check_needs_targets(loss: nn.Module, student: Pyramid, teacher: Pyramid) -> None:
    assert loss.needs.labels
    with pytest.raises(ValueError, match="targets must be given to this loss"):
        loss(student, teacher)
    with pytest.raises(ValueError, match="one per image, got 1 for 2 images"):
        loss(student, teacher, make_targets(1))
