"""All backends of PCD against float64, group by group: drawn and hard inputs, and what differs between backends."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pcdistill.losses.pcd import PCDLoss, pcd_loss
from pcdistill.ops import pcd_triton
from pcdistill.ops.pcd import choose_backend, pcd
from pcdistill.ops.pcd_eager import Options, loss_and_gradient, pcd_eager
from pcdistill.ops.segments import refinement, stage_edges, summed_groups
from tests.helpers import make_pair
from tests.ops.cases import DEFAULTS, HARD, KINDS, OPTIONS, Case, check, expected, logits, stages


def name(value):
    return f"{value.kind}-{value.c}-{len(value.sizes)}" if isinstance(value, Case) else None


@pytest.mark.slow
@pytest.mark.parametrize("case", HARD, ids=name)
def test_hard_inputs(case):
    check("eager", case)


@pytest.mark.parametrize("case", HARD, ids=name)
def test_hard_inputs_differentiated_as_a_whole(case):
    """The form that torch.compile traces, and that a second derivative goes through."""
    compute = torch.promote_types(case.dtype, torch.float32)
    student, teacher = (x.to(case.dtype).to(compute) for x in logits(case.kind, case.n, case.c))
    student.requires_grad_()
    options = Options(case.temperature, **(DEFAULTS | case.options))
    loss = pcd_eager(student, teacher, case.sizes, options)
    value, gradient = loss_and_gradient(student, teacher, case.sizes, options)
    torch.testing.assert_close(loss, value)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    assert (slope - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_input(data):
    c = data.draw(st.one_of(st.integers(2, 80), st.integers(81, 1000)), "classes")
    # Any stages, not only 1 to S: a progressive schedule sums one of them, or the first few.
    sizes = data.draw(st.lists(st.integers(1, c // 2), min_size=1, max_size=6), "groups of the stages")
    case = Case(
        data.draw(st.sampled_from(KINDS), "kind"),
        data.draw(st.integers(2, 5), "samples"),
        c,
        tuple(sizes),
        data.draw(st.sampled_from([0.5, 1.0, 4.0, 20.0]), "temperature"),
        data.draw(st.sampled_from(OPTIONS), "options"),
        data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), "dtype"),
    )
    seed = data.draw(st.integers(0, 1000), "seed")
    check("eager", case, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_options_on_all_kinds_of_logits(kind, options):
    check("eager", Case(kind, 3, 41, stages(4), 2.0, options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_one_size_and_of_two_agree(kind, dtype):
    """12 classes in 4 groups need no empty places, 13 in 4 do: every stage alone, against a slice for every group."""
    for c in (12, 13):
        for size in (1, 2, 3, 4, 5, 6):
            check("eager", Case(kind, 3, c, (size,), 2.0, {}, dtype))


def in_the_interpreter(*arguments):
    """What the cases print in a process where Triton interprets."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_parity", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_triton_in_its_interpreter():
    assert "cases agree" in in_the_interpreter()


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)  # a detached weight's gradient is not that of the value
def test_gradcheck_once_and_twice(options):
    student, teacher = make_pair(2, 9, torch.float64)

    def loss(z):
        return pcd_loss(z, teacher, temperature=2.0, stages=4, backend="eager", **options)

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_detached_weight_by_hand():
    student, teacher = make_pair(3, 12, torch.float64)
    (detached,) = torch.autograd.grad(pcd_loss(student, teacher, detach_weight=True, reduction="sum"), student)
    (whole,) = torch.autograd.grad(pcd_loss(student, teacher, reduction="sum"), student)
    _, truth = expected(student.detach(), teacher, stages(3), 4.0, DEFAULTS | {"detach_weight": True})
    torch.testing.assert_close(detached, truth)
    assert not torch.allclose(detached, whole)


def test_a_second_derivative_is_the_one_of_the_loss_differentiated_twice():
    student, teacher = make_pair(3, 12, torch.float32)
    seconds = []
    for loss in (
        pcd_loss(student, teacher, reduction="sum"),
        pcd_eager(student, teacher, stages(3), Options(4.0, **DEFAULTS)).sum(),
    ):
        (first,) = torch.autograd.grad(loss, student, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), student)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("s", [3, 10, 32])
def test_memory_does_not_grow_with_the_number_of_stages(s):
    """What autograd keeps until the backward pass: student, teacher and gradient."""
    student, teacher = make_pair(4, 64, torch.float32)
    rows = pcd(student, teacher, stages(s), temperature=4.0, **DEFAULTS)
    saved = [x.numel() for x in rows.grad_fn.saved_tensors]
    assert sum(saved) == 3 * student.numel()


