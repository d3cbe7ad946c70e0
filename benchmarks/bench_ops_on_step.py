"""What each way to compute PCD costs a whole training step, against the same step with torch's KD.

python benchmarks/bench_ops_on_step.py --json benchmarks/results/ops_on_step--MACHINE.json

A step is the student's forward pass, loss, backward pass and SGD, in float32. The teacher's logits are given, as from a
cache: the case in which the loss weighs most. All losses take one step in every round, in an order that changes from
round to round; the ratio is the median over rounds of the step's time over that of KD's step in the same round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from _bench import machine, report, show
from bench_loss import Loss, by_backend, torch_kd

from pcdistill.models import build_model
from pcdistill.ops.pcd import Backend

CASES = {100: ("cifar/resnet20", 32, 64), 1000: ("torchvision/resnet18", 64, 32)}  # student, pixels, batch


def contenders(stages: list[int], device: str) -> dict[str, Loss]:
    """KD, and PCD by every backend that the device has, for each S."""
    on_cuda_alone = () if device == "cuda" else ("triton",)
    backends = [name for name in get_args(Backend) if name not in ("auto", *on_cuda_alone)]
    named = {f"PCD {name}, S = {s}": by_backend(s, name) for s in stages for name in backends}
    return {"torch KD": torch_kd, **named}


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time on CUDA; on a CPU the time that this process had it, which other work changes less."""
    if device != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bench(classes: int, losses: dict[str, Loss], device: str, rounds: int) -> list[dict[str, Any]]:
    """A row a loss: time of its step, of the loss alone, and the ratio of steps."""
    name, pixels, batch = CASES[classes]
    torch.manual_seed(0)
    student = build_model(name, num_classes=classes, in_channels=3, image_size=pixels).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    teacher = 3 * torch.randn(batch, classes, device=device)
    logits = (3 * torch.randn(batch, classes, device=device)).requires_grad_()

    def step(loss: Loss) -> None:
        optimizer.zero_grad()
        loss(student(images), teacher).backward()
        optimizer.step()

    steps: dict[str, list[float]] = {name: [] for name in losses}
    alone: dict[str, list[float]] = {name: [] for name in losses}
    order = list(losses)
    for i in range(rounds + 2):  # two rounds warm up
        order = order[1:] + order[:1]
        for key in order:
            taken = seconds(lambda key=key: step(losses[key]), device)
            own = seconds(lambda key=key: torch.autograd.grad(losses[key](logits, teacher), logits), device)
            if i >= 2:
                steps[key].append(taken)
                alone[key].append(own)
    base = steps["torch KD"]
    rows = []
    for key in losses:
        ratios = [mine / kd for mine, kd in zip(steps[key], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "student": f"{name}, {pixels} px, batch {batch}, {classes} classes",
                "loss": key,
                "step_ms": statistics.median(steps[key]) * 1e3,
                "x_kd_step": middle,
                "iqr": high - low,
                "loss_ms": statistics.median(alone[key]) * 1e3,
                "loss_in_%_of_kd_step": 100 * statistics.median(alone[key]) / statistics.median(base),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--classes", type=int, nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU their times are summed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for classes in args.classes:
        found = bench(classes, contenders(args.stages, args.device), args.device, args.rounds)
        for row in found:
            show(row)
        rows += found
    report(rows, machine(args.device), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
