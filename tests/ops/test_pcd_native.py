"""The C kernel around its numbers (those: test_pcd_backends.py): how it is found, compiled, kept and done without."""

import subprocess
import sys

import pytest
import torch

from pcdistill.losses.pcd import pcd_loss
from pcdistill.ops import pcd_native
from tests.helpers import make_pair
from tests.ops.cases import Case, check, stages
from tests.ops.test_pcd_backends import COMPILER

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler")


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A machine on which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pcd_native._find.cache_clear()
    yield tmp_path / "pcdistill"
    pcd_native._find.cache_clear()


def value_and_gradient(student, teacher, backend):
    loss = pcd_loss(student, teacher, backend=backend, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


@needs_compiler
def test_compiled_once_and_kept(anew, monkeypatch):
    student, teacher = make_pair(3, 12, torch.float32)
    pcd_loss(student, teacher, backend="native")
    (library,) = anew.iterdir()
    assert library.suffix == ".so"
    pcd_native._find.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # nothing is to be compiled again
    pcd_loss(student, teacher, backend="native")


def test_without_a_compiler(anew, monkeypatch, tmp_path):
    student, teacher = make_pair(3, 12, torch.float32)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r'backend "native" needs a C compiler .* none is on the PATH; use backend="auto"'
    ):
        pcd_loss(student, teacher, backend="native")
    torch.testing.assert_close(pcd_loss(student, teacher), pcd_loss(student, teacher, backend="eager"), rtol=0, atol=0)


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch, tmp_path):
    student, teacher = make_pair(3, 12, torch.float32)
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('no such option: -O3')")
    monkeypatch.setenv("CC", f"{sys.executable} {broken}")
    with pytest.raises(ValueError, match="could not be compiled by .*: no such option: -O3"):
        pcd_loss(student, teacher, backend="native")
    assert list(anew.iterdir()) == []  # nothing half made is left


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(anew):
    student, teacher = make_pair(3, 12, torch.float32)
    anew.write_text("a file where the folder should be")
    expected = pcd_loss(student, teacher, backend="reference")
    torch.testing.assert_close(pcd_loss(student, teacher, backend="native"), expected)


def test_other_logits_are_refused():
    student, teacher = make_pair(3, 12, torch.float64)
    with pytest.raises(ValueError, match="computes in float32, got torch.float64"):
        pcd_loss(student, teacher, backend="native")
    with pytest.raises(ValueError, match="needs logits on the CPU, got meta"):
        pcd_loss(student.to("meta"), teacher.to("meta"), backend="native")


@needs_compiler
def test_a_row_depends_neither_on_the_others_nor_on_threads():
    student, teacher = make_pair(21, 50, torch.float32)  # 21: two blocks of eight rows and a part of one
    whole = value_and_gradient(student, teacher, "native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for actual, expected in zip(value_and_gradient(student, teacher, "native"), whole, strict=True):
                assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(before)
    for row in (0, 9, 20):
        one = student[row : row + 1].detach().requires_grad_(), teacher[row : row + 1]
        for actual, expected in zip(value_and_gradient(*one, "native"), whole, strict=True):
            assert torch.equal(actual[0], expected[row])


@needs_compiler
def test_threads_that_would_need_too_much_scratch_are_not_used(monkeypatch):
    student, teacher = make_pair(24, 50, torch.float32)
    expected = value_and_gradient(student, teacher, "native")
    taken = []
    empty = torch.empty

    def counted(*size, **options):
        taken.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(pcd_native, "SCRATCH", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for actual, wanted in zip(value_and_gradient(student, teacher, "native"), expected, strict=True):
        assert torch.equal(actual, wanted)
    ((least,),) = taken
    monkeypatch.setattr(pcd_native, "SCRATCH", 3 * least)
    value_and_gradient(student, teacher, "native")
    assert taken[1][0] == 3 * (least - 64) + 64


@needs_compiler
@pytest.mark.parametrize("weighting", [True, False])
def test_zero_at_equality(weighting):
    _, teacher = make_pair(9, 40, torch.float32)
    student = teacher.clone().requires_grad_()
    loss = pcd_loss(student, teacher, weighting=weighting, backend="native")
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


@needs_compiler
def test_logits_far_apart_are_left_to_numpy():
    student, teacher = make_pair(9, 40, torch.float32)
    near = value_and_gradient(student, teacher, "native")
    far = student.detach().clone()
    far[4, 0] = 2 * 24 * 4.0 + far[4].min() + 20
    far.requires_grad_()
    for actual, expected in zip(
        value_and_gradient(far, teacher, "native"), value_and_gradient(far, teacher, "eager"), strict=True
    ):
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, near[0] if actual.dim() == 1 else near[1])


@needs_compiler
def test_logits_far_apart_in_very_many_stages_are_left_to_the_reference(monkeypatch):
    """NumPy's way needs tables of stages x groups x segments: gigabytes for 500 stages of 1000 classes."""
    monkeypatch.setattr(pcd_native.pcd_cpu, "loss_and_gradient", None)
    check("native", Case("spread", 2, 64, stages(32), 4.0))
    check("native", Case("spread", 2, 64, stages(32), 4.0, {"detach_weight": True}))


@needs_compiler
@pytest.mark.parametrize("spread", [1e-3, 50.0])
def test_one_class_far_from_all_others(spread):
    """Almost all differences fall into the last bin."""
    student, teacher = (spread * x.detach() for x in make_pair(5, 200, torch.float32))
    student[:, 7] = teacher[:, 7] + 60.0
    student.requires_grad_()
    teacher = teacher.clamp(-80, 80)
    for actual, expected in zip(
        value_and_gradient(student, teacher, "native"), value_and_gradient(student, teacher, "reference"), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
