"""How hard detection methods pull at their default weights, on a fresh student: beside the detector's own losses.

python benchmarks/detection_pull.py --teacher-weights FILE [--methods mgd,dfmsd,...] [--steps 20] [--set KEY=VALUE]

"pull" is the term's gradient on what it compares over the labels' there, under the default weight; 1 is equally hard.
"share" is the term's part of the whole loss. Both are of the first steps, in which the student trains at strength 1.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from _bench import machine, report

from pcdistill.detection.task import Detection
from pcdistill.distillation.objective import at_strength
from pcdistill.engine.placement import make_accelerator, make_placement
from pcdistill.recipe import Recipe, load_recipe, with_method

METHODS = "kd,pcd,fpn-fitnet,mgd,dmkd,fgd,pkd,dfmsd,cwd,acam"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--recipe", default="digits-detection")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = load_recipe(args.recipe, args.set, values={"teacher.weights": args.teacher_weights})
    base = replace(base, methods={})  # the names' own weights
    rows = [pull_of(with_method(base, method, 0), args.steps) for method in args.methods.split(",")]
    report(rows, machine("cpu"), " ".join(["python", *sys.argv]), args.json)


def pull_of(recipe: Recipe, steps: int) -> dict[str, object]:
    """One method's row."""
    (weight,) = (term.weight for term in recipe.losses if term.method != "detector")
    equal = at_strength(recipe, 1.0)
    assert equal is not None
    task, accelerator = Detection(), make_accelerator(recipe.train)
    data = task.data(equal, accelerator)
    torch.manual_seed(0)
    student = task.student(equal, data)
    teacher = task.teacher(equal.all_teachers[0], student, data, ())
    placement = make_placement(task.train_config(equal), accelerator, student)
    distiller = task.distiller(equal, student, teacher, data, placement).train()
    optimiser = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    shares, batches = [], data.train.epoch(0)
    for _ in range(steps):
        parts = distiller(next(batches))
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        own, term = float(parts["loss/detector"]), weight * float(parts[f"loss/{recipe.method}"])
        shares.append(term / (own + term))
    equal_weight = float(parts[f"loss/weight/{recipe.method}"])
    return {
        "method": recipe.method,
        "default weight": weight,
        "weight at strength 1": equal_weight,
        "pull": weight / equal_weight,
        "share": sum(shares) / len(shares),
    }


if __name__ == "__main__":
    main()
