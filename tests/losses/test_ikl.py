"""IKL-KD against the double sum over pairs, its golden values, what it makes of KL, and its memory of the classes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from pcdistill.losses.base import Needs
from pcdistill.losses.ikl import IKLLoss, ikl_loss
from pcdistill.losses.kd import kd_loss
from tests.helpers import golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import ikl as references
from tests.references.scalars import softmax

SIZES = pytest.mark.parametrize(("n", "c"), [(1, 2), (5, 30), (2, 101)])


def rows(n, c):
    """Weights [n, c] that sum to 1, from nearly even to nearly one-hot."""
    generator = torch.Generator().manual_seed(3)
    sharpness = torch.linspace(0.1, 6.0, n, dtype=torch.float64)[:, None]
    return (sharpness * torch.randn(n, c, generator=generator, dtype=torch.float64)).softmax(1)


@checks.DTYPES
@SIZES
@pytest.mark.parametrize(("pair_weight", "ce_weight", "t"), [(1.0, 0.0, 4.0), (0.0, 1.0, 1.0), (8.0, 2.0, 4.0)])
def test_value_matches_loop(dtype, n, c, pair_weight, ce_weight, t):
    options = {"pair_weight": pair_weight, "cross_entropy_weight": ce_weight, "temperature": t, "reduction": "none"}
    checks.check_value(
        lambda s, t, y: ikl_loss(s, t, y, weights=rows(n, c), **options),
        lambda s, t_, y: references.ikl(s, t_, rows(n, c).tolist(), pair_weight=pair_weight, ce_weight=ce_weight, t=t),
        n,
        c,
        dtype,
    )


@checks.GRAD_DTYPES
@SIZES
def test_gradient_matches_closed_form(dtype, n, c):
    checks.check_gradient(
        lambda s, t, y: ikl_loss(s, t, y, weights=rows(n, c), cross_entropy_weight=2.0, reduction="none"),
        lambda s, t, y: references.ikl_gradient(s, t, rows(n, c).tolist(), pair_weight=8.0, ce_weight=2.0, t=4.0),
        n,
        c,
        dtype,
    )


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: ikl_loss(s, t, y, weights=rows(3, 9)))
    checks.check_gradcheck(ikl_loss)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pair_weight": 1.0, "cross_entropy_weight": 0.0}, 0.705488),
        ({"pair_weight": 0.0}, 2.223511),
        ({"pair_weight": 1.0, "cross_entropy_weight": 0.0, "weight_temperature": 1.0}, 0.273916),
    ],
)
def test_golden_values_of_each_part(options, expected):
    student, teacher, target = golden_pair()
    assert float(ikl_loss(student, teacher, target, **options)) == pytest.approx(expected, abs=6e-7)


def test_the_soft_part_is_torchs_cross_entropy_and_kd_but_for_the_entropy():
    # torchdistill has no IKL; torch's cross-entropy takes probabilities
    student, teacher, _ = checks.random_input(6, 10, torch.float64)
    soft = ikl_loss(student, teacher, pair_weight=0.0)
    torch.testing.assert_close(soft, F.cross_entropy(student / 4, (teacher / 4).softmax(1)))
    at_equality = ikl_loss(teacher, teacher, pair_weight=0.0)
    torch.testing.assert_close(soft - at_equality, kd_loss(student, teacher) / 16)


def test_pairs_of_one_sample_weighted_by_its_own_probabilities_have_the_teachers_gradient_of_kl():
    # The theorem behind it: d KL(p || q) / d z_t is that of the pair part, its weights held constant.
    student, teacher, _ = checks.random_input(4, 9, torch.float64)
    student = student.detach()
    teacher.requires_grad_()
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), teacher)
    weights = teacher.detach().softmax(1)
    student.requires_grad_()
    pairs = ikl_loss(student, teacher, weights=weights, pair_weight=1.0, cross_entropy_weight=0.0, reduction="sum")
    (to_student,) = torch.autograd.grad(pairs, student)
    # The pairs are even in z_t - z_s: their gradient to z_s is the opposite of that to z_t.
    torch.testing.assert_close(-to_student, expected)


@given(logit_pairs())
def test_pairs_are_zero_at_equality_never_negative_and_blind_to_shifts_and_class_order(pair):
    student, teacher = pair
    n = len(student)
    options = {"cross_entropy_weight": 0.0, "reduction": "none"}
    value = ikl_loss(student, teacher, **options)
    assert value.ge(0).all()
    assert ikl_loss(teacher, teacher, **options).eq(0).all()
    shifted = ikl_loss(student + torch.arange(n)[:, None], teacher - 7.0, reduction="none")
    torch.testing.assert_close(shifted, ikl_loss(student, teacher, reduction="none"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ikl_loss(student.flip(1), teacher.flip(1), **options), value, rtol=1e-9, atol=1e-9)


def test_nothing_cancels_close_to_equality_in_float32():
    _, teacher, _ = checks.random_input(4, 9, torch.float64)
    student = teacher + 1e-3 * torch.arange(9)
    close = ikl_loss(student.float(), teacher.float() + 100, pair_weight=1.0, cross_entropy_weight=0.0)
    exact = ikl_loss(student, teacher, pair_weight=1.0, cross_entropy_weight=0.0)
    torch.testing.assert_close(close.double(), exact, rtol=2e-2, atol=0)


@checks.HALF
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, c):
    checks.check_finite_in_half(ikl_loss, dtype, c)
    checks.check_finite_in_half(IKLLoss(num_classes=c), dtype, c)


def test_weights_are_constants():
    student, teacher, _ = checks.random_input(3, 9, torch.float64)
    weights = rows(3, 9).requires_grad_()
    ikl_loss(student, teacher, weights=weights).backward()
    assert weights.grad is None


def test_reductions_empty_batch_and_constant_teacher():
    checks.check_reductions(ikl_loss)
    checks.check_batch(ikl_loss)
    checks.check_batch(IKLLoss(num_classes=10).eval())
    checks.check_batch(IKLLoss(num_classes=10, class_wise=False))
    checks.check_reads_no_value(IKLLoss(num_classes=10).to("meta"))


def test_the_memory_is_the_mean_of_every_class_over_all_batches():
    loss = IKLLoss(num_classes=6, weight_temperature=2.0).double()
    seen_teacher, seen_target = [], []
    for seed in range(4):
        student, teacher, target = checks.random_input(5, 6, torch.float64, seed)
        target = target.clamp(max=4)  # class 5 stays unseen
        seen_teacher += teacher.tolist()
        seen_target += target.tolist()
        value = loss(student, teacher, target)
        means = references.class_means(seen_teacher, seen_target, 2.0)
        weights = [means[y] for y in target.tolist()]
        expected = references.ikl(student.tolist(), teacher.tolist(), weights, pair_weight=8.0, ce_weight=1.0, t=4.0)
        assert value.item() == pytest.approx(sum(expected) / 5, rel=1e-11)
    for y, mean in means.items():
        torch.testing.assert_close(loss.class_probabilities[y], torch.tensor(mean, dtype=torch.float64))
    assert loss.class_counts.tolist() == [float(seen_target.count(y)) for y in range(6)]
    assert loss.class_counts[5] == 0


def test_in_eval_mode_nothing_is_remembered_and_an_unseen_class_takes_the_samples_own():
    loss = IKLLoss(num_classes=6).double().eval()
    student, teacher, target = checks.random_input(5, 6, torch.float64)
    torch.testing.assert_close(loss(student, teacher, target), ikl_loss(student, teacher))
    assert loss.class_counts.eq(0).all()
    loss.train()(student, teacher, target)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(student, teacher.flip(0), target)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_resumed_training_goes_on_with_the_same_bits():
    whole, first = IKLLoss(num_classes=6), IKLLoss(num_classes=6)
    for seed in range(3):
        batch = checks.random_input(5, 6, torch.float32, seed)
        whole(*batch)
        first(*batch)
    second = IKLLoss(num_classes=6)
    second.load_state_dict(first.state_dict())
    batch = checks.random_input(5, 6, torch.float32, 9)
    assert torch.equal(second(*batch), whole(*batch))
    assert torch.equal(second.class_probabilities, whole.class_probabilities)


def test_the_order_of_samples_and_their_split_into_batches_leave_the_memory_as_it_is():
    student, teacher, target = checks.random_input(8, 6, torch.float64)
    at_once, in_parts = IKLLoss(num_classes=6).double(), IKLLoss(num_classes=6).double()
    at_once(student, teacher, target)
    for part in (slice(5, 8), slice(0, 2), slice(2, 5)):
        in_parts(student[part], teacher[part], target[part])
    torch.testing.assert_close(in_parts.class_probabilities, at_once.class_probabilities)


def one_of_two(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    loss = IKLLoss(num_classes=6).double()
    for seed in range(2):
        student, teacher, target = checks.random_input(5, 6, torch.float64, seed)
        mine = slice(0, 3) if rank == 0 else slice(3, 5)
        loss(student[mine], teacher[mine], target[mine])
    torch.save(loss.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_memory_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    one = IKLLoss(num_classes=6).double()
    for seed in range(2):
        one(*checks.random_input(5, 6, torch.float64, seed))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


def test_without_classes_the_weights_are_the_samples_own():
    student, teacher, target = checks.random_input(5, 6, torch.float64)
    loss = IKLLoss(num_classes=6, class_wise=False, weight_temperature=2.0)
    torch.testing.assert_close(loss(student, teacher), ikl_loss(student, teacher, weight_temperature=2.0))
    weights = [softmax(z, 2.0) for z in teacher.tolist()]
    expected = references.ikl(student.tolist(), teacher.tolist(), weights, pair_weight=8.0, ce_weight=1.0, t=4.0)
    assert loss(student, teacher, target).item() == pytest.approx(sum(expected) / 5, rel=1e-11)
    assert not loss.state_dict()


def test_module_passes_its_options_on_and_says_its_needs():
    student, teacher, target = checks.random_input(4, 6, torch.float64)
    options = {"pair_weight": 2.0, "cross_entropy_weight": 3.0, "temperature": 2.0, "reduction": "sum"}
    module = IKLLoss(num_classes=6, **options).double()
    actual = module(student, teacher, target)
    weights = module.class_probabilities[target]
    torch.testing.assert_close(actual, ikl_loss(student, teacher, weights=weights, **options), rtol=0, atol=0)
    assert module.needs == Needs(labels=True, soft_labels=False)
    assert IKLLoss(num_classes=6, class_wise=False).needs == Needs()
    assert "pair_weight=2" in repr(module)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        ikl_loss(student, teacher)
    with pytest.raises(error, match=says):
        IKLLoss(num_classes=10)(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        IKLLoss(num_classes=10)(torch.zeros(2, 10), torch.zeros(2, 10), target)


def test_soft_labels_other_columns_and_other_weights_are_refused():
    z = torch.zeros(2, 10)
    with pytest.raises(ValueError, match="hard labels"):
        IKLLoss(num_classes=10)(z, z, torch.full((2, 10), 0.1))
    with pytest.raises(ValueError, match=r"10 columns|9 columns.*\[2, 10\]"):
        IKLLoss(num_classes=9)(z, z, torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"weights must be \[2, 10\].*\[10, 10\]"):
        ikl_loss(z, z, weights=torch.zeros(10, 10))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pair_weight": -1.0}, "^pair_weight.*-1"),
        ({"cross_entropy_weight": float("inf")}, "^cross_entropy_weight.*inf"),
        ({"temperature": 0.0}, "^temperature.*0.0"),
        ({"weight_temperature": -2.0}, "^weight_temperature.*-2"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        ikl_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)
    with pytest.raises(ValueError, match=says):
        IKLLoss(num_classes=10, **options)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
        IKLLoss(num_classes=1)
