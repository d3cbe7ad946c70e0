"""SDD against loops over cells and over its three bases, the golden values of a single cell, and cells of a map."""

import math

import pytest
import torch
from hypothesis import given
from torch import nn

from pcdistill.losses._features import Features
from pcdistill.losses.base import Needs
from pcdistill.losses.dkd import dkd_loss
from pcdistill.losses.kd import kd_loss
from pcdistill.losses.nkd import nkd_loss
from pcdistill.losses.sdd import SDDLoss, scale_cells, sdd_loss
from tests.helpers import GRAD, VALUE, extreme_pair, golden_pair, logit_pairs
from tests.losses import logit_checks as checks
from tests.references import sdd as references

BASES = pytest.mark.parametrize("base", ["kd", "dkd", "nkd"])
SIZES = pytest.mark.parametrize(("n", "c", "m"), [(1, 2, 1), (3, 10, 5), (2, 40, 21)])
OPTIONS = {
    "kd": {"temperature": 4.0},
    "dkd": {"temperature": 4.0, "target_weight": 1.0, "non_target_weight": 8.0},
    "nkd": {"temperature": 3.0, "target_weight": 1.0, "non_target_weight": 3.5},
}


def make_cells(n: int, c: int, m: int, dtype: torch.dtype):
    """Student (a leaf), teacher and target; a mix of cells that agree with the whole and that contradict it."""
    student, teacher, target = checks.random_input(n * m, c, dtype)
    student = student.detach().view(n, m, c).transpose(1, 2).contiguous().requires_grad_()
    return student, teacher.view(n, m, c).transpose(1, 2).contiguous(), target[::m].clone()


def features(feature_map, classifier) -> Features:
    pooled = feature_map.mean(dim=(2, 3))
    return Features(
        maps=[feature_map], pre_activations=None, pooled=pooled, logits=classifier(pooled), classifier=classifier
    )


def make_features(n: int = 4, c: int = 10, size: int = 4):
    torch.manual_seed(0)
    student = features(torch.randn(n, 6, size, size, requires_grad=True), nn.Linear(6, c))
    teacher = features(torch.randn(n, 9, size, size), nn.Linear(9, c).requires_grad_(False))
    return student, teacher, checks.labels(n, c)


@checks.DTYPES
@SIZES
@BASES
@pytest.mark.parametrize("conflict", [2.0, 0.5])
def test_value_matches_loop(dtype, n, c, m, base, conflict):
    student, teacher, target = make_cells(n, c, m, dtype)
    options = OPTIONS[base]
    actual = sdd_loss(student, teacher, target, base=base, conflict_weight=conflict, reduction="none", **options)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = references.sdd(student.tolist(), teacher.tolist(), target.tolist(), base, options, conflict)
    rtol, atol = VALUE[dtype]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


@checks.GRAD_DTYPES
@SIZES
@BASES
def test_gradient_matches_closed_form(dtype, n, c, m, base):
    student, teacher, target = make_cells(n, c, m, dtype)
    sdd_loss(student, teacher, target, base=base, reduction="sum", **OPTIONS[base]).backward()
    rows = references.sdd_gradient(student.tolist(), teacher.tolist(), target.tolist(), base, OPTIONS[base])
    rtol, atol = GRAD[dtype]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(student.grad.double(), expected, rtol=rtol, atol=10 * atol)


@BASES
def test_gradcheck_through_the_cells(base):
    student, teacher, target = make_cells(2, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda z: sdd_loss(z, teacher, target, base=base), student)
    torch.manual_seed(0)
    feature_map = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    fc = nn.Linear(3, 5).double()
    teacher = scale_cells(torch.randn(2, 3, 4, 4, dtype=torch.float64), fc).detach()
    assert torch.autograd.gradcheck(lambda x: sdd_loss(scale_cells(x, fc), teacher, target, base=base), feature_map)


