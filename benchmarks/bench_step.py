"""Whole training steps of PCD: our engine against a plain float32 loop, written as the released repositories write it.

python benchmarks/bench_step.py --json benchmarks/results/step--MACHINE.json

All take turns, a round of some steps each; the ratio is the median of those within a round. A figure is printed as it
comes, and a benchmark that was stopped continues. bfloat16 is left out where the processor would emulate it.
From the cache the teacher does not run; its answers were stored before.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import Rounds, in_turns, machine, report
from _training import (
    CLASSES,
    cached_round,
    masked_pcd,
    our_round,
    own_precision,
    plain_round,
    write_data,
    write_teacher,
)

from pcdistill.losses import pcd_released_loss
from pcdistill.models import build_model, load_weights

PAIRS = [("cifar/resnet56", "cifar/resnet20"), ("cifar/resnet32x4", "cifar/resnet8x4")]
PLAIN = "plain loop"
CACHED = ", from the cache"
OURS: dict[str, dict[str, Any]] = {  # those that compile come last: they take long to begin
    "ours, float32": {"train.precision": "float32"},
    "ours, bfloat16": {"train.precision": "bfloat16"},
    f"ours, float32{CACHED}": {"train.precision": "float32"},
    "ours, float32, compiled": {"train.precision": "float32", "train.compile": True},
    "ours, bfloat16, compiled": {"train.precision": "bfloat16", "train.compile": True},
    f"ours, float32, compiled{CACHED}": {"train.precision": "float32", "train.compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=None, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, nargs="+", choices=range(len(PAIRS)), default=[*range(len(PAIRS))])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps or (4 if args.device == "cpu" else 100)

    # The loop's loss is the released code's: checked against ours before anything is timed.
    torch.manual_seed(0)
    student, teacher = torch.randn(8, CLASSES), torch.randn(8, CLASSES)
    torch.testing.assert_close(masked_pcd(student, teacher), pcd_released_loss(student, teacher), rtol=1e-4, atol=1e-4)

    info = machine(args.device)
    rounds = Rounds(args.json, {**info, "batch": args.batch, "steps": steps}, args.rounds)
    native = own_precision(args.device) == "bfloat16"
    if not native:
        print("bfloat16 is left out: this processor emulates it", flush=True)
    ours = {name: values for name, values in OURS.items() if native or "bfloat16" not in name}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), steps, args.batch)
        for teacher_name, student_name in (PAIRS[i] for i in args.pairs):
            weights = write_teacher(Path(folder), teacher_name)
            big, small = (
                build_model(name, num_classes=CLASSES, in_channels=3, image_size=32)
                for name in (teacher_name, student_name)
            )
            load_weights(big, str(weights))
            contenders = {PLAIN: partial(plain_round, data, big, small, args.batch, steps, args.device)}
            for name, values in ours.items():
                whole = {"train.device": args.device, **values}
                start = partial(cached_round, Path(folder), "float16") if name.endswith(CACHED) else our_round
                contenders[name] = partial(start, data, (teacher_name, weights), student_name, args.batch, **whole)
            pair = f"{teacher_name.split('/')[1]} to {student_name.split('/')[1]}"
            found = rounds.run(pair, contenders)
            rows += [{"pair": pair, "loop": name, **in_turns(found[name], found[PLAIN])} for name in contenders]
    report(rows, info, " ".join(["python", *sys.argv]), args.json)
    rounds.close()


if __name__ == "__main__":
    main()
