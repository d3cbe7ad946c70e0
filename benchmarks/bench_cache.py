"""An epoch of PCD from a teacher's cache, and with the teacher live, against an epoch of the student alone.

python benchmarks/bench_cache.py --json benchmarks/results/cache--MACHINE.json

All take turns, an epoch each; "time ratio" is the median of those within a round. A figure is printed as it comes, and
a benchmark that was stopped continues. The precision is bfloat16, or float32 where the processor would emulate it.
With --shard-images an epoch's logits lie in several files, each opened by a thread while the one before is in use.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from _bench import Rounds, in_turns, machine, report
from _training import cached_round, our_round, own_precision, write_data, write_teacher

from pcdistill.distillation import cache_store

PAIRS = [("cifar/resnet56", "cifar/resnet20"), ("cifar/resnet32x4", "cifar/resnet8x4")]
ALONE = "student alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=None, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, nargs="+", choices=range(len(PAIRS)), default=[*range(len(PAIRS))])
    parser.add_argument("--precision", choices=("bfloat16", "float32"))
    parser.add_argument("--storage", choices=("float16", "int8"), default="float16")
    parser.add_argument("--shard-images", type=int, default=None, help="at most so many images in a file of the cache")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps or (4 if args.device == "cpu" else 200)
    precision = args.precision or own_precision(args.device)
    if args.shard_images is not None:
        cache_store.SHARD_ROWS = args.shard_images

    info = {**machine(args.device), "precision": precision}
    rounds = Rounds(args.json, {**info, "batch": args.batch, "steps": steps}, args.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, steps, args.batch)
        for teacher_name, student_name in (PAIRS[i] for i in args.pairs):
            weights = write_teacher(folder, teacher_name)
            shared = {"train.device": args.device, "train.precision": precision}
            of = (data, (teacher_name, weights), student_name, args.batch)
            contenders = {
                ALONE: partial(our_round, *of, **shared, method="none"),
                "PCD, from the cache": partial(cached_round, folder, args.storage, *of, **shared, method="pcd"),
                "PCD, teacher live": partial(our_round, *of, **shared, method="pcd"),
            }
            pair = f"{teacher_name.split('/')[1]} to {student_name.split('/')[1]}"
            found = rounds.run(pair, contenders)
            for kind in contenders:
                speeds = in_turns(found[kind], found[ALONE])
                ratio = 1 / speeds.pop("ratio")
                rows.append({"pair": pair, "epoch": kind, **speeds, "time ratio": ratio})
    report(rows, info, " ".join(["python", *sys.argv]), args.json)
    rounds.close()


if __name__ == "__main__":
    main()
