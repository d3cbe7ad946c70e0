"""Attention transfer against a loop over the equation, gradcheck, properties, a peer, and the mistakes people make."""

import pytest
import torch

from pcdistill.losses.at import ATLoss, at_loss
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_counts,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
)
from tests.references.at import at


@DTYPES
@pytest.mark.parametrize("p", [1, 2, 3])
def test_value_and_gradient_match_the_loop(dtype, p):
    students = [randn(3, 2, 4, 3), randn(3, 3, 2, 2, seed=1)]
    teachers = [randn(3, 4, 4, 3, seed=2), randn(3, 1, 2, 2, seed=3)]
    check_against_loop(
        lambda s, t: at_loss(s, t, p=p, reduction="none"), lambda s, t: at(s, t, p), students, teachers, dtype
    )


@pytest.mark.parametrize(("student_size", "teacher_size"), [((6, 4), (3, 4)), ((2, 3), (5, 3)), ((4, 2), (2, 4))])
def test_the_larger_map_is_pooled(student_size, teacher_size):
    students, teachers = [randn(2, 2, *student_size)], [randn(2, 3, *teacher_size, seed=1)]
    check_against_loop(
        lambda s, t: at_loss(s, t, reduction="none"), lambda s, t: at(s, t, 2), students, teachers, torch.float64
    )


def test_torchdistill_agrees():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    students, teachers = [randn(4, 3, 5, 5), randn(4, 6, 2, 2)], [randn(4, 7, 5, 5, seed=1), randn(4, 2, 2, 2, seed=1)]
    pairs = {
        f"pair{i}": {who: {"io": "output", "path": f"layer{i}"} for who in ("student", "teacher")} for i in range(2)
    }
    peer = mid_level.ATLoss(pairs, mode="code")
    theirs = peer(*({f"layer{i}": {"output": x} for i, x in enumerate(maps)} for maps in (students, teachers)))
    torch.testing.assert_close(at_loss(students, teachers), theirs)


def test_gradcheck():
    teachers = [randn(2, 3, 2, 2, seed=1)]
    for p in (2, 3):
        assert torch.autograd.gradcheck(lambda x, p=p: at_loss([x], teachers, p=p), randn(2, 2, 2, 2).requires_grad_())


def test_properties():
    student, teacher = randn(4, 3, 2, 2), randn(4, 5, 2, 2, seed=1)
    value = at_loss([student], [teacher], reduction="none")
    assert value.gt(0).all()
    assert at_loss([teacher], [teacher]) == 0
    torch.testing.assert_close(at_loss([-7 * student], [0.2 * teacher], reduction="none"), value)  # scale and sign
    torch.testing.assert_close(at_loss([student.flip(1)], [teacher.flip(1)], reduction="none"), value)  # channels
    torch.testing.assert_close(at_loss([student.flip(0)], [teacher.flip(0)], reduction="none"), value.flip(0))
    torch.testing.assert_close(at_loss([student.flip(2)], [teacher.flip(2)], reduction="none"), value)  # mirrored both
    torch.testing.assert_close(at_loss([student] * 3, [teacher] * 3, reduction="none"), 3 * value)  # a sum over stages


def test_reductions():
    students, teachers = [randn(4, 3, 2, 2)], [randn(4, 5, 2, 2, seed=1)]
    value = at_loss(students, teachers, reduction="none")
    torch.testing.assert_close(at_loss(students, teachers), value.mean())
    torch.testing.assert_close(at_loss(students, teachers, reduction="sum"), value.sum())


def test_a_dead_map_has_no_attention_and_no_gradient():
    student, teacher = torch.zeros(2, 3, 2, 2, requires_grad=True), [randn(2, 3, 2, 2).float()]
    value = at_loss([student], teacher)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(1 / 4))
    assert student.grad.eq(0).all()


def test_module_is_the_function_over_all_stages():
    student, teacher = make_features(seed=1), make_features(widths=(5, 6, 8), sizes=(16, 8, 4), seed=2)
    torch.testing.assert_close(ATLoss(student, teacher)(student, teacher), at_loss(student.maps, teacher.maps))
    torch.testing.assert_close(
        ATLoss(student, teacher, p=3)(student, teacher), at_loss(student.maps, teacher.maps, p=3)
    )
    assert "p=3" in repr(ATLoss(student, teacher, p=3))


def test_the_module_keeps_the_rules():
    check_module(ATLoss)
    check_module(ATLoss, sizes=(4, 2, 1))
    check_counts(ATLoss)


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(ATLoss, dtype)


@pytest.mark.parametrize(
    ("students", "teachers", "options", "error", "says"),
    [
        ([torch.zeros(2, 3, 4, 4)], [], {}, ValueError, "one length > 0, got 1 and 0"),
        ([], [], {}, ValueError, "got 0 and 0"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], {}, ValueError, r"got \[2, 3\]"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(3, 3, 1, 1)], {}, ValueError, "one N"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1).long()], {}, TypeError, "int64"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1)], {"p": 0}, ValueError, "p must be .* > 0, got 0"),
        ([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 3, 1, 1)], {"reduction": "avg"}, ValueError, "'avg'"),
    ],
)
def test_bad_input_is_named(students, teachers, options, error, says):
    with pytest.raises(error, match=says):
        at_loss(students, teachers, **options)


def test_the_module_refuses_a_bad_exponent_when_it_is_built():
    with pytest.raises(ValueError, match="p must be"):
        ATLoss(make_features(), make_features(), p=-1)
