"""All backends of PCD against float64, group by group: drawn and hard inputs, and what differs between backends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pcdistill.losses.pcd import PCDLoss, pcd_loss
from pcdistill.ops import pcd as ops_pcd
from pcdistill.ops import pcd_cpu, pcd_native, pcd_triton
from pcdistill.ops.pcd import choose_backend, pcd
from pcdistill.ops.pcd_plan import make_plan
from pcdistill.ops.segments import summed_groups
from tests.helpers import make_pair
from tests.ops.cases import COMPILED, DEFAULTS, HARD, KINDS, OPTIONS, Case, check, stages

COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))


@pytest.fixture(autouse=True)
def _needs_a_compiler(request):
    called = getattr(request.node, "callspec", None)
    if called and called.params.get("backend") == "native" and not COMPILER:
        pytest.skip("no C compiler")


def name(value):
    return f"{value.kind}-{value.c}-{len(value.sizes)}" if isinstance(value, Case) else None


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("case", HARD, ids=name)
def test_hard_inputs(backend, case):
    check(backend, case)


@given(st.data())
@settings(max_examples=60, deadline=None)
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
    if COMPILER and case.dtype != torch.float64:
        check("native", case, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_form_for_any_device_on_a_cpu(monkeypatch, kind, options):
    """What eager mode does on a device without a kernel of its own."""
    monkeypatch.setattr(ops_pcd.pcd_cpu, "loss_and_gradient", ops_pcd.pcd_eager.loss_and_gradient)
    check("eager", Case(kind, 3, 41, stages(4), 2.0, options))


def test_compiled_hard_inputs():
    for case in COMPILED:
        check("compile", case)


def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_parity"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "cases agree" in run.stdout


@pytest.mark.parametrize("kind", ["usual", "spread"])
def test_chunks_change_nothing(monkeypatch, kind):
    monkeypatch.setattr(pcd_cpu, "CHUNK", 2 * 31)
    check("eager", Case(kind, 7, 31, stages(4)))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)  # a detached weight's gradient is not that of the value
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck_once_and_twice(backend, options):
    student, teacher = make_pair(2, 9, torch.float64)

    def loss(z):
        return pcd_loss(z, teacher, temperature=2.0, stages=4, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_detached_weight_by_hand():
    student, teacher = make_pair(3, 12, torch.float64)
    (detached,) = torch.autograd.grad(pcd_loss(student, teacher, detach_weight=True, backend="eager"), student)
    (whole,) = torch.autograd.grad(pcd_loss(student, teacher, backend="eager"), student)
    (expected,) = torch.autograd.grad(pcd_loss(student, teacher, detach_weight=True, backend="reference"), student)
    torch.testing.assert_close(detached, expected)
    assert not torch.allclose(detached, whole)


def test_a_second_derivative_is_the_references():
    student, teacher = make_pair(3, 12, torch.float32)
    seconds = []
    for backend in ("reference", "eager"):
        (first,) = torch.autograd.grad(pcd_loss(student, teacher, backend=backend), student, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), student)[0])
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", [20, 300])
def test_autocast_and_coarse_matrix_products_change_nothing(c):
    student, teacher = make_pair(4, c, torch.float32)
    expected = pcd_loss(student, teacher, stages=5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            actual = pcd_loss(student, teacher, stages=5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, expected)


def test_strided_logits_and_a_used_up_input():
    student, teacher = make_pair(6, 26, torch.float32)
    kept = student.detach().clone()
    expected = pcd_loss(student[:, ::2], teacher[:, ::2], backend="reference")
    torch.testing.assert_close(pcd_loss(student[:, ::2], teacher[:, ::2], backend="eager"), expected)
    by_column = pcd_loss(student.t().contiguous().t(), teacher.t().contiguous().t(), backend="eager")
    torch.testing.assert_close(by_column, pcd_loss(student, teacher, backend="reference"))
    assert torch.equal(student.detach(), kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_a_row_that_is_not_finite_spoils_no_other(backend, bad):
    student, teacher = make_pair(4, 20, torch.float32)
    good = pcd_loss(student, teacher, backend=backend, reduction="none")
    with torch.no_grad():
        student[1, 3] = bad
    loss = pcd_loss(student, teacher, backend=backend, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    rest = torch.tensor([0, 2, 3])
    assert loss[1].isnan()
    torch.testing.assert_close(loss[rest], good[rest])
    assert gradient[rest].isfinite().all()


@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("spread", [1.0, 300.0])  # 300: logits too far apart for one maximum per batch
def test_never_negative_however_close(backend, weighting, spread):
    _, teacher = make_pair(50, 30, torch.float32)
    for shift in (0.0, 0.7, 1e-5):
        student = (spread * teacher + shift).requires_grad_()
        loss = pcd_loss(student, spread * teacher, weighting=weighting, backend=backend, reduction="none")
        assert loss.ge(0).all()
        assert loss.le(1e-4).all()


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_backward_twice_through_one_graph(backend):
    student, teacher = make_pair(3, 12, torch.float32)
    loss = pcd_loss(student, teacher, backend=backend)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_empty_batch_is_zero(backend):
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = pcd_loss(empty, empty.detach(), backend=backend)
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 10)


def test_compiled_by_the_user():
    torch._dynamo.reset()
    student, teacher = make_pair(3, 10, torch.float32)
    expected = pcd_loss(student, teacher, stages=2)
    compiled = torch.compile(pcd_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher, stages=2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


def test_auto_takes_one_pass_until_groups_outweigh_classes(monkeypatch):
    logits = torch.zeros(2, 100)
    few, many = (make_plan(summed_groups(100, stages(s)), 100) for s in (5, 50))
    assert choose_backend("auto", logits.double(), few) == "eager"
    assert choose_backend("auto", logits.double(), many) == "reference"
    monkeypatch.setattr(pcd_native, "_find", lambda: "is not here")
    assert choose_backend("auto", logits, few) == "eager"
    monkeypatch.setattr(pcd_native, "_find", lambda: print)
    assert choose_backend("auto", logits, few) == choose_backend("auto", logits, many) == "native"
    assert choose_backend("eager", logits, many) == "eager"
    assert choose_backend("auto", torch.zeros(2, 100, device="meta"), few) == "reference"


def test_every_layer_of_a_plan_covers_every_segment_once():
    plan = make_plan(summed_groups(23, (5, 3, 2)), 23)
    groups = iter(plan.groups)
    for number in plan.layers:
        layer = [next(groups) for _ in range(number)]
        assert [start for start, _, _ in layer] == [0, *(stop for _, stop, _ in layer[:-1])]
        assert layer[-1][1] == plan.segments
    assert sum(plan.sizes) == 23


def test_unknown_and_unavailable_backends_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be 'auto', 'reference', .* or 'triton', got 'cuda'"):
        PCDLoss(backend="cuda")
    zeros = torch.zeros(2, 200)
    with pytest.raises(ValueError, match=r'backend "compile" .*at most 64|"compile" for groups with \d+ segments'):
        pcd_loss(zeros, zeros, stages=100, backend="compile")
    with pytest.raises(ValueError, match=r'backend "triton" needs .*use backend="auto"'):
        pcd_loss(zeros, zeros, backend="triton")
    monkeypatch.setattr(pcd_triton, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        pcd_loss(zeros, zeros, backend="triton")
    assert pcd_loss(zeros, zeros) == 0


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
    groups = summed_groups(30, stages(3))
    rows = pcd(student, teacher, groups, temperature=4.0, **DEFAULTS)
    torch.testing.assert_close(pcd_loss(student, teacher), rows.mean())
