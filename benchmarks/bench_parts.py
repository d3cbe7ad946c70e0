"""What each way to speed up a step gains: the teacher's forward pass and the student's step alone, against plain torch.

python benchmarks/bench_parts.py --json benchmarks/results/parts--MACHINE.json

All take turns, in float32; the ratio is the median of those within a round. "folded" is what the engine does without
being asked, "compiled" what `train.compile` does. The others were tried: constants folded in by inductor's `freezing`,
torch.jit's `optimize_for_inference`, and the teacher on a part of the batch after another.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import Round, Rounds, in_turns, machine, report
from _training import CLASSES
from torch import nn
from torch.nn import functional as F

from pcdistill.distillation.folding import fold_batchnorm
from pcdistill.models import build_model

PAIRS = [("cifar/resnet56", "cifar/resnet20"), ("cifar/resnet32x4", "cifar/resnet8x4")]
BATCH = 64
LAST = torch.channels_last
Call = Callable[[torch.Tensor], Any]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=CLASSES, in_channels=3, image_size=32)


def teacher_round(name: str, way: str) -> Round:
    """A round is one batch through the teacher."""
    images = torch.randn(BATCH, 3, 32, 32)
    plain = built(name).eval().requires_grad_(False)
    folded = copy.deepcopy(fold_batchnorm(plain, images[:2])).to(memory_format=LAST)
    if way != "plain":
        images = images.contiguous(memory_format=LAST)
    call: Call = plain if way == "plain" else folded
    if way == "folded, compiled":
        call = torch.compile(folded)
    elif way == "folded, compiled and frozen":
        call = torch.compile(folded, options={"freezing": True})
    elif way == "torch.jit":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it deprecated
            call = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(plain, images)))
    elif way.endswith("at a time"):
        parts = images.split(int(way.split()[1]))
        return _timed(lambda: torch.cat([folded(part) for part in parts]))
    return _timed(lambda: call(images))


def _timed(call: Callable[[], Any]) -> Round:
    @torch.no_grad()
    def once() -> float:
        started = time.perf_counter()
        call()
        return BATCH / (time.perf_counter() - started)

    once()
    return once


def student_round(name: str, way: str) -> Round:
    """A round is one step: forward pass, cross-entropy, backward pass, SGD."""
    student = built(name).train()
    images, target = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % CLASSES
    if "channels last" in way:
        student, images = student.to(memory_format=LAST), images.contiguous(memory_format=LAST)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=way != "plain")
    model = torch.compile(student) if "compiled" in way else student

    def once() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
        return BATCH / (time.perf_counter() - started)

    once()
    return once


TEACHER = (
    "plain",
    "folded",
    "folded, 8 at a time",
    "folded, 16 at a time",
    "torch.jit",
    "folded, compiled",
    "folded, compiled and frozen",
)
STUDENT = ("plain", "channels last", "compiled", "channels last, compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, nargs="+", choices=range(len(PAIRS)), default=[*range(len(PAIRS))])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    info, rows = machine("cpu"), []
    rounds = Rounds(args.json, {**info, "batch": BATCH}, args.rounds)
    for pair in (PAIRS[i] for i in args.pairs):
        for part, name, make, named in (
            ("teacher, forward pass", pair[0], teacher_round, TEACHER),
            ("student, step", pair[1], student_round, STUDENT),
        ):
            found = rounds.run(f"{name}, {part}", {way: partial(make, name, way) for way in named})
            rows += [{"part": f"{name}, {part}", "way": way, **in_turns(found[way], found["plain"])} for way in named]
    report(rows, info, " ".join(["python", *sys.argv]), args.json)
    rounds.close()


if __name__ == "__main__":
    main()
