"""Label revision against loops over its two kinds of sample, the golden value, and each kind alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.revision import RevisionLoss, revision_loss
from tests.helpers import GRAD, VALUE, golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import revision as references


@checks.DTYPES
@checks.SIZES
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_value_matches_loop(dtype, n, c, share):
    checks.check_value(
        lambda s, t, y: revision_loss(s, t, y, teacher_share=share)[None],
        lambda s, t, y: [references.revision(s, t, y, share=share)],
        n,
        c,
        dtype,
    )


@checks.DTYPES
def test_value_matches_loop_for_other_weights(dtype):
    checks.check_value(
        lambda s, t, y: revision_loss(s, t, y, ce_weight=0.3, logit_weight=0.1, revised_weight=9.0)[None],
        lambda s, t, y: [references.revision(s, t, y, 0.3, 0.1, 9.0)],
        7,
        10,
        dtype,
    )


@checks.GRAD_DTYPES
@checks.SIZES
def test_gradient_matches_closed_form(dtype, n, c):
    student, teacher, target = checks.random_input(n, c, dtype)
    revision_loss(student, teacher, target, revised_weight=50.0).backward()
    rows = references.revision_gradient(student.tolist(), teacher.tolist(), target.tolist(), revised=50.0)
    rtol, atol = GRAD[dtype]
    torch.testing.assert_close(
        student.grad.double(), torch.tensor(rows, dtype=torch.float64), rtol=rtol, atol=10 * atol
    )


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: revision_loss(s, t, y, revised_weight=20.0))


def test_golden_value():
    student, teacher, target = golden_pair()
    assert float(revision_loss(student, teacher, target)) == pytest.approx(12.240609, abs=1e-6)


def test_where_the_teacher_is_right_it_is_cross_entropy_and_squared_logit_error():
    student, teacher, _ = checks.random_input(6, 10, torch.float64)
    target = teacher.argmax(dim=1)
    expected = F.cross_entropy(student, target) + 4 * F.mse_loss(student, teacher)
    torch.testing.assert_close(revision_loss(student, teacher, target), expected)
    without = revision_loss(student, teacher, target, ce_weight=0.0)
    torch.testing.assert_close(without, 4 * F.mse_loss(student, teacher))


def test_where_the_teacher_is_wrong_there_is_no_cross_entropy_and_no_logit_error():
    student, teacher, _ = checks.random_input(6, 10, torch.float64)
    target = teacher.argmin(dim=1)
    expected = revision_loss(student, teacher, target, ce_weight=0.0, logit_weight=0.0)
    assert expected > 0
    torch.testing.assert_close(revision_loss(student, teacher, target), expected, rtol=0, atol=0)


def test_each_kind_is_averaged_over_its_own_samples():
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    right = teacher.argmax(dim=1) == target
    assert 0 < right.sum() < 6
    apart = revision_loss(student[right], teacher[right], target[right]) + revision_loss(
        student[~right], teacher[~right], target[~right]
    )
    torch.testing.assert_close(revision_loss(student, teacher, target), apart)


def test_the_revised_label_is_a_distribution_with_the_true_class_on_top():
    for row, y in zip(golden_pair()[1].tolist(), [0, 1, 2, 3], strict=True):
        label = references.revised_label(row, y, 0.8)
        assert sum(label) == pytest.approx(1.0)
        assert min(label) >= 0
        assert max(label) == label[y]


def test_a_label_that_ties_for_the_top_counts_as_right():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[4.0, 1.0, 4.0]])
    for label in (0, 2):
        target = torch.tensor([label])
        expected = F.cross_entropy(student, target) + 4 * F.mse_loss(student, teacher)
        torch.testing.assert_close(revision_loss(student, teacher, target), expected)


@given(logit_pairs())
def test_never_negative_zero_at_its_goal_and_blind_to_an_order_of_classes(pair):
    student, teacher = pair
    target = torch.arange(len(teacher)) % teacher.shape[1]
    value = revision_loss(student, teacher, target)
    assert value >= 0
    at_goal = revision_loss(teacher, teacher, teacher.argmax(dim=1), ce_weight=0.0)
    assert at_goal == 0
    order = torch.arange(student.shape[1] - 1, -1, -1)
    torch.testing.assert_close(revision_loss(student[:, order], teacher[:, order], order[target]), value)


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(revision_loss, dtype, c)
    checks.check_finite_in_half(lambda s, t, _: revision_loss(s, t, t.argmax(dim=1)), dtype, c)


def test_the_value_in_half_precision_is_that_of_the_rounded_logits():
    student, teacher, target = checks.random_input(5, 10, torch.float16)
    expected = references.revision(student.tolist(), teacher.tolist(), target.tolist())
    rtol, atol = VALUE[torch.float32]
    assert float(revision_loss(student.detach(), teacher, target)) == pytest.approx(expected, rel=rtol, abs=atol)


def test_empty_batch_constant_teacher_and_no_value_read_back():
    checks.check_batch(revision_loss)
    checks.check_reads_no_value(revision_loss)


def test_module_equals_function():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(
        RevisionLoss()(student, teacher, target), revision_loss(student, teacher, target), rtol=0, atol=0
    )
    options = {"ce_weight": 0.5, "logit_weight": 2.0, "revised_weight": 3.0, "teacher_share": 0.6}
    module = RevisionLoss(**options)
    expected = revision_loss(student, teacher, target, **options)
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)
    assert module.needs == Needs(labels=True, soft_labels=False)
    assert "teacher_share=0.6" in repr(module)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        revision_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.full((2, 10), 0.1))


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        revision_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        revision_loss(torch.zeros(2, 10), torch.zeros(2, 10), target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ce_weight": -1.0}, "ce_weight.*-1"),
        ({"logit_weight": float("nan")}, "logit_weight.*nan"),
        ({"revised_weight": -1.0}, "revised_weight.*-1"),
        ({"teacher_share": 1.1}, "teacher_share must be from 0 to 1, got 1.1"),
        ({"teacher_share": -0.1}, "teacher_share.*-0.1"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        revision_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        RevisionLoss(**options)
