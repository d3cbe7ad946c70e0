"""PLD against a loop over its choices, its golden values, what makes it cross-entropy, and where it is least."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pcdistill.losses.base import Needs
from pcdistill.losses.pld import PLDLoss, pld_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import pld as references

# The loop over 1003 classes takes the square of their number.
SIZES = pytest.mark.parametrize(("n", "c"), [(1, 2), (7, 100), pytest.param(2, 1003, marks=pytest.mark.slow)])


@checks.DTYPES
@SIZES
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_value(
        lambda s, t, y: pld_loss(s, t, y, temperature=temperature, reduction="none"),
        lambda s, t, y: references.pld(s, t, y, temperature),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@SIZES
def test_gradient_matches_closed_form(dtype, n, c):
    checks.check_gradient(
        lambda s, t, y: pld_loss(s, t, y, reduction="none"),
        lambda s, t, y: references.pld_gradient(s, t, y, 1.0),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: pld_loss(s, t, y, temperature=2.0))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.477690), (4.0, 1.280986)])
def test_golden_values(temperature, expected):
    student, teacher, target = golden_pair()
    assert float(pld_loss(student, teacher, target, temperature=temperature)) == pytest.approx(expected, abs=6e-7)


def test_torchs_cross_entropy_of_every_choice_agrees():
    # torchdistill has no PLD; a choice among the classes left over is a cross-entropy, which torch has
    student, teacher, target = checks.random_input(5, 12, torch.float64)
    left = torch.arange(12).repeat(5, 1)
    taken = torch.zeros(5, 12, dtype=torch.bool)
    expected = torch.zeros(5, dtype=torch.float64)
    for place in range(12):
        chosen = target if place == 0 else teacher.masked_fill(taken, -torch.inf).argmax(1)
        weight = teacher.softmax(1).gather(1, chosen[:, None])[:, 0]
        choice = F.cross_entropy(student.masked_fill(taken, -torch.inf), chosen, reduction="none")
        expected = expected + weight * choice
        taken = taken | (left == chosen[:, None])
    torch.testing.assert_close(pld_loss(student, teacher, target, reduction="none"), expected)


def test_a_teacher_sure_of_the_label_makes_it_cross_entropy():
    student, teacher, target = checks.random_input(6, 10, torch.float64)
    sure = teacher.scatter(1, target[:, None], 1e4)
    torch.testing.assert_close(pld_loss(student, sure, target), F.cross_entropy(student, target))


def test_a_teacher_without_a_preference_weighs_every_place_alike():
    student, _, target = checks.random_input(6, 10, torch.float64)
    flat = torch.zeros_like(student)
    ranked = torch.stack(
        [torch.cat([s[y, None], s[torch.arange(10) != y]]) for s, y in zip(student, target, strict=True)]
    )
    log_left = torch.stack([ranked[:, k:].logsumexp(1) for k in range(10)], dim=1)
    expected = (log_left - ranked).sum(1).mean() / 10  # equal logits rank by class index
    torch.testing.assert_close(pld_loss(student, flat, target), expected)


def test_two_classes_leave_the_labels_cross_entropy_under_the_teachers_weight():
    student, teacher, target = checks.random_input(6, 2, torch.float64)
    weight = teacher.softmax(1).gather(1, target[:, None])[:, 0]
    expected = weight * F.cross_entropy(student, target, reduction="none")
    torch.testing.assert_close(pld_loss(student, teacher, target, reduction="none"), expected)


def test_the_label_comes_first_although_the_teacher_ranks_it_last():
    teacher = torch.tensor([[3.0, 2.0, 1.0, -9.0]])
    student = torch.zeros(1, 4, requires_grad=True)
    pld_loss(student, teacher, torch.tensor([3]), temperature=1.0).backward()
    ranked_last = torch.zeros(1, 4, requires_grad=True)
    pld_loss(ranked_last, teacher, torch.tensor([0]), temperature=1.0).backward()
    # Among the other classes nothing changes but that class 3 is gone before they are chosen.
    assert student.grad[0, 3] < 0 < ranked_last.grad[0, 3] + 1e-9
    assert student.grad[0, 0] < student.grad[0, 1] < student.grad[0, 2]


@given(logit_pairs())
def test_never_negative_and_blind_to_shifts_and_to_the_order_of_classes(pair):
    student, teacher = pair
    n, c = teacher.shape
    # Ties rank by class index: the teacher's logits are made different, their order left as it is.
    teacher = teacher.argsort(dim=1).argsort(dim=1) + 0.01 * teacher.round(decimals=3)
    target = torch.arange(n) % c
    value = pld_loss(student, teacher, target, reduction="none")
    assert value.ge(-1e-10).all()
    shifted = pld_loss(student + torch.arange(n)[:, None], teacher - 7.0, target, reduction="none")
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-9)
    flipped = pld_loss(student.flip(1), teacher.flip(1), c - 1 - target, reduction="none")
    torch.testing.assert_close(flipped, value, rtol=1e-9, atol=1e-9)


@given(logit_pairs(), st.floats(0, 1))
def test_convex_in_the_students_logits(pair, share):
    one, other = pair
    teacher = (one - other).roll(1, dims=1)
    target = torch.arange(len(one)) % one.shape[1]
    between = pld_loss(share * one + (1 - share) * other, teacher, target, reduction="none")
    chord = share * pld_loss(one, teacher, target, reduction="none") + (1 - share) * pld_loss(
        other, teacher, target, reduction="none"
    )
    assert (between <= chord + 1e-9).all()


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(pld_loss, dtype, c)


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(pld_loss)
    checks.check_batch(pld_loss)
    checks.check_reads_no_value(pld_loss)


def test_module_equals_function_and_says_its_needs():
    student, teacher, target = checks.random_input(4, 10, torch.float64)
    torch.testing.assert_close(PLDLoss()(student, teacher, target), pld_loss(student, teacher, target), rtol=0, atol=0)
    module = PLDLoss(temperature=2.0, reduction="sum")
    expected = pld_loss(student, teacher, target, temperature=2.0, reduction="sum")
    torch.testing.assert_close(module(student, teacher, target), expected, rtol=0, atol=0)
    assert module.needs == Needs(labels=True, soft_labels=False, replaces_labels=True)
    assert "temperature=2" in repr(module)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        pld_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.full((2, 10), 0.1))


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        pld_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        pld_loss(torch.zeros(2, 10), torch.zeros(2, 10), target)


@pytest.mark.parametrize(
    ("options", "says"), [({"temperature": 0.0}, "^temperature.*0.0"), ({"reduction": "avg"}, "'avg'")], ids=str
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        pld_loss(torch.zeros(2, 10), torch.zeros(2, 10), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        PLDLoss(**options)