def test_a_row_depends_neither_on_the_others_nor_on_threads():
    student, teacher = make_pair(21, 50, torch.float32)

    def value_and_gradient(student, teacher):
        loss = pcd_loss(student, teacher, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]

    whole = value_and_gradient(student, teacher)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for actual, wanted in zip(value_and_gradient(student, teacher), whole, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)
    finally:
        torch.set_num_threads(before)
    for row in (0, 9, 20):
        one = student[row : row + 1].detach().requires_grad_(), teacher[row : row + 1]
        for actual, wanted in zip(value_and_gradient(*one), whole, strict=True):
            torch.testing.assert_close(actual[0], wanted[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", [True, False])
def test_zero_at_equality(weighting):
    _, teacher = make_pair(9, 40, torch.float32)
    student = teacher.clone().requires_grad_()
    loss = pcd_loss(student, teacher, weighting=weighting)
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


@pytest.mark.parametrize("spread", [1e-3, 50.0])
def test_one_class_far_from_all_others(spread):
    student, teacher = (spread * x.detach() for x in make_pair(5, 200, torch.float32))
    student[:, 7] = teacher[:, 7] + 60.0
    teacher = teacher.clamp(-80, 80)
    value, gradient = expected(student, teacher, stages(3), 4.0, DEFAULTS)
    student.requires_grad_()
    loss = pcd_loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-4, atol=1e-4)
    (actual,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(actual.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("c", [20, 300])
def test_autocast_and_coarse_matrix_products_change_nothing(c):
    student, teacher = make_pair(4, c, torch.float32)
    wanted = pcd_loss(student, teacher, stages=5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            actual = pcd_loss(student, teacher, stages=5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, wanted)


def test_values_alone_and_then_a_gradient():
    """Validation under inference mode comes first, and leaves nothing behind that a training step cannot use."""
    student, teacher = make_pair(3, 37, torch.float32)
    with torch.inference_mode():
        value = pcd_loss(student, teacher, stages=4)
    with torch.no_grad():
        assert torch.equal(pcd_loss(student, teacher, stages=4), value)
    loss = pcd_loss(student, teacher, stages=4)
    assert torch.equal(loss.detach(), value)
    (slope,) = torch.autograd.grad(loss, student, create_graph=True)
    slope.square().sum().backward()
    assert student.grad.isfinite().all()


def test_strided_logits_and_a_used_up_input():
    student, teacher = make_pair(6, 26, torch.float32)
    kept = student.detach().clone()
    wanted = pcd_loss(student[:, ::2].contiguous(), teacher[:, ::2].contiguous())
    torch.testing.assert_close(pcd_loss(student[:, ::2], teacher[:, ::2]), wanted)
    for ranking in (True, False):
        by_column = pcd_loss(student.t().contiguous().t(), teacher.t().contiguous().t(), ranking=ranking)
        torch.testing.assert_close(by_column, pcd_loss(student, teacher, ranking=ranking))
    assert torch.equal(student.detach(), kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
    student, teacher = make_pair(4, 20, torch.float32)
    good = pcd_loss(student, teacher, reduction="none")
    with torch.no_grad():
        student[1, 3] = bad
    loss = pcd_loss(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    rest = torch.tensor([0, 2, 3])
    assert loss[1].isnan()
    torch.testing.assert_close(loss[rest], good[rest])
    assert gradient[rest].isfinite().all()


@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("spread", [1.0, 300.0])  # 300: logits too far apart for one maximum per batch
def test_never_negative_however_close(weighting, spread):
    _, teacher = make_pair(50, 30, torch.float32)
    for shift in (0.0, 0.7, 1e-5):
        student = (spread * teacher + shift).requires_grad_()
        loss = pcd_loss(student, spread * teacher, weighting=weighting, reduction="none")
        assert loss.ge(0).all()
        assert loss.le(1e-4).all()


def test_backward_twice_through_one_graph():
    student, teacher = make_pair(3, 12, torch.float32)
    loss = pcd_loss(student, teacher)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_an_empty_batch_is_zero():
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = pcd_loss(empty, empty.detach())
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 10)


@pytest.mark.slow
def test_compiled_by_the_user():
    torch._dynamo.reset()
    student, teacher = make_pair(3, 10, torch.float32)
    expected = pcd_loss(student, teacher, stages=2)
    compiled = torch.compile(pcd_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher, stages=2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


def test_auto_takes_the_kernel_only_where_it_runs():
    for logits_ in (torch.zeros(2, 100), torch.zeros(2, 100).double(), torch.zeros(2, 100, device="meta")):
        assert choose_backend("auto", logits_, logits_) == "eager"
        assert choose_backend("eager", logits_, logits_) == "eager"


@pytest.mark.parametrize("name", ["reference", "compile", "native"])
def test_backends_of_earlier_versions_are_refused_with_those_that_exist(name):
    zeros = torch.zeros(2, 10)
    for call in (lambda: PCDLoss(backend=name), lambda: pcd_loss(zeros, zeros, backend=name)):
        with pytest.raises(ValueError, match=f"^backend must be 'auto', 'eager' or 'triton', got '{name}'$"):
            call()


def test_every_group_is_a_union_of_segments_and_every_stage_covers_every_class_once():
    sizes = (5, 3, 2, 3)
    groups = summed_groups(23, sizes)
    edges = refinement(groups)
    assert {edge for group in groups for edge in (group.start, group.stop)} == {*edges}
    assert sum(group.count * (group.stop - group.start) for group in groups) == 23 * len(sizes)
    for k in sizes:
        assert stage_edges(23, k)[0] == 0
        assert stage_edges(23, k)[-1] == 23
        assert {b - a for a, b in pairwise(stage_edges(23, k))} <= {23 // k, 23 // k + 1}


def test_unknown_and_unavailable_backends_are_named(monkeypatch):
    with pytest.raises(ValueError, match="backend must be 'auto', 'eager' or 'triton', got 'cuda'"):
        PCDLoss(backend="cuda")
    zeros = torch.zeros(2, 200)
    with pytest.raises(ValueError, match=r'backend "triton" needs .*use backend="auto"'):
        pcd_loss(zeros, zeros, backend="triton")
    monkeypatch.setattr(pcd_triton, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        pcd_loss(zeros, zeros, backend="triton")
    assert pcd_loss(zeros, zeros) == 0


@pytest.mark.slow
def test_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from pcdistill.losses.pcd import pcd_loss\n"
        "print(pcd_loss(torch.zeros(2, 10), torch.ones(2, 10)).item())"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=root
    )
    assert run.stdout.strip() == "0.0", run.stderr


def test_pcd_is_what_the_loss_calls():
    student, teacher = make_pair(4, 30, torch.float32)
    rows = pcd(student, teacher, stages(3), temperature=4.0, **DEFAULTS)
    torch.testing.assert_close(pcd_loss(student, teacher), rows.mean())
