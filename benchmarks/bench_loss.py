"""PCD, forward and backward, by every backend, against torch's KD and three other ways to write it, in one run.

python benchmarks/bench_loss.py --json benchmarks/results/loss.json

Other ways: one mask per group over all classes; slices of both logits after a full sort; the loop of the code that the
authors released, which computes another loss (see pcdistill.losses.pcd_released) and is here for its time alone.
Contenders take turns in every round, so that whatever else the machine does falls on all of them; a ratio is the median
over rounds of the time divided by KD's in the same round. Equality with float64 is checked before any time is taken.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _bench import cpu_name, machine, report, show

from pcdistill.losses.pcd import pcd_loss, stage_sizes
from pcdistill.losses.pcd_released import pcd_released_loss

T = 4.0
ROUNDS = 9
BLOCK_S = 0.02  # of calls in one round
SLOW_S = 0.2  # a call longer than this is repeated less
SKIP_S = 2.0  # and longer than this not at all
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def torch_kd(student, teacher):
    log_q, log_p = F.log_softmax(student / T, dim=1), F.log_softmax(teacher / T, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * T**2


def mask_per_group(stages: int) -> Loss:
    def loss(student, teacher):
        n, c = student.shape
        rank = (teacher - student).abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        total = student.new_zeros(n)
        for k in stage_sizes(stages, "both"):
            for j in range(k):
                outside = (rank < j * c // k) | (rank >= (j + 1) * c // k)
                log_p = (teacher / T).masked_fill(outside, float("-inf")).log_softmax(dim=1)
                log_q = (student / T).masked_fill(outside, float("-inf")).log_softmax(dim=1)
                kl = (log_p.exp() * (log_p - log_q).masked_fill(outside, 0.0)).sum(dim=1)
                total = total + kl * (1 - F.cosine_similarity(log_p.exp(), log_q.exp(), dim=1))
        return total.mean() * T**2

    return loss


def sort_and_slice(stages: int) -> Loss:
    def loss(student, teacher):
        n, c = student.shape
        order = (teacher - student).abs().sort(dim=1, descending=True, stable=True).indices
        z_s, z_t = student.gather(1, order) / T, teacher.gather(1, order) / T
        total = student.new_zeros(n)
        for k in stage_sizes(stages, "both"):
            for j in range(k):
                part = slice(j * c // k, (j + 1) * c // k)
                log_p, log_q = z_t[:, part].log_softmax(dim=1), z_s[:, part].log_softmax(dim=1)
                kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
                total = total + kl * (1 - F.cosine_similarity(log_p.exp(), log_q.exp(), dim=1))
        return total.mean() * T**2

    return loss


def released_loop(stages: int) -> Loss:
    def loss(student, teacher):
        total = student.new_zeros(len(student))
        for k in stage_sizes(stages, "both"):
            for j in range(k):
                size = student.shape[1]  # all classes, so that every block but the first is empty
                mask = torch.zeros_like(student)
                mask[:, j * size : (j + 1) * size] = 1
                if not j * size < size:
                    continue
                hidden = (1 - mask) * -1e9
                log_q = F.log_softmax((student + hidden) / T, dim=1)
                p = F.softmax((teacher + hidden) / T, dim=1)
                weight = 1 - F.cosine_similarity(p, log_q, dim=1)
                total = total + weight * F.kl_div(log_q, p, reduction="batchmean")
        return total.mean() * T**2

    return loss


def by_backend(stages: int, backend: str) -> Loss:
    def loss(student, teacher):
        return pcd_loss(student, teacher, temperature=T, stages=stages, backend=backend)

    return loss


def gradient(loss: Loss, student, teacher) -> tuple[torch.Tensor, torch.Tensor]:
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def check(name: str, loss: Loss, student, teacher, stages: int) -> None:
    """A fast wrong answer is no result."""
    if name == "torch KD":
        return
    exact = student.detach().double().requires_grad_(), teacher.double()
    truth = sort_and_slice(stages)
    if name == "released loop":
        truth = partial(pcd_released_loss, temperature=T, stages=stages)
    else:
        order = (teacher - student).abs().sort(dim=1, descending=True, stable=True).indices
        in_64 = (exact[1] - exact[0]).abs().gather(1, order).diff(dim=1)
        if in_64.gt(0).any():  # two differences that float32 rounds to one number, and a boundary may part them
            exact = student, teacher
    value, slope = gradient(loss, student, teacher)
    expected, expected_slope = gradient(truth, *exact)
    torch.testing.assert_close(value.double(), expected.double(), rtol=5e-5, atol=1e-6 * T**2)
    torch.testing.assert_close(
        slope.double(), expected_slope.double(), rtol=1e-3, atol=1e-4 * expected_slope.abs().max().item()
    )


def seconds(step: Callable[[], object], device: str, calls: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def peak_matrices(step: Callable[[], object], device: str, matrix_bytes: int) -> float:
    """Most memory held at once beyond the logits, the gradient included, in N x C matrices of the logits' dtype."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / matrix_bytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    held = peak = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / matrix_bytes