def test_golden_values_of_a_single_cell():
    student, teacher, target = golden_pair()
    one = (student[:, :, None], teacher[:, :, None], target)
    assert float(sdd_loss(*one)) == pytest.approx(0.759671, abs=1e-6)
    assert float(sdd_loss(*one, base="dkd", non_target_weight=0.0)) == pytest.approx(0.123122, abs=1e-6)
    assert float(sdd_loss(*one, base="dkd", target_weight=0.0, non_target_weight=1.0)) == pytest.approx(
        0.731093, abs=1e-6
    )
    assert float(sdd_loss(*one, base="nkd")) == pytest.approx(3.155611, abs=1e-6)


@pytest.mark.parametrize(("base", "loss"), [("kd", kd_loss), ("dkd", dkd_loss), ("nkd", nkd_loss)])
def test_a_single_cell_is_the_base_with_its_own_defaults(base, loss):
    student, teacher, target = golden_pair()
    actual = sdd_loss(student[:, :, None], teacher[:, :, None], target, base=base, reduction="none")
    torch.testing.assert_close(actual, loss(student, teacher, target, reduction="none"))


def test_cells_that_contradict_the_whole_weigh_more():
    # teacher's best class in the three cells; the label is 0, so that only cell 2 contradicts cell 0
    teacher = torch.eye(3)[[0, 0, 1]].T[None].mul(5.0)
    student = torch.zeros(1, 3, 3)
    each = kd_loss(torch.zeros(3, 3), torch.eye(3)[[0, 0, 1]] * 5.0, reduction="none")
    expected = (each[0] + each[1] + 2 * each[2]) / 3
    torch.testing.assert_close(sdd_loss(student, teacher, torch.tensor([0])), expected)
    # with label 1 the whole is wrong, so that again only cell 2, which is right, contradicts it
    torch.testing.assert_close(sdd_loss(student, teacher, torch.tensor([1])), expected)
    # with label 2 all are wrong
    torch.testing.assert_close(sdd_loss(student, teacher, torch.tensor([2])), each.mean())


@given(logit_pairs())
def test_equal_cells_are_worth_one_and_an_order_of_the_others_changes_nothing(pair):
    student, teacher = pair
    target = torch.arange(len(teacher)) % teacher.shape[1]
    value = sdd_loss(student[:, :, None].expand(-1, -1, 5), teacher[:, :, None].expand(-1, -1, 5), target)
    torch.testing.assert_close(value, kd_loss(student, teacher))
    cells = torch.stack([student, teacher, -student], dim=2), torch.stack([teacher, student, -student], dim=2)
    turned = [x[:, :, [0, 2, 1]] for x in cells]
    torch.testing.assert_close(sdd_loss(*turned, target), sdd_loss(*cells, target))
    assert sdd_loss(*cells, target) >= -1e-10
    assert sdd_loss(cells[1], cells[1], target).abs() <= 1e-10


@checks.HALF
@BASES
@pytest.mark.parametrize("c", [2, 10])
def test_loss_and_gradient_are_finite_in_half_precision(dtype, base, c):
    student, teacher, target = extreme_pair(12, c, dtype)
    student = student.detach().view(4, 3, c).transpose(1, 2).contiguous().requires_grad_()
    value = sdd_loss(student, teacher.view(4, 3, c).transpose(1, 2), target[:4], base=base)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4)])
def test_cells_match_a_loop_over_their_places(scales):
    torch.manual_seed(1)
    feature_map, fc = torch.randn(2, 3, 4, 8, dtype=torch.float64), nn.Linear(3, 5).double()
    expected = [references.cells(x, fc.weight.tolist(), fc.bias.tolist(), scales) for x in feature_map.tolist()]
    actual = scale_cells(feature_map, fc, scales)
    assert actual.shape == (2, 5, sum(s * s for s in scales))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_cells_of_an_uneven_map_start_with_the_networks_own_output():
    torch.manual_seed(1)
    feature_map, fc = torch.randn(2, 3, 7, 7), nn.Linear(3, 5)
    cells = scale_cells(feature_map, fc, (1, 2, 4))
    assert cells.shape == (2, 5, 21)
    torch.testing.assert_close(cells[:, :, 0], fc(feature_map.mean(dim=(2, 3))))


