"""KD against a loop over the equation, gradcheck, the properties that define it, and the mistakes people make."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.ce import ce_loss
from pcdistill.losses.kd import KDLoss, kd_loss
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, logit_pairs, make_pair
from tests.references.kd import kd


@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 100), (2, 1003)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    student, teacher = make_pair(n, c, dtype)
    expected = kd(student.tolist(), teacher.tolist(), temperature)
    actual = kd_loss(student, teacher, temperature=temperature, reduction="none")
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", GRAD, ids=str)
def test_gradient_matches_closed_form(dtype):
    student, teacher = make_pair(7, 100, dtype)
    kd_loss(student, teacher, temperature=4.0).backward()
    q, p = (student.detach().double() / 4).softmax(1), (teacher.double() / 4).softmax(1)
    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(student.grad.double(), 4.0 * (q - p) / 7, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.457956), (2.0, 0.651232), (4.0, 0.759671)])
def test_golden_values(temperature, expected):
    student, teacher, target = golden_pair()
    assert kd_loss(student, teacher, target, temperature=temperature).item() == pytest.approx(expected, abs=6e-7)


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = make_pair(8, 100, torch.float64)
    target = torch.arange(8)
    peer = mid_level.KDLoss("s", "out", "t", "out", temperature=4.0, alpha=0.1)
    theirs = peer({"s": {"out": student}}, {"t": {"out": teacher}}, target)
    ours = 0.1 * ce_loss(student, None, target) + 0.9 * kd_loss(student, teacher)
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    student, teacher = make_pair(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, teacher, temperature=2.0), student)


@given(logit_pairs())
def test_never_negative_and_zero_at_equality(pair):
    student, teacher = pair
    assert kd_loss(student, teacher, reduction="none").ge(-1e-12).all()
    assert kd_loss(teacher, teacher, reduction="none").abs().le(1e-12).all()


@given(logit_pairs())
def test_a_shift_per_sample_and_an_order_of_classes_change_nothing(pair):
    student, teacher = pair
    expected = kd_loss(student, teacher, reduction="none")
    shifted = kd_loss(student + torch.arange(len(student))[:, None], teacher - 7.0, reduction="none")
    order = torch.arange(student.shape[1] - 1, -1, -1)
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        kd_loss(student[:, order], teacher[:, order], reduction="none"), expected, rtol=1e-9, atol=1e-9
    )


def test_reductions_module_and_empty_batch_agree():
    student, teacher = make_pair(6, 10, torch.float32)
    per_sample = kd_loss(student, teacher, reduction="none")
    assert per_sample.shape == (6,)
    torch.testing.assert_close(KDLoss()(student, teacher), per_sample.mean())
    torch.testing.assert_close(KDLoss(reduction="sum", temperature=4.0)(student, teacher), per_sample.sum())
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = kd_loss(empty, empty.detach())
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    student, teacher, target = extreme_pair(6, 9, dtype)
    loss = kd_loss(student, teacher, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher = make_pair(2, 4, torch.float32)
    teacher.requires_grad_()
    kd_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        (torch.zeros(2, 10), torch.zeros(2, 9), {}, ValueError, r"\[2, 9\].*\[2, 10\]"),
        (torch.zeros(2, 10, 3), torch.zeros(2, 10, 3), {}, ValueError, r"\[N, C\].*\[2, 10, 3\]"),
        (torch.zeros(2, 10), torch.zeros(2, 10), {"temperature": 0.0}, ValueError, "temperature.*0.0"),
        (torch.zeros(2, 10), torch.zeros(2, 10), {"reduction": "avg"}, ValueError, "'avg'"),
        (torch.zeros(2, 10).long(), torch.zeros(2, 10).long(), {}, TypeError, "int64"),
    ],
    ids=["classes differ", "not 2-D", "temperature 0", "reduction", "integers"],
)
def test_bad_input_is_named(student, teacher, options, error, says):
    with pytest.raises(error, match=says):
        kd_loss(student, teacher, **options)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"reduction": "avg"}])
def test_the_module_refuses_bad_options_when_it_is_built(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        KDLoss(**options)
