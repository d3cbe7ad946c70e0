"""PCD on a CPU in C: compiled by the machine's own compiler when first used, and kept in the user's cache folder.

Where there is no compiler this module still imports, and says so when its kernel is called.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pcdistill.ops import pcd_cpu
from pcdistill.ops.pcd_combine import Options
from pcdistill.ops.pcd_plan import Plan, remember
from pcdistill.ops.pcd_reference import pcd_reference
from pcdistill.ops.segments import Group

SOURCE = Path(__file__).with_suffix(".c")
COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
TOO_WIDE = 1
SCRATCH = 2**24  # bytes that all threads together may take in any case


class _Unavailable(Exception):
    """Why the kernel cannot be had on this machine."""


def check_available(student: Tensor) -> None:
    """Raise unless the kernel can run on these logits."""
    if student.device.type != "cpu":
        raise ValueError(f'backend "native" needs logits on the CPU, got {student.device}; use backend="auto"')
    if student.dtype != torch.float32:
        raise ValueError(f'backend "native" computes in float32, got {student.dtype} logits; use backend="auto"')
    found = _find()
    if isinstance(found, str):
        raise ValueError(f'backend "native" {found}; use backend="auto"')


def preferred(student: Tensor) -> bool:
    """Whether "auto" means this kernel: on a CPU with a compiler, if the logits suit it."""
    return (
        student.device.type == "cpu"
        and student.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not isinstance(_find(), str)
    )


def loss_and_gradient(student: Tensor, teacher: Tensor, plan: Plan, options: Options) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient with respect to the student's logits [N, C], both float32."""
    student, teacher = student.detach().contiguous(), teacher.detach().contiguous()
    n, classes = student.shape
    loss, gradient = student.new_empty(n), torch.empty_like(student)
    edges, spans, group_of = _tables(plan)
    library = _find()
    assert isinstance(library, ctypes.CDLL)  # or check_available had said so
    bytes_each = library.pcd_native_scratch(classes, edges.data_ptr(), plan.segments, len(spans))
    # Many threads on few rows would need more scratch than the logits themselves.
    affordable = max(SCRATCH, 2 * gradient.nbytes) // bytes_each
    threads = max(1, min(torch.get_num_threads(), affordable))
    scratch = torch.empty(threads * bytes_each + 64, dtype=torch.uint8)
    status = library.pcd_native(
        student.data_ptr(),
        teacher.data_ptr(),
        n,
        classes,
        edges.data_ptr(),
        plan.segments,
        spans.data_ptr(),
        len(spans),
        group_of.data_ptr(),
        len(group_of),
        options.temperature,
        options.ranking,
        options.weighting,
        options.detach_weight,
        threads,
        scratch.data_ptr(),
        loss.data_ptr(),
        gradient.data_ptr(),
    )
    if status == TOO_WIDE:
        return _without_c(student, teacher, plan, options)
    return loss, gradient


def _without_c(student: Tensor, teacher: Tensor, plan: Plan, options: Options) -> tuple[Tensor, Tensor]:
    """The same by NumPy, or group by group where NumPy's tables would be huge."""
    if not plan.crowded:
        return pcd_cpu.loss_and_gradient(student, teacher, plan, options)
    groups = tuple(Group(plan.edges[start], plan.edges[stop], count) for start, stop, count in plan.groups if count)
    with torch.enable_grad():
        student.requires_grad_()
        loss = pcd_reference(student, teacher, groups, **vars(options))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


@remember
def _tables(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Of int32: the boundaries [K + 1], the groups [G, 3] without fillers, and each segment's group [layers, K]."""
    spans = [group for group in plan.groups if group[2]]
    group_of: list[int] = []
    number = 0
    for start, stop, count in plan.groups:
        group_of += [number if count else len(spans)] * (stop - start)
        number += count > 0
    tables = (plan.edges, spans, group_of)
    edges, groups, members = (torch.tensor(values, dtype=torch.int32) for values in tables)
    return edges, groups.view(-1, 3), members.view(len(plan.layers), plan.segments)


@lru_cache(maxsize=1)
def _find() -> ctypes.CDLL | str:
    """The compiled kernel, or why there is none."""
    try:
        return _load()
    except (_Unavailable, OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return str(error)


def _load() -> ctypes.CDLL:
    compiler = shlex.split(
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or ""
    )
    if not compiler:
        raise _Unavailable("needs a C compiler (cc, gcc or clang), and none is on the PATH")
    processor = _processor()
    fast = ["-march=native"] if processor else []
    # OpenMP's functions are left to be found in what torch has loaded: a second pool of threads would fight with its.
    attempts = [[*COMPILE, *fast, "-fopenmp"], [*COMPILE, *fast], [*COMPILE]]
    reason = ""
    for flags in attempts:
        try:
            return _declared(_library(compiler, flags, processor))
        except (_Unavailable, OSError) as error:
            reason = str(error)
    raise _Unavailable(reason)


def _library(compiler: list[str], flags: list[str], processor: str) -> ctypes.CDLL:
    """The library that these flags make: from the cache folder, or else made there."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update("\0".join([*compiler, *flags, platform.machine(), processor]).encode())
    kept = _cache_folder() / f"pcd-{key.hexdigest()[:20]}.so"
    if os.path.exists(kept):  # which, unlike Path.exists, is False where looking is forbidden
        return ctypes.CDLL(str(kept))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=kept.parent)
    except OSError:  # a home that cannot be written: every process compiles for itself
        folder = tempfile.TemporaryDirectory()
        kept = Path(folder.name, "pcd.so")
    with folder as work:
        compiled, linked = Path(work, "pcd.o"), Path(work, "linked.so")
        _run([*compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        _run([*compiler, "-shared", str(compiled), "-o", str(linked), "-lm"])
        os.replace(linked, kept)  # whole or not at all, also when two processes compile at once
        return ctypes.CDLL(str(kept))


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise _Unavailable(f"could not be compiled by {command[0]}: {lines[0]}")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "pcdistill" if base else Path.home() / ".cache" / "pcdistill"


def _processor() -> str:
    """What a library compiled for this very processor depends on; "" where that is unknown.

    A home folder may be shared by machines of several kinds, and each needs a library of its own.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.pcd_native_scratch.restype = long
    library.pcd_native_scratch.argtypes = [long, pointer, long, long]
    library.pcd_native.argtypes = [
        *(pointer, pointer, long, long),
        *(pointer, long, pointer, long, pointer, long),
        *(ctypes.c_double, integer, integer, integer, integer),
        *(pointer, pointer, pointer),
    ]
    return library
