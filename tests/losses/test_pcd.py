"""PCD against a loop over the equations, gradcheck, what follows from the equations, and the mistakes people make."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pcdistill.losses.kd import kd_loss
from pcdistill.losses.lskd import StandardizedLoss, standardize_logits
from pcdistill.losses.pcd import PCDLoss, pcd_loss
from tests.helpers import golden_pair, make_pair
from tests.losses import logit_checks as checks
from tests.references.pcd import both_directions, pcd, pcd_gradient


@pytest.mark.parametrize(
    ("stages", "expected"), [*enumerate((0.038803, 0.097358, 0.169997, 0.235619, 0.338666), start=1)]
)
@pytest.mark.parametrize("directions", ["f2cl", "c2fl"])
def test_golden_values_of_one_direction(stages, expected, directions):
    student, teacher, _ = golden_pair()
    assert pcd_loss(student, teacher, stages=stages, directions=directions).item() == pytest.approx(
        expected, abs=1.1e-6
    )


@pytest.mark.parametrize(("option", "expected"), [("weighting", 2.822799), ("ranking", 0.156358)])
def test_golden_values_of_the_ablations(option, expected):
    student, teacher, _ = golden_pair()
    loss = pcd_loss(student, teacher, directions="f2cl", **{option: False})
    assert loss.item() == pytest.approx(expected, abs=1.1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "c", "stages"), [(1, 2, 1), (3, 11, 5), (2, 103, 7)])
def test_value_and_gradient_match_the_loop(dtype, n, c, stages):
    student, teacher = make_pair(n, c, dtype)
    sizes = both_directions(stages)
    expected = pcd(student.tolist(), teacher.tolist(), sizes, 2.0, dtype=torch.promote_types(dtype, torch.float32))
    loss = pcd_loss(student, teacher, temperature=2.0, stages=stages, reduction="none")
    rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 4e-6)
    torch.testing.assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)
    loss.sum().backward()
    gradient = pcd_gradient(student, teacher, sizes, 2.0)
    if dtype == torch.bfloat16:
        rtol = 1e-2
    torch.testing.assert_close(student.grad.double(), gradient, rtol=rtol, atol=atol)


def test_gradcheck():
    checks.check_gradcheck(lambda s, t, y: pcd_loss(s, t, y, temperature=2.0), 2, 7)


def test_one_stage_without_weight_is_twice_kd():
    student, teacher = make_pair(5, 9, torch.float64)
    torch.testing.assert_close(pcd_loss(student, teacher, stages=1, weighting=False), 2 * kd_loss(student, teacher))


def test_reductions_and_module_agree():
    checks.check_reductions(pcd_loss)
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(PCDLoss()(student, teacher), pcd_loss(student, teacher))


@checks.HALF
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    checks.check_finite_in_half(pcd_loss, dtype, 9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 6}, "stages must be at most C // 2 = 5 for 10 classes, got 6"),
        ({"stages": 0}, "stages must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"directions": "up"}, "directions must be 'both', 'f2cl' or 'c2fl', got 'up'"),
        ({"normalize": "all"}, "normalize must be 'none' or 'groups', got 'all'"),
        ({"reduction": "avg"}, "'avg'"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        pcd_loss(torch.zeros(2, 10), torch.zeros(2, 10), **options)


def test_fewer_than_six_classes_take_fewer_stages_unless_told():
    assert [PCDLoss(num_classes=c).stages for c in (2, 3, 4, 5, 6, 100)] == [1, 1, 2, 2, 3, 3]
    assert PCDLoss().stages == 3
    assert PCDLoss(stages=1, num_classes=100).stages == 1
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(PCDLoss(num_classes=5)(student, teacher), pcd_loss(student, teacher, stages=2))
    with pytest.raises(ValueError, match="stages must be at most C // 2 = 2 for 5 classes, got 3"):
        PCDLoss(stages=3, num_classes=5)(student, teacher)


shapes = st.tuples(st.integers(1, 4), st.integers(2, 24)).flatmap(
    lambda nc: st.tuples(st.just(nc[0]), st.just(nc[1]), st.integers(1, min(nc[1] // 2, 6)), st.integers(0, 2**31 - 1))
)


@given(shapes, st.floats(0.5, 8.0))
@settings(max_examples=40, deadline=None)
def test_the_two_directions_hold_the_same_groups(shape, temperature):
    n, c, stages, seed = shape
    student, teacher = make_pair(n, c, torch.float64, seed)

    def one(directions):
        loss = pcd_loss(student, teacher, temperature=temperature, stages=stages, directions=directions)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    (fine, fine_slope), (coarse, coarse_slope), (both, both_slope) = map(one, ("f2cl", "c2fl", "both"))
    torch.testing.assert_close(fine, coarse)
    torch.testing.assert_close(fine_slope, coarse_slope)
    torch.testing.assert_close(both, 2 * fine)
    torch.testing.assert_close(both_slope, 2 * fine_slope)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_an_order_of_classes_and_a_shift_of_either_side_change_nothing(shape):
    n, c, stages, seed = shape
    student, teacher = make_pair(n, c, torch.float64, seed)
    loss = pcd_loss(student, teacher, stages=stages)
    slope = torch.autograd.grad(loss, student)[0]
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    moved = student.detach()[:, order].requires_grad_()
    permuted = pcd_loss(moved, teacher[:, order], stages=stages)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(torch.autograd.grad(permuted, moved)[0], slope[:, order])
    # A shift of both by one number keeps the ranking; of one alone it does where there is a single group.
    torch.testing.assert_close(pcd_loss(student + 3.0, teacher + 3.0, stages=stages), loss)
    single = pcd_loss(student, teacher, stages=1)
    torch.testing.assert_close(pcd_loss(student + 3.0, teacher, stages=1), single)
    torch.testing.assert_close(
        pcd_loss(student, teacher - 5.0, stages=stages, ranking=False),
        pcd_loss(student, teacher, stages=stages, ranking=False),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_loss_and_gradient_at_equal_logits(dtype):
    student, _ = make_pair(4, 12, dtype)
    loss = pcd_loss(student, student.detach().clone())
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_groups_share_the_loss_and_both_sides_may_be_standardised():
    student, teacher = make_pair(5, 12, torch.float64)
    whole = pcd_loss(student, teacher, stages=3)
    torch.testing.assert_close(pcd_loss(student, teacher, stages=3, normalize="groups"), whole / 12)  # S (S + 1)
    one_way = pcd_loss(student, teacher, stages=3, directions="f2cl", normalize="groups")
    torch.testing.assert_close(one_way, whole / 12)
    standard = pcd_loss(standardize_logits(student), standardize_logits(teacher), stages=3)
    wrapped = StandardizedLoss(PCDLoss())
    torch.testing.assert_close(wrapped(student, teacher), standard)
    torch.testing.assert_close(wrapped(7 * student + 1, 0.5 * teacher), standard)


@pytest.mark.parametrize("loss", [pcd_loss, StandardizedLoss(PCDLoss())], ids=["plain", "standardised"])
def test_empty_batch_autocast_and_constant_teacher(loss):
    checks.check_batch(loss)


@checks.BAD_LOGITS
def test_bad_logits_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        pcd_loss(student, teacher)


def test_no_value_is_read():
    checks.check_reads_no_value(lambda s, t, y: pcd_loss(s, t, y))


@pytest.mark.parametrize("cumulative", [False, True])
def test_the_progressive_schedule_walks_fine_to_coarse_and_back(cumulative):
    student, teacher = make_pair(4, 12, torch.float64)
    module = PCDLoss(stages=3, schedule="progressive", cumulative=cumulative)
    walk = [3, 2, 1, 1, 2, 3]

    def stage(k):
        """The loss of the stage of k groups alone: what S = k adds to S = k - 1, one way."""
        upper = pcd_loss(student, teacher, stages=k, directions="f2cl")
        return upper - (pcd_loss(student, teacher, stages=k - 1, directions="f2cl") if k > 1 else 0)

    for phase, k in enumerate(walk):
        module.set_progress(progress=(phase + 0.5) / 6, epoch=0.0)
        assert module.active_stages() == (walk[: phase + 1] if cumulative else [k])
        expected = sum(map(stage, walk[: phase + 1])) if cumulative else stage(k)
        torch.testing.assert_close(module(student, teacher), expected)
    module.set_progress(progress=0.5, epoch=0.0)  # a phase with one group: refused all the same
    few = make_pair(2, 4, torch.float64)
    with pytest.raises(ValueError, match="stages must be at most C // 2 = 2 for 4 classes, got 3"):
        module(*few)


@pytest.mark.parametrize(
    "options",
    [
        {"ranking": False},
        {"weighting": False},
        {"detach_weight": True},
        {"normalize": "groups"},
        {"temperature": 2.0, "stages": 2},
        {"directions": "f2cl"},
        {"reduction": "sum"},
        {"backend": "eager"},
    ],
    ids=str,
)
def test_the_module_hands_every_option_on(options):
    student, teacher = make_pair(6, 10, torch.float64)
    ours, theirs = PCDLoss(**options)(student, teacher), pcd_loss(student, teacher, **options)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes)
    assert all(f"{name}={value!r}" in repr(PCDLoss(**options)) for name, value in options.items() if name != "backend")