def test_cells_accept_a_classifier_of_vectors_only():
    fc = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # BatchNorm1d would take [N, M, C] for [N, C, L]
    assert scale_cells(torch.randn(2, 3, 4, 4), fc).shape == (2, 4, 5)


@BASES
def test_module_is_cells_and_function(base):
    student, teacher, target = make_features()
    module = SDDLoss(scales=(1, 2, 4), base=base)
    actual = module(student, teacher, target)
    expected = sdd_loss(
        scale_cells(student.maps[-1], student.classifier, (1, 2, 4)),
        scale_cells(teacher.maps[-1], teacher.classifier, (1, 2, 4)),
        target,
        base=base,
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    actual.backward()
    assert student.maps[-1].grad.abs().sum() > 0
    assert student.classifier.weight.grad.abs().sum() > 0
    assert teacher.classifier.weight.grad is None
    assert not list(module.parameters())
    assert not module.state_dict()
    assert module.needs == Needs(labels=True, soft_labels=False)


def test_module_passes_its_options_on():
    student, teacher, target = make_features()
    options = {
        "base": "dkd",
        "temperature": 2.0,
        "target_weight": 0.5,
        "non_target_weight": 3.0,
        "conflict_weight": 5.0,
        "reduction": "sum",
    }
    module = SDDLoss(**options)
    cells = [scale_cells(x.maps[-1], x.classifier) for x in (student, teacher)]
    torch.testing.assert_close(module(student, teacher, target), sdd_loss(*cells, target, **options), rtol=0, atol=0)
    assert "base='dkd'" in repr(module)


def test_the_last_of_several_maps_is_read():
    student, teacher, target = make_features()
    several = student._replace(maps=[torch.randn(4, 2, 8, 8), student.maps[-1]])
    torch.testing.assert_close(SDDLoss()(several, teacher, target), SDDLoss()(student, teacher, target))


def test_maps_of_different_size_compare():
    student, _, target = make_features(size=4)
    _, teacher, _ = make_features(size=8)
    assert SDDLoss(scales=(1, 2, 4))(student, teacher, target).isfinite()


def test_reductions_empty_batch_and_constant_teacher():
    def on_two_cells(student, teacher, target, **options):
        both = [torch.stack([x, -x], dim=2) for x in (student, teacher)]
        return sdd_loss(*both, target, **options)

    checks.check_reductions(on_two_cells)
    checks.check_batch(on_two_cells)
    checks.check_reads_no_value(on_two_cells)
    assert SDDLoss()(*make_features(n=0)) == 0


def test_autocast_changes_only_the_classifiers_precision():
    student, teacher, target = make_features()
    outside = SDDLoss()(student, teacher, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SDDLoss()(student, teacher, target)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.01)


def test_agrees_with_torchdistill_in_each_cell():
    # torchdistill has no SDD; in each cell SD-KD is a KD, which torchdistill has
    student, teacher, _ = golden_pair()
    cells = torch.stack([student, teacher.roll(1, 1)], dim=2), torch.stack([teacher, student], dim=2)
    each = [checks.torchdistill_kd(cells[0][:, :, m], cells[1][:, :, m], 4.0) for m in range(2)]
    actual = sdd_loss(*cells, torch.zeros(4).long(), conflict_weight=1.0)
    torch.testing.assert_close(actual, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-5)


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="hard labels"):
        sdd_loss(torch.zeros(2, 10, 5), torch.zeros(2, 10, 5), torch.full((2, 10), 0.1))


