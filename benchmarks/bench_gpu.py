"""PCD on a CUDA card: its numbers against float64, its time against KD's, and a whole step against timm's.

python benchmarks/bench_gpu.py [--json results/gpu.json] [--seconds 400] [--parts parity,loss,step,graphs]\
    [--only TEXT] [--smoke]

Four parts, the most important rows of each first. Every row is printed and saved when it is measured; a row that
fails says why and stops nothing. None is begun after --seconds. --smoke runs every row on a CPU, on a few numbers.

- parity: relative errors of loss and gradient against PCD group by group in float64, on the same logits.
- loss: milliseconds of forward and backward; beside them KD as it is and under torch.compile, and replays of a CUDA
  graph of each. "ratio" is PCD over the fastest compiled KD.
- step: ResNet-50 teaches ResNet-18 at 224 pixels, random weights, a batch that is on the card already.
- graphs: ResNet-32x4 teaches ResNet-8x4 at 32 pixels, by the engine with CUDA graphs and without; the mean loss of the
  second epoch says whether they train alike.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from _bench import machine, save, show
from torch import nn
from torch.nn import functional as F

import pcdistill
from pcdistill.losses import kd_loss, pcd_loss
from pcdistill.models import build_model
from pcdistill.ops.pcd import pcd
from pcdistill.ops.segments import rank_classes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.references.pcd import pcd_by_group

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Row = dict[str, Any]
GRAPHS = "reduce-overhead"
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Bench:
    """Where rows are measured, kept and saved."""

    def __init__(self, seconds: float, out: Path | None, smoke: bool, only: str = "") -> None:
        self.device = "cpu" if smoke else "cuda"
        self.smoke, self.out, self.only = smoke, out, only
        self.ends = time.monotonic() + seconds
        self.rows: list[Row] = []
        self.info = machine(self.device) | {"timm": timm.__version__}

    def measure(self, what: Row, call: Callable[[], Row]) -> None:
        """Add the row that the call gives; say what went wrong instead where it fails."""
        if self.only not in ", ".join(f"{key} {value}" for key, value in what.items()):
            return
        if time.monotonic() > self.ends:
            show({**what, "left out": "no time"})
            return
        started = time.monotonic()
        try:
            found = call()
        except Exception as error:  # the rows after it are worth having
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        self.free()
        found = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in found.items()}
        row = {**what, **found, "took s": round(time.monotonic() - started, 1)}
        self.rows.append(row)
        show(row)
        self.save()

    def save(self) -> None:
        """The rows so far, as JSON and as a table for each part."""
        if self.out:
            command = "python " + " ".join(["benchmarks/bench_gpu.py", *sys.argv[1:]])
            save(self.rows, self.info, command, self.out, by="part")

    def free(self) -> None:
        """Give back what a row left."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def logits(self, n: int, c: int, dtype: torch.dtype, kind: str = "usual") -> tuple[torch.Tensor, torch.Tensor]:
        """Student, which wants a gradient, and teacher, [n, c]."""
        generator = torch.Generator(self.device).manual_seed(n + c)
        a, b = (3 * torch.randn(n, c, device=self.device, generator=generator) for _ in range(2))
        student = {"usual": a, "close": b + 0.003 * a, "equal": b, "ties": a.round()}[kind]
        teacher = b.round() if kind == "ties" else b
        return student.to(dtype).requires_grad_(), teacher.to(dtype)


# Parity


