"""PCD's Triton kernels without a card: compiled ahead of time for three kinds of them, and run by the interpreter."""

import re
import subprocess
from functools import lru_cache

import pytest
import torch

from pcdistill.ops import pcd_triton
from pcdistill.ops.pcd_eager import Options
from tests.ops.cases import HARD, TILED, Case, check, stages
from tests.ops.test_pcd import in_the_interpreter, name

triton = pytest.importorskip("triton")
from pcdistill.ops import pcd_tiled  # noqa: E402  # it imports triton

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
CLASSES = [10, 100, 1000, 4096, 4097, 21841, 32000, 128256]


class Launches:
    """Stands for a kernel and keeps what it is launched with, as Triton would specialise it."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            names = self.kernel.arg_names[: len(args)]
            signature = {key: kind(value) for key, value in zip(names, args, strict=True)}
            aligned = tuple(
                i
                for i, value in enumerate(args)
                if isinstance(value, torch.Tensor)
                or (isinstance(value, int) and value % 16 == 0 and not self.kernel.params[i].do_not_specialize)
            )
            self.found.append((self.kernel, tuple(signature.items()), tuple(constants.items()), aligned, num_warps))

        return launch


def kind(value):
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def launches(monkeypatch, classes, dtype, s):
    """What is launched, on a card, for logits of these classes: forward and backward."""
    found = []
    for module, names in (
        (pcd_triton, ["_kernel"]),
        (pcd_tiled, ["_bracket", "_select", "_moments", "_combine", "_slope"]),
    ):
        for kernel in names:
            monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), found))
    student, teacher = torch.zeros(2, classes, dtype=dtype), torch.zeros(2, classes, dtype=dtype)
    options = Options(4.0, ranking=True, weighting=True, detach_weight=False)
    loss, kept, slope = pcd_triton.loss_and_slope(student, teacher, stages(s), options)
    slope(*kept, loss)
    return found


@lru_cache
def resources(launch, arch):
    """What the assembler reports of one program: registers, bytes of stack, bytes of local memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.knobs import nvidia

    kernel, signature, constants, aligned, num_warps = launch
    source = ASTSource(
        fn=kernel,
        signature=dict(signature) | {key: "constexpr" for key, _ in constants},
        constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    return report_of(compiled.asm["cubin"], nvidia.cuobjdump.path)


def report_of(cubin, program):
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def tools_missing():
    try:
        from triton.knobs import nvidia

        return next((tool for tool in ("ptxas", "cuobjdump") if not getattr(nvidia, tool).path), None)
    except (ImportError, RuntimeError) as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "classes"),
    [
        *((90, torch.float32, classes) for classes in CLASSES),
        *((arch, torch.bfloat16, classes) for arch in (80, 90, 100) for classes in (1000, 128256)),
    ],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_nothing_is_spilled(monkeypatch, arch, dtype, classes):
    """Local memory is where registers are spilled to; the stack lies there too, and a few bytes of it cost nothing."""
    if pcd_triton.INTERPRETED or tools_missing():
        pytest.skip(f"Triton compiles nothing here: {tools_missing() or 'it interprets'}")
    for s in (3, 5):
        with monkeypatch.context() as patched:
            found = launches(patched, classes, dtype, min(s, classes // 2))
        assert len(found) == (1 if classes <= pcd_triton.MOST_HELD else 5)
        for launch in found:
            used = resources(launch, arch)
            told = f"{launch[0].__name__}, {classes} classes: {used}"
            assert used["LOCAL"] == 0, told
            assert used["STACK"] <= 32, told


@pytest.mark.slow
def test_tiled_in_the_interpreter():
    assert "cases agree" in in_the_interpreter("tiled")


@pytest.mark.cuda
@pytest.mark.parametrize("case", HARD, ids=name)
def test_one_block_on_a_card(case):
    check("triton", case, device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("kept", [8, 4096])
@pytest.mark.parametrize("case", [*TILED, *HARD[:9], Case("usual", 3, 5000, stages(5), 1.0)], ids=name)
def test_tiles_on_a_card(monkeypatch, case, kept):
    monkeypatch.setattr(pcd_triton, "MOST_HELD", 1)
    monkeypatch.setattr(pcd_tiled, "plan", lambda classes: pcd_tiled.Plan(256, 256, 64, kept))
    check("triton", case, device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [4096, 4097, 21841, 128256])
@pytest.mark.parametrize("kind", ["usual", "close", "ties", "equal rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_classes_on_a_card(classes, kind, dtype):
    check("triton", Case(kind, 4, classes, stages(3), 4.0, {}, dtype), device="cuda")


@pytest.mark.cuda
def test_many_rows_and_the_dtype_of_the_gradient():
    """More rows than one axis of a grid holds, half precision in and out, and a second derivative."""
    student = torch.randn(70_000, 5000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn_like(student)
    options = Options(4.0, ranking=True, weighting=True, detach_weight=False)
    loss, kept, slope = pcd_triton.loss_and_slope(student, teacher, stages(3), options)
    gradient = slope(*kept, torch.ones_like(loss))
    assert gradient.dtype == torch.bfloat16
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    again, kept, slope = pcd_triton.loss_and_slope(student[-8:], teacher[-8:], stages(3), options)
    torch.testing.assert_close(loss[-8:], again)
    torch.testing.assert_close(gradient[-8:], slope(*kept, torch.ones_like(again)))
