"""Whole training steps of PCD: our engine against a plain float32 loop, written as the released repositories write it.

python benchmarks/bench_step.py --json benchmarks/results/step--MACHINE.json
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from _bench import machine, report, show
from _training import CLASSES, masked_pcd, our_speed, plain_speed, summary, write_data, write_teacher

from pcdistill.losses import pcd_released_loss
from pcdistill.models import build_model, load_weights

PAIRS = [("cifar/resnet56", "cifar/resnet20"), ("cifar/resnet32x4", "cifar/resnet8x4")]
CONTENDERS = {
    "ours, float32": {"train.precision": "float32"},
    "ours, float32, compiled": {"train.precision": "float32", "train.compile": True},
    "ours, bfloat16": {"train.precision": "bfloat16"},
    "ours, bfloat16, compiled": {"train.precision": "bfloat16", "train.compile": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=None, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="that are timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps or (16 if args.device == "cpu" else 200)

    # The loop's loss is the released code's: checked against ours before anything is timed.
    torch.manual_seed(0)
    student, teacher = torch.randn(8, CLASSES), torch.randn(8, CLASSES)
    torch.testing.assert_close(masked_pcd(student, teacher), pcd_released_loss(student, teacher), rtol=1e-4, atol=1e-4)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), steps, args.batch)
        for teacher_name, student_name in PAIRS:
            weights = write_teacher(Path(folder), teacher_name)
            big, small = (
                build_model(name, num_classes=CLASSES, in_channels=3, image_size=32)
                for name in (teacher_name, student_name)
            )
            load_weights(big, str(weights))
            found = {"plain loop": summary(plain_speed(data, big, small, args.batch, args.epochs, args.device))}
            for name, values in CONTENDERS.items():
                speeds = our_speed(
                    data,
                    (teacher_name, weights),
                    student_name,
                    args.batch,
                    args.epochs,
                    **{"train.device": args.device, **values},
                )
                found[name] = summary(speeds)
                show({"pair": student_name, "loop": name, **found[name]})
            base = found["plain loop"]["images_per_second"]
            pair = f"{teacher_name.split('/')[1]} to {student_name.split('/')[1]}"
            for name, values in found.items():
                rows.append({"pair": pair, "loop": name, **values, "ratio": values["images_per_second"] / base})
    report(rows, machine(args.device), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
