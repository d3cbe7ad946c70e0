"""Logit standardisation against a loop, its golden values, its special rows, and the wrapper around any loss."""

import pytest
import torch
from hypothesis import given
from torch import nn

from pcdistill.losses.base import Needs
from pcdistill.losses.ce import CELoss, ce_loss
from pcdistill.losses.kd import KDLoss
from pcdistill.losses.lskd import LSKDLoss, StandardizedLoss, lskd_loss, standardize_logits
from tests.helpers import VALUE, golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.lskd import lskd, standardize


@pytest.mark.parametrize(("unbiased", "expected"), [(True, 0.158644), (False, 0.176891)])
def test_golden_values(unbiased, expected):
    student, teacher, target = golden_pair()
    assert lskd_loss(student, teacher, target, unbiased=unbiased).item() == pytest.approx(expected, abs=6e-7)


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("unbiased", [True, False])
def test_value_matches_loop(dtype, n, c, unbiased):
    checks.check_value(
        lambda s, t, y: lskd_loss(s, t, y, unbiased=unbiased, reduction="none"),
        lambda s, t, y: lskd(s, t, 2.0, int(unbiased)),
        n,
        c,
        dtype,
    )


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("unbiased", [True, False])
def test_standardised_logits_match_the_loop(dtype, n, c, unbiased):
    student, _ = make_pair(n, c, dtype)
    expected = torch.tensor(standardize(student.tolist(), int(unbiased)), dtype=torch.float64)
    rtol, atol = VALUE[dtype]
    actual = standardize_logits(student, unbiased=unbiased)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = make_pair(8, 100, torch.float64)
    target = torch.arange(8)
    peer = mid_level.LogitStdKDLoss("s", "out", "t", "out", temperature=2.0, alpha=0.1)
    theirs = peer({"s": {"out": student}}, {"t": {"out": teacher}}, target)
    ours = 0.1 * ce_loss(student, None, target) + 0.9 * lskd_loss(student, teacher)
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    checks.check_gradcheck(lskd_loss)


@given(logit_pairs())
def test_scale_and_shift_of_either_side_change_nothing(pair):
    student, teacher = (x.round(decimals=3) for x in pair)  # a spread of 1e-7 meets the epsilon of the definition
    expected = lskd_loss(student, teacher, reduction="none")
    actual = lskd_loss(3.0 * student + 1.0, 0.5 * teacher - 4.0, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_constant_row_gives_zeros_and_no_gradient():
    student = torch.full((2, 5), 0.1, requires_grad=True)
    teacher = torch.arange(10.0).reshape(2, 5)
    lskd_loss(student, teacher).backward()
    assert standardize_logits(student).eq(0).all()
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_that_float32_cannot_hold_do_no_harm(scale):
    z = scale * torch.tensor([[-1.0, 0.0, 1.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0]]) * (0 if scale < 1 else 1)  # below the epsilon a row counts as flat
    torch.testing.assert_close(standardize_logits(z), expected)


@checks.HALF
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    checks.check_finite_in_half(lskd_loss, dtype, 9)  # two classes are +-1 once standardised: no gradient


def test_reductions_module_and_wrapper_agree():
    checks.check_reductions(lskd_loss)
    student, teacher = make_pair(6, 10, torch.float32)
    own = lskd_loss(student, teacher)
    torch.testing.assert_close(LSKDLoss()(student, teacher), own)
    torch.testing.assert_close(
        LSKDLoss(reduction="sum")(student, teacher), lskd_loss(student, teacher, reduction="sum")
    )
    torch.testing.assert_close(StandardizedLoss(KDLoss(temperature=2.0))(student, teacher), own)
    paper = lskd_loss(student, teacher, temperature=3.0, unbiased=False)
    torch.testing.assert_close(LSKDLoss(temperature=3.0, unbiased=False)(student, teacher), paper)
    torch.testing.assert_close(StandardizedLoss(KDLoss(temperature=3.0), unbiased=False)(student, teacher), paper)


@pytest.mark.parametrize("loss", [lskd_loss, StandardizedLoss(KDLoss())], ids=["function", "wrapper"])
def test_empty_batch_autocast_and_constant_teacher(loss):
    checks.check_batch(loss)
    checks.check_reads_no_value(loss)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    for loss in (lskd_loss, StandardizedLoss(KDLoss())):
        with pytest.raises(error, match=says):
            loss(student, teacher)


class Recorder(nn.Module):
    needs = Needs(labels=True, soft_labels=False, views=2)

    def forward(self, student_logits, teacher_logits, target=None):
        self.seen = (student_logits, teacher_logits, target)
        return student_logits.sum()

    def set_progress(self, *, progress, epoch):
        self.told = (progress, epoch)


def test_the_wrapper_passes_everything_on():
    student, teacher = make_pair(3, 4, torch.float32)
    target = torch.tensor([0, 1, 2])
    wrapped = StandardizedLoss(Recorder())
    wrapped(student, teacher, target)
    wrapped.set_progress(progress=0.25, epoch=3.0)
    torch.testing.assert_close(wrapped.loss.seen[0], standardize_logits(student))
    torch.testing.assert_close(wrapped.loss.seen[1], standardize_logits(teacher))
    assert wrapped.loss.seen[2] is target
    assert wrapped.loss.told == (0.25, 3.0)
    assert wrapped.needs == Recorder.needs
    plain = StandardizedLoss(CELoss())
    plain.set_progress(progress=0.5, epoch=1.0)  # a loss without a schedule is left alone
    assert plain.needs == CELoss.needs


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"reduction": "avg"}])
def test_bad_options_are_named(options):
    says = str(next(iter(options.values())))
    with pytest.raises(ValueError, match=says):
        lskd_loss(torch.zeros(2, 4), torch.zeros(2, 4), **options)
    with pytest.raises(ValueError, match=says):
        LSKDLoss(**options)