def parity(bench: Bench, n: int, c: int, dtype: torch.dtype, s: int, kind: str = "usual", **options: bool) -> Row:
    """Errors of loss and gradient; the gradient's also on the scale of its rounding to the dtype of the logits."""
    student, teacher = bench.logits(n, c, dtype, kind)
    chosen = {"ranking": True, "weighting": True, "detach_weight": False} | options
    sizes = (*range(s, 0, -1), *range(1, s + 1))
    backend = "eager" if bench.smoke else "triton"
    loss = pcd(student, teacher, sizes, temperature=4.0, **chosen, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    with torch.no_grad():
        order = rank_classes(student.float(), teacher.float())
        if not chosen.pop("ranking"):
            order = torch.arange(c, device=order.device).expand(n, c)
    z, t = student.detach().double().gather(1, order).requires_grad_(), teacher.double().gather(1, order)
    exact = pcd_by_group(z, t, sizes, 4.0, **chosen)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    wanted = torch.empty_like(slope).scatter_(1, order, slope)
    exact = exact.detach()
    value = (loss.detach() - exact).norm() / exact.norm().clamp(min=1e-300)
    rounded = wanted.to(dtype).double()
    return {
        "value error": float(value),
        "gradient error": float((gradient.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)),
        "of rounding": float((rounded - wanted).norm() / wanted.norm().clamp(min=1e-300)),
        "largest loss": float(loss.detach().max()),
    }


def parity_rows(bench: Bench, most_important: bool) -> None:
    float32, bfloat16 = torch.float32, torch.bfloat16
    first = [10, 20] if bench.smoke else [1000, 21841, 128256]
    rest = [] if bench.smoke else [100, 10, 32000, 4096, 4097]
    rows: list[tuple[int, torch.dtype, int, str, dict[str, bool]]]
    if most_important:
        rows = [(c, dtype, 3, "usual", {}) for dtype in (float32, bfloat16) for c in first]
        rows += [(first[-1], float32, 3, kind, {}) for kind in ("close", "ties")]
    else:
        rows = [(c, dtype, s, "usual", {}) for dtype in (float32, bfloat16) for c in first for s in (5, 1)]
        rows += [(c, dtype, s, "usual", {}) for dtype in (float32, bfloat16) for c in rest for s in (3, 5, 1)]
        rows += [(first[1], float32, 3, "usual", {name: value}) for name, value in OTHERS]
        rows += [(c, torch.float16, 3, "usual", {}) for c in first[:2]]
        rows += [(first[1], float32, 3, "equal", {})]
    for c, dtype, s, kind, options in rows:
        n = 4 if bench.smoke else 64
        what = {"part": "parity", "logits": f"{n} x {c}", "dtype": NAMES[dtype], "stages": s}
        what |= {"case": next(iter(options), kind)}
        bench.measure(what, lambda c=c, d=dtype, s=s, k=kind, o=options, n=n: parity(bench, n, c, d, s, k, **o))


OTHERS = (("ranking", False), ("weighting", False), ("detach_weight", True))


# Time of the loss alone


def timed(bench: Bench, call: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    if bench.smoke:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=150, return_mode="median"))


def both_passes(loss: LossFn, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    return gradient


def replayed(bench: Bench, call: Callable[[], object]) -> Callable[[], object]:
    """The same call as a CUDA graph."""
    if bench.smoke:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def memory_of(bench: Bench, call: Callable[[], object]) -> float:
    """MiB at the peak beyond what was there before."""
    if bench.smoke:
        return 0.0
    call()
    bench.sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    bench.sync()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cost(bench: Bench, n: int, c: int, dtype: torch.dtype, compiled: LossFn) -> Row:
    student, teacher = bench.logits(n, c, dtype)
    calls = {
        name: (lambda loss=loss: both_passes(loss, student, teacher))
        for name, loss in (("PCD", pcd_loss), ("KD compiled", compiled), ("KD", kd_loss))
    }
    row: Row = {f"{name} ms": timed(bench, call) for name, call in calls.items()}
    row["ratio"] = row["PCD ms"] / row["KD compiled ms"]
    row |= {f"{name} MiB": memory_of(bench, calls[name]) for name in ("PCD", "KD compiled")}
    row["PCD S=5 ms"] = timed(bench, lambda: both_passes(lambda s, t: pcd_loss(s, t, stages=5), student, teacher))
    for name in ("PCD", "KD compiled"):
        row[f"{name} graph ms"] = timed(bench, replayed(bench, calls[name]))
    row["graph ratio"] = row["PCD graph ms"] / row["KD compiled graph ms"]
    return row


def loss_rows(bench: Bench, most_important: bool) -> None:
    compiled: LossFn = kd_loss if bench.smoke else torch.compile(kd_loss, dynamic=False)
    first = [(1024, 1000), (2048, 128256)]
    shapes = first if most_important else [(256, 21841), (512, 32000), (128, 100)]
    if bench.smoke:
        shapes = [(8, 20)]
    for n, c in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            what = {"part": "loss", "logits": f"{n} x {c}", "dtype": NAMES[dtype]}
            bench.measure(what, lambda n=n, c=c, d=dtype: cost(bench, n, c, d, compiled))
    if most_important:
        profile_row(bench)
        if not bench.smoke:
            plan_rows(bench)


def profile_row(bench: Bench) -> None:
    """Where the time of the largest shape goes, kernel by kernel."""

    def kernels() -> Row:
        student, teacher = bench.logits(*((8, 20) if bench.smoke else (2048, 128256)), torch.float32)
        both_passes(pcd_loss, student, teacher)
        bench.sync()
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU if bench.smoke else kinds.CUDA]) as seen:
            both_passes(pcd_loss, student, teacher)
            bench.sync()
        field = "self_cpu_time_total" if bench.smoke else "self_device_time_total"
        events = sorted(seen.key_averages(), key=lambda e: -getattr(e, field))[:6]
        return {"kernels": "; ".join(f"{e.key[:24]} {getattr(e, field) / 1e3:.3f} ms" for e in events)}

    bench.measure({"part": "kernels", "logits": "2048 x 128256", "dtype": "float32"}, kernels)


