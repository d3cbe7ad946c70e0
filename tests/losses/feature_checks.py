"""What every feature loss must stand, as functions: each test file names its loss and its reference, and calls them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from pcdistill.losses._features import Features
from tests.helpers import GRAD, VALUE

DTYPES = pytest.mark.parametrize("dtype", VALUE, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
WIDTHS, SIZES = (3, 4, 6), (8, 4, 2)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_features(
    n: int = 4,
    widths: Sequence[int] = WIDTHS,
    sizes: Sequence[int] = SIZES,
    *,
    dtype: torch.dtype = torch.float32,
    classes: int = 5,
    seed: int = 0,
    scale: float = 1.0,
) -> Features:
    """Random features of a network whose stages end in a ReLU; the classifier reads the mean of the last map."""
    before = [
        scale * randn(n, d, s, s, seed=seed * 100 + i) for i, (d, s) in enumerate(zip(widths, sizes, strict=True))
    ]
    before = [x.to(dtype) for x in before]
    torch.manual_seed(seed)
    classifier = nn.Linear(widths[-1], classes)
    maps = [x.relu() for x in before]
    pooled = maps[-1].float().mean((2, 3)).to(dtype)
    logits = classifier(pooled.float()).detach().to(dtype)
    return Features(maps, before, pooled, logits, classifier, torch.arange(n), [None for _ in maps])


def tensors(features: Features) -> list[Tensor]:
    assert features.pre_activations is not None
    return [*features.maps, *features.pre_activations, features.pooled, features.logits]


def require_grad(features: Features) -> Features:
    """The same numbers, every tensor a leaf that collects its gradient."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    assert features.pre_activations is not None
    return features._replace(
        maps=[leaf(x) for x in features.maps],
        pre_activations=[leaf(x) for x in features.pre_activations],
        pooled=leaf(features.pooled),
        logits=leaf(features.logits),
    )


def nested(x: Tensor) -> list:
    """Nested lists of 0-d tensors, so that a loop over them can be differentiated."""
    return [nested(row) for row in x] if x.ndim else x


def check_against_loop(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor],
    reference: Callable[..., object],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Value and gradient of `loss` (a scalar, or [N]) are those of the loop over the same, rounded, numbers.

    Of [N] values the sum of 1 * loss_0 + 2 * loss_1 + ... is differentiated.
    """
    leaves = [x.to(dtype).detach().requires_grad_() for x in students]
    constants = [x.to(dtype).detach().requires_grad_() for x in teachers]
    actual = loss(leaves, constants)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference([nested(x) for x in exact], [nested(x.detach().double()) for x in constants])
    expected = torch.stack(expected) if isinstance(expected, list) else expected
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=rtol, atol=atol)

    weight = torch.arange(1.0, actual.numel() + 1, dtype=torch.float64)
    (actual.reshape(-1) * weight.to(actual.dtype)).sum().backward()
    (expected.reshape(-1) * weight).sum().backward()
    assert all(x.grad is None for x in constants)  # the teacher is one
    rtol, atol = GRAD[dtype]
    for leaf, right in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        scale = right.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(leaf.grad.double() / scale, right.grad / scale, rtol=10 * rtol, atol=10 * atol)


def check_module(build: Callable[[Features, Features], nn.Module], **shapes: Sequence[int]) -> nn.Module:
    """The rules for all modules, on a student and a teacher of other widths and resolutions.

    The student and all adapters get gradients, the teacher none; inputs stay as they were; autocast changes nothing; no
    samples give 0 with a graph; no value is read back.
    """
    student = require_grad(make_features(seed=1))
    teacher = require_grad(
        make_features(widths=shapes.get("widths", (5, 6, 8)), sizes=shapes.get("sizes", SIZES), seed=2)
    )
    target = torch.arange(4)
    torch.manual_seed(3)
    module = build(student, teacher)
    before = [x.detach().clone() for x in (*tensors(student), *tensors(teacher))]
    value = module(student, teacher, target)
    assert value.shape == ()
    assert value.isfinite()
    value.backward()
    assert any(x.grad is not None and x.grad.abs().max() > 0 for x in tensors(student))
    assert all(x.grad is None for x in tensors(teacher))
    assert all(p.grad is None for p in teacher.classifier.parameters())
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    for x, old in zip((*tensors(student), *tensors(teacher)), before, strict=True):
        assert torch.equal(x, old)

    module.eval()
    outside = module(student, teacher, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(student, teacher, target)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    module.train()

    state = {name: x.clone() for name, x in module.state_dict().items()}
    empty, none = (
        require_grad(make_features(n=0, seed=1)),
        make_features(n=0, widths=[x.shape[1] for x in teacher.maps]),
    )
    value = module(empty, none, target[:0])
    value.backward()
    assert value == 0
    assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())

    module.to("meta")  # a meta tensor has no values: asking for one raises
    there = [f._replace(index=f.index.to("meta")) for f in (student, teacher)]
    there = [
        f._replace(
            maps=[x.to("meta") for x in f.maps],
            pre_activations=[x.to("meta") for x in f.pre_activations],
            pooled=f.pooled.to("meta"),
            logits=f.logits.to("meta"),
            classifier=nn.Linear(f.pooled.shape[1], f.logits.shape[1], device="meta"),
        )
        for f in there
    ]
    module = build(*there).to("meta")
    assert module(*there, target.to("meta")).device.type == "meta"
    return module


def check_finite_in_half(build: Callable[[Features, Features], nn.Module], dtype: torch.dtype) -> None:
    """Loss and gradients stay finite for features up to 1e4, dead samples and equal samples."""
    student, teacher = (
        make_features(n=6, dtype=dtype, seed=seed, scale=3e3, widths=widths)
        for seed, widths in ((1, WIDTHS), (2, (5, 4, 8)))
    )
    for features in (student, teacher):
        for x in tensors(features):
            x[0] = 0
            x[1] = x[2]
            x.clamp_(-1e4, 1e4)
    student.maps[0][3], student.pooled[3] = 0, 0
    student = require_grad(student)
    module = build(student, teacher)
    value = module(student, teacher, torch.arange(6) % 5)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    grads = [x.grad for x in tensors(student) if x.grad is not None] + [p.grad for p in module.parameters()]
    assert grads
    assert all(g.isfinite().all() for g in grads)


def check_counts(build: Callable[[Features, Features], nn.Module]) -> None:
    """A student of two stages and a teacher of four, and the other way round."""
    two, four = (
        make_features(widths=(3, 4), sizes=(4, 2), seed=1),
        make_features(widths=(3, 4, 5, 6), sizes=(16, 8, 4, 2)),
    )
    for student, teacher in ((two, four), (four, two)):
        assert build(student, teacher)(student, teacher, torch.arange(4)).isfinite()
