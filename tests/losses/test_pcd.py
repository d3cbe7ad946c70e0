"""PCD against a loop over the equations, gradcheck, what follows from the equations, and the mistakes people make."""

import pytest
import torch

from pcdistill.losses.kd import kd_loss
from pcdistill.losses.pcd import PCDLoss, pcd_loss
from tests.helpers import extreme_pair, golden_pair, make_pair
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
    student, teacher = make_pair(2, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda z: pcd_loss(z, teacher, temperature=2.0), student)


def test_one_stage_without_weight_is_twice_kd():
    student, teacher = make_pair(5, 9, torch.float64)
    torch.testing.assert_close(pcd_loss(student, teacher, stages=1, weighting=False), 2 * kd_loss(student, teacher))


def test_module_is_the_function_and_an_empty_batch_is_zero():
    student, teacher = make_pair(6, 10, torch.float32)
    torch.testing.assert_close(PCDLoss()(student, teacher), pcd_loss(student, teacher))
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = pcd_loss(empty, empty.detach())
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_half_precision_logits_give_a_finite_loss_and_gradient(dtype):
    student, teacher, target = extreme_pair(6, 9, dtype)
    loss = pcd_loss(student, teacher, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


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