def plan_rows(bench: Bench) -> None:
    """Other sizes of the tiles, for the largest shape."""
    from pcdistill.ops import pcd_tiled

    usual, student_teacher = pcd_tiled.plan, bench.logits(2048, 128256, torch.float32)

    def cost_of(changed: Row) -> Row:
        pcd_tiled.plan = lambda classes: usual(classes)._replace(**changed)
        try:
            return {"PCD ms": timed(bench, lambda: both_passes(pcd_loss, *student_teacher))}
        finally:
            pcd_tiled.plan = usual

    plans = [{}, {"select": 2048, "select_warps": 8}, {"select": 2048, "select_warps": 16}, {"tile": 1024}]
    for changed in (*plans, {"tile": 4096}):
        bench.measure({"part": "plans", "plan": str(changed or "usual")}, lambda c=changed: cost_of(c))


# A whole step


class Step:
    """What every way of training shares: models, a batch, the optimiser's settings."""

    def __init__(self, bench: Bench, batch: int, dtype: torch.dtype) -> None:
        self.bench, self.batch, self.dtype = bench, batch, dtype
        self.steps = 2 if bench.smoke else max(20, 5120 // batch)
        side = 32 if bench.smoke else 224
        generator = torch.Generator(bench.device).manual_seed(0)
        images = torch.randn(batch, 3, side, side, device=bench.device, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.target = torch.arange(batch, device=bench.device) % 1000

    def model(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name).to(self.bench.device).to(memory_format=torch.channels_last)

    def autocast(self) -> Any:
        half = self.dtype != torch.float32
        return torch.autocast(self.bench.device, self.dtype) if half else nullcontext()

    def loop(self, loss_of: Callable[[], torch.Tensor], model: nn.Module) -> Row:
        """Images per second of a plain loop over this loss."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = loss_of()
            loss.backward()
            optimizer.step()

        for _ in range(1 if self.bench.smoke else 6):
            step()
        self.bench.sync()
        if self.bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(self.steps):
                step()
            self.bench.sync()
            seconds.append(time.perf_counter() - started)
        return self.row(statistics.median(seconds) / self.steps)

    def row(self, seconds: float) -> Row:
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.bench.device == "cuda" else 0.0
        return {"images/s": self.batch / seconds, "ms a step": seconds * 1e3, "peak MiB": memory}


class Repeated:
    """A loader that gives one batch so many times."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.times):
            yield self.batch


def student_alone(step: Step, compile_it: str | None) -> Row:
    model = step.model("resnet18").train()
    called = with_compile(step, model, compile_it)
    return step.loop(lambda: F.cross_entropy(called(step.images).float(), step.target), model)


def by_timm(step: Step, compile_it: str | None) -> Row:
    """timm's own task for distillation, in timm's order: forward under autocast, backward, step."""
    from timm.task import LogitDistillationTask

    student, teacher = step.model("resnet18"), step.model("resnet50")
    task = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        temperature=4.0,
        device=torch.device(step.bench.device),
        verbose=False,
    )
    task.train()
    if compile_it and not step.bench.smoke:
        task.compile(mode=None if compile_it == "default" else compile_it)
    return step.loop(lambda: task(step.images, step.target)["loss"], student)


def by_hand(step: Step, compile_it: str | None, loss: LossFn) -> Row:
    """A plain loop with one of our losses."""
    student, teacher = step.model("resnet18").train(), step.model("resnet50").eval().requires_grad_(False)
    called, taught = (with_compile(step, model, compile_it) for model in (student, teacher))

    def total() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # graphs of two models share memory: the teacher's output is copied
        with torch.no_grad():
            wanted = taught(step.images).clone()
        logits = called(step.images)
        return F.cross_entropy(logits.float(), step.target) + loss(logits, wanted)

    return step.loop(total, student)


def by_engine(step: Step, compile_it: str | None, method: str) -> Row:
    """`pcdistill.distill` itself: the second epoch's images per second, with all that its loop does."""
    if step.bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = 3 * step.steps
    compiled = bool(compile_it) and not step.bench.smoke
    found = pcdistill.distill(
        teacher=step.model("resnet50"),
        student=step.model("resnet18"),
        train=Repeated((step.images, step.target), times),
        val=Repeated((step.images, step.target), 1),
        losses=[{"method": "ce"}, {"method": method, "temperature": 4.0}],
        epochs=2,
        lr=1e-4,
        train_options={
            "precision": NAMES[step.dtype],
            "compile": compiled and (compile_it if compile_it == GRAPHS else True),
            "device": step.bench.device,
        },
        allow=["weak-teacher"],
        verbose=False,
    )
    return step.row(step.batch / found.history[-1]["images_per_second"])


def small_pair(bench: Bench, batch: int, dtype: torch.dtype, compile_it: bool | str) -> Row:
    """The second of two epochs of `pcdistill.distill` on small images, which wait for Python more than for the card."""
    torch.manual_seed(0)
    teacher, student = (build_model(f"cifar/{name}", num_classes=100) for name in ("resnet32x4", "resnet8x4"))
    images = torch.randn(batch, 3, 32, 32, device=bench.device)
    batches = Repeated((images, torch.arange(batch, device=bench.device) % 100), 2 if bench.smoke else 400)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = pcdistill.distill(
        teacher=teacher,
        student=student,
        train=batches,
        val=Repeated((images, batches.batch[1]), 1),
        losses=[{"method": "ce"}, {"method": "pcd", "strength": 4}],
        epochs=2,
        lr=0.01,
        train_options={"precision": NAMES[dtype], "compile": False if bench.smoke else compile_it},
        allow=["weak-teacher"],
        verbose=False,
    )
    speed = found.history[-1]["images_per_second"]
    memory = torch.cuda.max_memory_allocated() / 2**20 if bench.device == "cuda" else 0.0
    return {"images/s": speed, "ms a step": 1e3 * batch / speed, "loss": found.history[-1]["train/loss"], "MiB": memory}


def graphs_rows(bench: Bench, most_important: bool) -> None:
    if not most_important:
        return
    for dtype in (torch.bfloat16, torch.float32):
        for compile_it in (False, True, GRAPHS):
            what = {"part": "graphs", "batch": 64, "dtype": NAMES[dtype], "compile": compile_it}
            bench.measure(what, lambda d=dtype, how=compile_it: small_pair(bench, 4 if bench.smoke else 64, d, how))
            if not bench.smoke:
                torch._dynamo.reset()


def with_compile(step: Step, model: nn.Module, mode: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if mode is None or step.bench.smoke:
        return model
    return torch.compile(model, mode=None if mode == "default" else mode)


def teacher_alone(step: Step) -> Row:
    model = step.model("resnet50").eval()

    def run() -> None:
        with torch.inference_mode(), step.autocast():
            model(step.images)

    run()
    return step.row(timed(step.bench, run) / 1e3)


def step_rows(bench: Bench, most_important: bool) -> None:
    bfloat16, float32 = torch.bfloat16, torch.float32
    batch, small = (4, 2) if bench.smoke else (256, 32)
    ways: dict[str, Callable[[Step, str | None], Row]] = {
        "student alone, plain loop": student_alone,
        "timm LogitDistillationTask": by_timm,
        "pcdistill.distill, PCD": lambda step, how: by_engine(step, how, "pcd"),
        "pcdistill.distill, KD": lambda step, how: by_engine(step, how, "kd"),
        "plain loop, pcd_loss": lambda step, how: by_hand(step, how, pcd_loss),
    }
    most, some = list(ways), list(ways)[:3]
    plan: list[tuple[str, int, torch.dtype, str | None]]
    if most_important:
        plan = [(way, batch, bfloat16, None) for way in most]
        plan += [(way, batch, bfloat16, "default") for way in some]
    else:
        plan = [(way, small, bfloat16, None) for way in some]
        plan += [(way, batch, float32, None) for way in some]
        plan += [(way, small, bfloat16, GRAPHS) for way in (most[-1], *some)]
        plan += [(most[-1], batch, bfloat16, GRAPHS)]
        plan += [(way, small, bfloat16, "default") for way in (most[1], most[2])]
    for way, size, dtype, how in plan:
        what = {"part": "step", "way": way, "batch": size, "dtype": NAMES[dtype], "compile": how or "no"}
        bench.measure(what, lambda way=way, size=size, d=dtype, how=how: ways[way](Step(bench, size, d), how))
        if not bench.smoke:
            torch._dynamo.reset()
    if most_important:
        what = {"part": "step", "way": "teacher alone, forward", "batch": batch, "dtype": "bfloat16", "compile": "no"}
        bench.measure(what, lambda: teacher_alone(Step(bench, batch, bfloat16)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to save the rows after every row")
    parser.add_argument("--seconds", type=float, default=400.0, help="no row is begun after so many")
    parser.add_argument("--parts", default="parity,loss,step,graphs", help="some of them, with commas between")
    parser.add_argument("--only", default="", help="measure rows whose description contains this alone")
    parser.add_argument("--smoke", action="store_true", help="every row on a CPU, on a few numbers")
    args = parser.parse_args()
    bench = Bench(args.seconds, args.json, args.smoke, args.only)
    show(bench.info)
    parts = {"parity": parity_rows, "loss": loss_rows, "step": step_rows, "graphs": graphs_rows}
    for most_important in (True, False):
        for name in args.parts.split(","):
            parts[name](bench, most_important)


if __name__ == "__main__":
    main()