@pytest.mark.parametrize(
    ("student", "teacher", "error", "says"),
    [
        (torch.zeros(2, 10, 5), torch.zeros(2, 10, 21), ValueError, r"\[2, 10, 21\].*\[2, 10, 5\].*same scales"),
        (torch.zeros(2, 10), torch.zeros(2, 10), ValueError, r"\[N, C, M\].*\[2, 10\]"),
        (torch.zeros(2, 1, 5), torch.zeros(2, 1, 5), ValueError, r"C >= 2.*\[2, 1, 5\]"),
        (torch.zeros(2, 10, 0), torch.zeros(2, 10, 0), ValueError, r"M >= 1.*\[2, 10, 0\]"),
        (torch.zeros(2, 10, 5).long(), torch.zeros(2, 10, 5).long(), TypeError, "int64"),
        (torch.zeros(2, 10, 5), torch.zeros(2, 10, 5, device="meta"), ValueError, "meta"),
    ],
    ids=["scales differ", "not 3-D", "one class", "no cells", "integers", "devices differ"],
)
def test_bad_cells_are_named(student, teacher, error, says):
    with pytest.raises(error, match=says):
        sdd_loss(student, teacher, torch.zeros(2).long())


@checks.BAD_TARGETS
def test_bad_targets_are_named(target, says):
    with pytest.raises(ValueError, match=says):
        sdd_loss(torch.zeros(2, 10, 5), torch.zeros(2, 10, 5), target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": "pcd"}, "base must be one of 'kd', 'dkd', 'nkd', got 'pcd'"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"target_weight": 1.0}, 'target_weight must be left out for base "kd"'),
        ({"non_target_weight": 1.0}, "non_target_weight must be left out"),
        ({"base": "dkd", "non_target_weight": -1.0}, "non_target_weight.*-1"),
        ({"conflict_weight": math.nan}, "conflict_weight.*nan"),
        ({"reduction": "avg"}, "'avg'"),
    ],
    ids=str,
)
def test_bad_options_are_named_by_function_and_module(options, says):
    with pytest.raises(ValueError, match=says):
        sdd_loss(torch.zeros(2, 10, 5), torch.zeros(2, 10, 5), torch.zeros(2).long(), **options)
    with pytest.raises(ValueError, match=says):
        SDDLoss(**options)


@pytest.mark.parametrize("scales", [(), (2,), (1, 1), (1, 4, 2), (1, 2.0), (True, 2)], ids=str)
def test_bad_scales_are_named(scales):
    with pytest.raises(ValueError, match="scales must be rising whole numbers from 1 on"):
        scale_cells(torch.zeros(2, 3, 4, 4), nn.Linear(3, 5), scales)
    with pytest.raises(ValueError, match="scales must be rising whole numbers from 1 on"):
        SDDLoss(scales=scales)


def test_bad_maps_are_named():
    with pytest.raises(ValueError, match=r"not be finer than the feature map, 2 x 8, got \[1, 2, 4\]; leave"):
        scale_cells(torch.zeros(2, 3, 2, 8), nn.Linear(3, 5), (1, 2, 4))
    with pytest.raises(ValueError, match=r"feature_map must be \[N, D, H, W\], got \[2, 3\]"):
        scale_cells(torch.zeros(2, 3), nn.Linear(3, 5))
    student, teacher, target = make_features()
    with pytest.raises(ValueError, match="the student must show its classifier"):
        SDDLoss()(student._replace(classifier=None), teacher, target)
    with pytest.raises(ValueError, match=r"the teacher's last map.*\[N, 9, H, W\], got \[4, 5, 4, 4\]"):
        SDDLoss()(student, teacher._replace(maps=[torch.zeros(4, 5, 4, 4)]), target)
    with pytest.raises(ValueError, match="the teacher's classifier must give its 10 logits, got 12"):
        SDDLoss()(student, teacher._replace(classifier=nn.Linear(9, 12)), target)