def bench(n: int, c: int, stages: int, device: str, names: list[str], rounds: int) -> list[dict[str, object]]:
    g = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(n, c, generator=g)).to(device).requires_grad_()
    teacher = (3 * torch.randn(n, c, generator=g)).to(device)
    makers: dict[str, Callable[[], Loss]] = {
        "torch KD": lambda: torch_kd,
        **{f"PCD {b}": (lambda b=b: by_backend(stages, b)) for b in ("eager", "triton")},
        "sort and slice": lambda: sort_and_slice(stages),
        "mask per group": lambda: mask_per_group(stages),
        "released loop": lambda: released_loop(stages),
    }
    steps: dict[str, Callable[[], object]] = {}
    plans: dict[str, tuple[int, int]] = {}
    rows: list[dict[str, object]] = []
    for name in names:
        loss = makers[name]()
        try:
            check(name, loss, student, teacher, stages)
        except ValueError as error:  # a backend that this machine does not have
            rows.append({"N": n, "C": c, "S": stages, "loss": name, "skipped": str(error)})
            continue

        def step(loss=loss):
            return gradient(loss, student, teacher)[1]

        once = min(seconds(step, device, 1) for _ in range(2))
        if once > SKIP_S:
            rows.append({"N": n, "C": c, "S": stages, "loss": name, "skipped": f"one call took {once:.1f} s"})
            continue
        steps[name] = step
        plans[name] = (max(1, int(BLOCK_S / once)), 3 if once > SLOW_S else rounds)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name, step in steps.items():
            calls, enough = plans[name]
            if i < enough:
                times[name].append(seconds(step, device, calls))
    for name, taken in times.items():
        quarter = statistics.quantiles(taken, n=4)
        rows.append(
            {
                "N": n,
                "C": c,
                "S": stages,
                "loss": name,
                "ms": statistics.median(taken) * 1e3,
                "iqr_ms": (quarter[2] - quarter[0]) * 1e3,
                "min_ms": min(taken) * 1e3,
                "x_kd": statistics.median(a / b for a, b in zip(taken, times["torch KD"], strict=False)),
                "x_kd_of_minima": min(taken) / min(times["torch KD"]),
                "peak_matrices": peak_matrices(steps[name], device, student.numel() * student.element_size()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    info = machine(args.device) | {"cpu": cpu_name(), "cores": os.cpu_count()}
    command = " ".join(["python", *sys.argv])
    rows: list[dict[str, object]] = []
    for c in args.classes:
        for s in args.stages:
            names = ["torch KD", "PCD eager"]
            if args.device == "cuda" and c <= 16384:
                names.append("PCD triton")
            # The other ways grow with S * C: beyond 1000 classes they are shown for S = 3 alone.
            if c <= 1000 or s == 3:
                names += ["sort and slice", "mask per group", "released loop"]
            found = bench(args.batch, c, s, args.device, names, args.rounds)
            for row in found:
                show(row)
            rows += found
    info["load after"] = round(os.getloadavg()[0], 1)
    if max(info["load before"], info["load after"]) > torch.get_num_threads() + 0.5:
        info["note"] = "other work ran on this machine: times are too long and ratios uncertain; run it again when idle"
    report(rows, info, command, args.json)


if __name__ == "__main__":
    main()
