"""MLKD against loops over its equations, its golden values, KD as its special case, the masks, and common mistakes."""

import pytest
import torch
from hypothesis import given

from pcdistill.losses._views import confidence_masks
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.lskd import StandardizedLoss, lskd_loss
from pcdistill.losses.mlkd import MLKDLoss, MLKDNoAugLoss, mlkd_loss
from tests.helpers import golden_pair, logit_pairs, make_pair
from tests.losses import logit_checks as checks
from tests.references.mlkd import mlkd

INSTANCE = {"instance_weight": 1.0, "batch_weight": 0.0, "class_weight": 0.0}
BATCH = {"instance_weight": 0.0, "batch_weight": 1.0, "class_weight": 0.0}
CLASS = {"instance_weight": 0.0, "batch_weight": 0.0, "class_weight": 1.0}
ONE = {"views": 1, "masks": False, "temperatures": (4.0,)}


@pytest.mark.parametrize(("weights", "expected"), [(INSTANCE, 0.759671), (BATCH, 0.000475), (CLASS, 0.000564)])
def test_golden_values_of_each_level(weights, expected):
    student, teacher, target = golden_pair()
    assert mlkd_loss(student, teacher, target, **weights, **ONE).item() == pytest.approx(expected, abs=6e-7)


WEIGHTS = {"instance_weight": 0.5, "batch_weight": 2.0, "class_weight": 3.0}
FORMS = [{}, {"masks": False}, {"released": True}, {"views": 1}, {"views": 1, "released": True}]


def loop(student, teacher, temperatures, form):
    form = {"masked" if name == "masks" else name: value for name, value in form.items()}
    return mlkd(student, teacher, temperatures, weights=(0.5, 2.0, 3.0), **form)


