"""What every logit loss must stand, as functions: each test file names its loss and its reference, and calls them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import GRAD, VALUE, extreme_pair, make_pair
from tests.references.scalars import Number, gradient

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Rows = list[list[float]]

SIZES = pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 100), (2, 1003)])
DTYPES = pytest.mark.parametrize("dtype", VALUE, ids=str)
GRAD_DTYPES = pytest.mark.parametrize("dtype", GRAD, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
BAD_LOGITS = pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 10), torch.zeros(2, 9), ValueError, r"\[2, 9\].*\[2, 10\]"),
        (torch.zeros(2, 10, 3), torch.zeros(2, 10, 3), ValueError, r"\[N, C\].*\[2, 10, 3\]"),
        (torch.zeros(2, 10).long(), torch.zeros(2, 10).long(), TypeError, "int64"),
        (torch.zeros(2, 10), torch.zeros(2, 10, device="meta"), ValueError, "meta"),
    ],
    ids=["classes differ", "not 2-D", "integers", "devices differ"],
)
BAD_TARGETS = pytest.mark.parametrize(
    ("target", "says"),
    [(None, "target must be given"), (torch.zeros(3).long(), r"\[3\]"), (torch.zeros(2), r"\[2\] of torch.float32")],
    ids=["none", "another N", "floats"],
)


def labels(n: int, c: int, seed: int = 7) -> Tensor:
    """Random class indices [n]."""
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))


def random_input(n: int, c: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student (a leaf that requires a gradient), teacher, target. Half of the labels are the teacher's best class."""
    student, teacher = make_pair(n, c, dtype, seed)
    target = labels(n, c, seed + 7)
    target[::2] = teacher[::2].argmax(1)
    return student, teacher, target


def check_value(loss: Loss, reference: Callable[..., list[float]], n: int, c: int, dtype: torch.dtype) -> None:
    """`loss` gives [N]; `reference` takes lists, made of the same rounded numbers, and gives a list of N."""
    student, teacher, target = random_input(n, c, dtype)
    actual = loss(student, teacher, target)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(student.tolist(), teacher.tolist(), target.tolist())
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def check_gradient(loss: Loss, reference: Callable[..., Rows], n: int, c: int, dtype: torch.dtype) -> None:
    """The gradient of 1 * loss_0 + 2 * loss_1 + ... is the reference's rows times 1, 2, ..."""
    student, teacher, target = random_input(n, c, dtype)
    weight = torch.arange(1.0, n + 1, dtype=torch.float64)
    per_sample = loss(student, teacher, target)
    (per_sample * weight.to(per_sample.dtype)).sum().backward()
    rows = reference(student.tolist(), teacher.tolist(), target.tolist())
    expected = torch.tensor(rows, dtype=torch.float64) * weight[:, None]
    rtol, atol = GRAD[dtype]
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), expected, rtol=rtol, atol=10 * atol)


def check_scalar(loss: Loss, reference: Callable[..., float], n: int, c: int, dtype: torch.dtype) -> None:
    """`loss` gives a scalar of the whole batch; `reference` takes lists and gives a number."""
    student, teacher, target = random_input(n, c, dtype)
    actual = loss(student, teacher, target)
    assert actual.shape == ()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol, atol = VALUE[dtype]
    expected = reference(student.tolist(), teacher.tolist(), target.tolist())
    torch.testing.assert_close(actual.item(), expected, rtol=rtol, atol=atol)


def check_scalar_gradient(loss: Loss, reference: Callable[..., Number], n: int, c: int, dtype: torch.dtype) -> None:
    """The gradient is that of the reference, differentiated operation by operation in float64."""
    student, teacher, target = random_input(n, c, dtype)
    loss(student, teacher, target).backward()
    expected = gradient(lambda rows: reference(rows, teacher.tolist(), target.tolist()), student)
    rtol, atol = GRAD[dtype]
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), expected, rtol=rtol, atol=atol)


def check_gradcheck(loss: Loss, n: int = 3, c: int = 9) -> None:
    student, teacher, target = random_input(n, c, torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)


def check_finite_in_half(loss: Loss, dtype: torch.dtype, c: int = 10) -> None:
    """Loss and gradient are finite at logits up to +-1e4: flat, equal, opposite one-hot and random rows.

    A second time the student is flat in one more row, beside a teacher that is not.
    """
    for flat in (False, True):
        student, teacher, target = extreme_pair(8, c, dtype)
        assert student.abs().max() > 9e3
        if flat:
            with torch.no_grad():
                student[3] = 0
        value = loss(student, teacher, target)
        value.sum().backward()
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() > 0


def check_reductions(loss_with: Callable[..., Tensor]) -> None:
    """mean and sum agree with none; none is [N]; another word is an error. `loss_with(s, t, y, reduction=...)`."""
    student, teacher, target = random_input(6, 10, torch.float64)
    per_sample = loss_with(student, teacher, target, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(loss_with(student, teacher, target, reduction="mean"), per_sample.mean())
    torch.testing.assert_close(loss_with(student, teacher, target, reduction="sum"), per_sample.sum())
    with pytest.raises(ValueError, match="'avg'"):
        loss_with(student, teacher, target, reduction="avg")


def check_batch(loss: Loss, c: int = 10) -> None:
    """Scalar losses: no samples give 0 with a graph; the teacher gets no gradient; nothing reads a value back."""
    empty = torch.zeros(0, c, requires_grad=True)
    value = loss(empty, torch.zeros(0, c), torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value == 0
    assert value.shape == ()
    assert empty.grad is not None
    student, teacher, target = random_input(4, c, torch.float32)
    before = student.detach().clone(), teacher.clone(), target.clone()
    loss(student, teacher.requires_grad_(), target).backward()
    assert teacher.grad is None
    assert student.grad is not None
    for tensor, old in zip((student, teacher, target), before, strict=True):
        assert torch.equal(tensor, old)  # the inputs are left as they were
    outside = loss(student, teacher, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher, target)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def check_reads_no_value(loss: Loss, c: int = 10) -> None:
    """A meta tensor has no values: asking for one raises. So a loss that runs here never makes a GPU wait."""
    student, teacher, target = (x.to("meta") for x in random_input(4, c, torch.float32))
    assert loss(student, teacher, target).device.type == "meta"


def torchdistill_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torchdistill's KD (skips the test where it is not installed), times T^2, which it leaves out without labels."""
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    loss = peer.KDLoss("logits", "output", "logits", "output", temperature, alpha=0.0)
    value: Tensor = loss({"logits": {"output": student}}, {"logits": {"output": teacher}})
    return value * temperature**2
