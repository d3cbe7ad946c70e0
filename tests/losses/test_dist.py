"""DIST against a loop over its equations, its golden values, torchdistill, what Pearson ignores, its special rows."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses.dist import DISTLoss, cosine_distance, dist_loss
from tests.helpers import golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.dist import parts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 5.845699),
        ({"intra_weight": 0.0}, 3.505215),
        ({"inter_weight": 0.0}, 2.340484),
        ({"temperature": 1.0}, 0.706204),
        ({"temperature": 1.0, "intra_weight": 0.0}, 0.470406),
        ({"temperature": 1.0, "inter_weight": 0.0}, 0.235798),
    ],
)
def test_golden_values(options, expected):
    student, teacher, target = golden_pair()
    assert dist_loss(student, teacher, target, **options).item() == pytest.approx(expected, abs=1e-6)


def loop(temperature):
    """The reference with weights 2 and 3, of lists."""

    def weighed(student, teacher, target):
        inter, intra = parts(student, teacher, temperature)
        return 2.0 * inter + 3.0 * intra

    return weighed


def weighed_loss(student, teacher, target, temperature=4.0):
    return dist_loss(student, teacher, target, temperature=temperature, inter_weight=2.0, intra_weight=3.0)


@checks.DTYPES
@pytest.mark.parametrize(("n", "c"), [(1, 2), (1, 7), (7, 100), (2, 1003)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_matches_loop(dtype, n, c, temperature):
    checks.check_scalar(lambda s, t, y: weighed_loss(s, t, y, temperature), loop(temperature), n, c, dtype)


@checks.GRAD_DTYPES
def test_gradient_matches_loop(dtype):
    checks.check_scalar_gradient(weighed_loss, loop(4.0), 5, 11, dtype)


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    for temperature in (1.0, 4.0):
        student, teacher = make_pair(8, 10, torch.float64)
        peer = mid_level.DISTLoss("s", "out", "t", "out", beta=1.5, gamma=0.5, tau=temperature)
        theirs = peer({"s": {"out": student}}, {"t": {"out": teacher}})
        ours = dist_loss(student, teacher, temperature=temperature, inter_weight=1.5, intra_weight=0.5)
        # It bounds each norm by eps where the paper's code adds eps to their product: 1e-8 against norms of about 0.1.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: dist_loss(s, t, y, temperature=2.0))


@given(logit_pairs(scale=5.0))
def test_bounded_and_blind_to_shifts_and_to_the_order_of_classes_and_of_samples(pair):
    student, teacher = pair
    expected = dist_loss(student, teacher, inter_weight=2.0)
    assert -1e-9 <= expected <= 2 * 16 * 3.0 + 1e-9
    shifted = dist_loss(student + torch.arange(len(student))[:, None], teacher - 7.0, inter_weight=2.0)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-4)  # rounding moves rows that hardly vary
    torch.testing.assert_close(dist_loss(student.flip(1), teacher.flip(1), inter_weight=2.0), expected)
    torch.testing.assert_close(dist_loss(student.flip(0), teacher.flip(0), inter_weight=2.0), expected)


def test_zero_at_equality_and_blind_to_a_linear_map_of_the_probabilities():
    _, teacher = make_pair(6, 10, torch.float64)
    teacher = teacher / 3
    assert dist_loss(teacher, teacher, eps=1e-30).abs() < 1e-12
    mixed = (0.3 * teacher.softmax(1) + 0.07).log()  # rows sum to 1 again
    assert dist_loss(mixed, teacher, temperature=1.0, eps=1e-30).abs() < 1e-12
    assert dist_loss(teacher.roll(1, 1), teacher) > 1


def test_close_to_equality_nothing_cancels_in_float32():
    student, teacher = make_pair(6, 10, torch.float64)
    student = teacher + 1e-4 * student
    exact = dist_loss(student, teacher)
    single = dist_loss(student.float(), teacher.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0)


def test_what_does_not_vary_counts_as_uncorrelated_and_gets_no_gradient():
    _, teacher = make_pair(4, 5, torch.float32)
    student = torch.full((4, 5), 0.1, requires_grad=True)  # an output layer that starts at zero
    loss = dist_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 16.0)
    assert student.grad.eq(0).all()


def test_one_sample_has_a_constant_intra_part():
    student, teacher = make_pair(1, 5, torch.float32)
    intra = dist_loss(student, teacher, inter_weight=0.0)
    intra.backward()
    assert intra.item() == pytest.approx(16.0)
    assert student.grad.eq(0).all()
    assert dist_loss(student, teacher, intra_weight=0.0) < 2 * 16.0


def test_two_classes_correlate_fully_or_not():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert dist_loss(student, 3 * student, intra_weight=0.0).abs() < 1e-5
    assert dist_loss(student, -student, intra_weight=0.0).item() == pytest.approx(2 * 16.0)


def test_cosine_distance_is_one_minus_the_cosine():
    a, b = make_pair(5, 4, torch.float64)
    expected = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 0.5)
    torch.testing.assert_close(cosine_distance(a, b, eps=0.5), expected)
    assert cosine_distance(torch.zeros(1, 3), torch.ones(1, 3), eps=1e-8) == 1


def test_module_is_the_function():
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(DISTLoss()(student, teacher), dist_loss(student, teacher))
    options = {"temperature": 2.0, "inter_weight": 3.0, "intra_weight": 0.5, "eps": 1e-2}
    torch.testing.assert_close(DISTLoss(**options)(student, teacher), dist_loss(student, teacher, **options))


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c):
    checks.check_finite_in_half(dist_loss, dtype, c)


def test_empty_batch_autocast_and_constant_teacher():
    checks.check_batch(dist_loss)
    checks.check_reads_no_value(dist_loss)


Z = torch.zeros(2, 10)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        dist_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"inter_weight": -1.0}, "inter_weight must be a finite number >= 0, got -1.0"),
        ({"intra_weight": -2.0}, "intra_weight must be a finite number >= 0, got -2.0"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        dist_loss(Z, Z, **options)
    with pytest.raises(ValueError, match=says):
        DISTLoss(**options)
