"""What following a strength costs a whole training step, against the same step with a weight.

python benchmarks/bench_strength.py --json benchmarks/results/strength--MACHINE.json

A step is the student's forward pass, the objective, the backward pass and SGD, in float32. The teacher's output is
given, as from a cache: the case in which the measurement weighs most. A round is 20 steps of each, of which one
measures, as it is after the first 20 steps of a run. The ratio is the median over rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _bench import machine, report, show

from pcdistill.distillation.objective import build_objective
from pcdistill.distillation.strength import EVERY, FIRST_STEPS
from pcdistill.distillation.taps import Taps
from pcdistill.models import build_model
from pcdistill.recipe import TermConfig

METHODS = {"kd": False, "pcd": False, "dist": False, "fitnet": True, "reviewkd": True}  # method: compares features


def rounds_of(method: str, features: bool, rounds: int) -> dict[str, Any]:
    """Medians of the time of 20 steps with a weight and with a strength, and of their ratio."""
    torch.manual_seed(0)
    student = build_model("cifar/resnet20", num_classes=100, in_channels=3, image_size=32).train()
    teacher = build_model("cifar/resnet56", num_classes=100, in_channels=3, image_size=32)
    images, target = torch.randn(32, 3, 32, 32), torch.arange(32)
    student_taps, teacher_taps = Taps(student), Taps(teacher.eval())
    with torch.no_grad():
        seen, given = student_taps.run(images), teacher_taps.run(images)
    context = {"student": seen, "teacher": given, "n_data": 32, "labels": None, "num_classes": 100}
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)

    def objective(**options: Any) -> Any:
        terms = [TermConfig("ce"), TermConfig(method, **options)]
        return build_objective(terms, num_classes=100, context=context if features else None)

    def steps(of: Any) -> float:
        started = time.process_time()
        for _ in range(EVERY):
            optimizer.zero_grad()
            out = student_taps.run(images) if features else student(images)
            of(out, given if features else given.logits, target)["loss"].backward()
            optimizer.step()
        return time.process_time() - started

    weighed, followed = objective(), objective(strength=4.0)
    next(iter(followed.strengths.values())).steps = FIRST_STEPS
    steps(weighed)
    pairs = [(steps(weighed), steps(followed)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in pairs)
    return {
        "method": method,
        "place": "feature maps" if features else "logits",
        "ms_a_step": 1e3 * statistics.median(a for a, _ in pairs) / EVERY,
        "x_weight_step": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    info, rows = machine("cpu"), []
    for method, features in METHODS.items():
        rows.append(rounds_of(method, features, args.rounds))
        show(rows[-1])
    report(rows, info, f"python {' '.join(sys.argv)}", args.json)


if __name__ == "__main__":
    main()
