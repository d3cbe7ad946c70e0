"""PCD on a CUDA card: its value and gradient against float64, and its time and memory against KD's.

Usage: python benchmarks/bench_gpu.py > benchmarks/results/gpu.md

Prints a table as Markdown. Times are medians of forward and backward, by CUDA events (triton.testing.do_bench), float32
and bfloat16 logits; KD is measured as it is and under torch.compile, in the same run.
"""

import torch
from triton.testing import do_bench

from pcdistill.losses import kd_loss, pcd_loss

SHAPES = [(128, 100), (1024, 1000), (256, 21841), (512, 32000), (2048, 128256)]


def logits(n: int, c: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (3 * torch.randn(n, c, device="cuda", generator=generator) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def run(loss, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def errors(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Relative errors of value and gradient, of up to 64 rows against the eager form in float64."""
    rows = slice(0, 64)
    small, big = student[rows].detach().requires_grad_(), teacher[rows]
    value, gradient = run(pcd_loss, small, big)
    exact, wanted = run(pcd_loss, small.detach().double().requires_grad_(), big.double())
    return float((value - exact).abs() / exact), float((gradient.double() - wanted).norm() / wanted.norm())


def cost(loss, student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Milliseconds, and MiB beyond the inputs."""
    run(loss, student, teacher)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(loss, student, teacher)
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(lambda: run(loss, student, teacher), warmup=20, rep=100, return_mode="median"), memory


def main() -> None:
    compiled = torch.compile(kd_loss)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| logits | dtype | value error | gradient error | PCD ms | KD ms | KD compiled ms | PCD / compiled | MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n, c in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = logits(n, c, dtype)
            value, gradient = errors(student, teacher)
            times = [cost(loss, student, teacher) for loss in (pcd_loss, kd_loss, compiled)]
            pcd, kd, fused = (time for time, _ in times)
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {n} x {c} | {name} | {value:.1e} | {gradient:.1e} | {pcd:.3f} | {kd:.3f} | {fused:.3f} "
                f"| {pcd / fused:.2f} | {times[0][1]:.0f} |",
                flush=True,
            )
            del student, teacher
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