@checks.DTYPES
@pytest.mark.parametrize(("n", "c"), [(2, 2), (10, 13), (14, 5)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_value_matches_loop(dtype, n, c, form):
    checks.check_scalar(
        lambda s, t, y: mlkd_loss(s, t, y, **WEIGHTS, **form),
        lambda s, t, y: loop(s, t, [4.0, 2.0, 3.0, 5.0, 6.0], form),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_matches_loop(dtype, form):
    checks.check_scalar_gradient(
        lambda s, t, y: mlkd_loss(s, t, y, temperatures=(3.0, 1.0), **WEIGHTS, **form),
        lambda s, t, y: loop(s, t, [3.0, 1.0], form),
        6,
        7,
        dtype,
    )


@pytest.mark.parametrize("form", [*FORMS, {"standardize_instance": True}], ids=str)
def test_gradcheck(form):
    checks.check_gradcheck(lambda s, t, y: mlkd_loss(s, t, y, temperatures=(2.0,), **form), 6, 5)


def test_one_view_without_masks_and_grams_is_kd_summed_over_the_temperatures():
    student, teacher = make_pair(6, 9, torch.float64)
    expected = sum(kd_loss(student, teacher, temperature=t) for t in (4.0, 2.0, 3.0, 5.0, 6.0))
    torch.testing.assert_close(mlkd_loss(student, teacher, views=1, masks=False, **INSTANCE), expected)
    mean = mlkd_loss(student, teacher, views=1, masks=False, average=True, **INSTANCE)
    torch.testing.assert_close(mean, expected / 5)


@given(logit_pairs(scale=5.0))
def test_never_negative_zero_at_equality_and_blind_to_shifts_and_orders(pair):
    student, teacher = (x.round(decimals=2) for x in pair)
    expected = mlkd_loss(student, teacher, views=1, masks=False)
    assert expected >= -1e-12
    assert mlkd_loss(teacher, teacher, views=1, masks=False).abs() <= 1e-12
    shifted = mlkd_loss(student + torch.arange(len(student))[:, None], teacher - 7.0, views=1, masks=False)
    torch.testing.assert_close(shifted, expected)
    for dim in (0, 1):
        flipped = mlkd_loss(student.flip(dim), teacher.flip(dim), views=1, masks=False)
        torch.testing.assert_close(flipped, expected)


def test_masks_keep_the_doubtful_half():
    teacher = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    samples, classes = confidence_masks(teacher)
    assert samples.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert classes.tolist() == [0.0, 1.0, 1.0]
    assert confidence_masks(torch.zeros(3, 4))[0].tolist() == [1.0] * 3  # all alike: all are at most the median


def test_a_masked_sample_gets_no_gradient_from_the_weak_view_unless_the_masks_are_the_released_ones():
    student, teacher = make_pair(8, 5, torch.float64)
    sure = confidence_masks(teacher[:4])[0] == 0
    assert sure.sum() == 2
    mlkd_loss(student, teacher, **INSTANCE).backward()
    assert student.grad[:4][sure].eq(0).all()
    assert student.grad[:4][~sure].ne(0).all()
    assert student.grad[4:].ne(0).all()  # the strong view is not masked
    student.grad = None
    mlkd_loss(student, teacher, released=True, **INSTANCE).backward()
    assert student.grad.ne(0).all()


def test_the_gram_terms_look_at_the_weak_view_only():
    student, teacher = make_pair(8, 5, torch.float64)
    mlkd_loss(student, teacher, instance_weight=0.0).backward()
    assert student.grad[4:].eq(0).all()
    assert student.grad[:4].ne(0).any()


def test_logit_standardization_is_inside_the_kl_only():
    student, teacher = make_pair(6, 9, torch.float64)
    options = {"views": 1, "masks": False, "temperatures": (2.0, 3.0)}
    instance = mlkd_loss(student, teacher, standardize_instance=True, **INSTANCE, **options)
    expected = sum(lskd_loss(student, teacher, temperature=t) for t in (2.0, 3.0))
    torch.testing.assert_close(instance, expected)
    for weights in (BATCH, CLASS):
        torch.testing.assert_close(
            mlkd_loss(student, teacher, standardize_instance=True, **weights, **options),
            mlkd_loss(student, teacher, **weights, **options),
        )


def test_module_is_the_function():
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(MLKDLoss()(student, teacher), mlkd_loss(student, teacher))
    torch.testing.assert_close(MLKDNoAugLoss()(student, teacher), mlkd_loss(student, teacher, views=1))
    options = {"temperatures": [3.0, 1.0], **WEIGHTS, "average": True, "standardize_instance": True}
    for extra in ({"released": True}, {"masks": False}, {"views": 1}):
        expected = mlkd_loss(student, teacher, **options, **extra)
        torch.testing.assert_close(MLKDLoss(**options, **extra)(student, teacher), expected)
    for extra in ({"released": True}, {"masks": False}):
        expected = mlkd_loss(student, teacher, views=1, **options, **extra)
        torch.testing.assert_close(MLKDNoAugLoss(**options, **extra)(student, teacher), expected)


def test_the_module_says_how_many_views_it_compares():
    assert MLKDLoss().needs.views == 2
    assert MLKDLoss(views=1).needs.views == 1
    assert MLKDNoAugLoss().needs.views == 1
    assert StandardizedLoss(MLKDLoss()).needs.views == 2


@checks.HALF
@pytest.mark.parametrize("c", [2, 9])
@pytest.mark.parametrize("form", [*FORMS, {"standardize_instance": True}], ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype, c, form):
    checks.check_finite_in_half(lambda s, t, y: mlkd_loss(s, t, y, **form), dtype, c)


@pytest.mark.parametrize("views", [1, 2])
def test_empty_batch_autocast_and_constant_teacher(views):
    checks.check_batch(lambda s, t, y: mlkd_loss(s, t, y, views=views))
    checks.check_reads_no_value(lambda s, t, y: mlkd_loss(s, t, y, views=views))


Z = torch.zeros(2, 10)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        mlkd_loss(student, teacher)


def test_an_odd_number_of_rows_is_no_two_views():
    with pytest.raises(ValueError, match=r"\[2 N, C\].*got \[3, 10\]"):
        mlkd_loss(torch.zeros(3, 10), torch.zeros(3, 10))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperatures": (4.0, 0.0)}, r"temperatures\[1\] must be .* got 0.0"),
        ({"temperatures": ()}, r"temperatures must be a list of at least one number, got \(\)"),
        ({"temperatures": 4.0}, r"temperatures must be a list of at least one number, got 4.0"),
        ({"views": 3}, "views must be 1 or 2, got 3"),
        ({"instance_weight": -1.0}, "instance_weight must be a finite number >= 0, got -1.0"),
        ({"batch_weight": -2.0}, "batch_weight must be a finite number >= 0, got -2.0"),
        ({"class_weight": -3.0}, "class_weight must be a finite number >= 0, got -3.0"),
    ],
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        mlkd_loss(Z, Z, **options)
    with pytest.raises(ValueError, match=says):
        MLKDLoss(**options)
