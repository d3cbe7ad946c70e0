"""An epoch of PCD from a teacher's cache, and with the teacher live, against an epoch of the student alone.

python benchmarks/bench_cache.py --json benchmarks/results/cache--MACHINE.json

With --shard-images an epoch's logits lie in several files, each opened by a thread while the one before is in use.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from _bench import machine, report, show
from _training import our_speed, summary, write_data, write_teacher

from pcdistill.commands.cache import make_cache
from pcdistill.distillation import cache_store
from pcdistill.recipe import load_recipe

PAIRS = [("cifar/resnet56", "cifar/resnet20"), ("cifar/resnet32x4", "cifar/resnet8x4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=None, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="that are timed")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--storage", choices=["float16", "int8"], default="float16")
    parser.add_argument("--shard-images", type=int, default=None, help="at most so many images in a file of the cache")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="of teacher and student, the first so many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps or (16 if args.device == "cpu" else 200)
    if args.shard_images is not None:
        cache_store.SHARD_ROWS = args.shard_images

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, steps, args.batch)
        for teacher_name, student_name in PAIRS[: args.pairs]:
            weights = write_teacher(folder, teacher_name)
            shared = {"train.device": args.device, "train.precision": args.precision}
            made = load_recipe(
                "cifar100",
                values={
                    **shared,
                    "data.name": str(data),
                    "data.batch_size": args.batch,
                    "teacher.name": teacher_name,
                    "teacher.weights": str(weights),
                    "allow": ["weak-teacher"],
                },
            )
            cache = folder / f"cache-{teacher_name.split('/')[1]}"
            make_cache(made, cache, epochs=args.epochs + 1, storage=args.storage)
            found = {}
            for kind, values in (
                ("student alone", {"method": "none"}),
                ("PCD, from the cache", {"method": "pcd", "teacher.cache": str(cache)}),
                ("PCD, teacher live", {"method": "pcd"}),
            ):
                speeds = our_speed(
                    data, (teacher_name, weights), student_name, args.batch, args.epochs, **{**shared, **values}
                )
                found[kind] = summary(speeds)
                show({"pair": student_name, "epoch": kind, **found[kind]})
            alone = found["student alone"]["images_per_second"]
            pair = f"{teacher_name.split('/')[1]} to {student_name.split('/')[1]}"
            for kind, values in found.items():
                rows.append({"pair": pair, "epoch": kind, **values, "time ratio": alone / values["images_per_second"]})
    report(rows, machine(args.device), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
