"""How much KD a PCD term amounts to: the ratio of their gradients' sizes, for an untrained and for trained students.

python benchmarks/effective_weight.py RUN... --data FILE.npz --teacher cifar/resnet20 --teacher-weights FILE

RUN is the folder of a finished run; its student and recipe are taken. The gradient is that of the loss with respect to
the student's logits, on validation images; its size is the mean over samples of its Euclidean norm. "cosine" is the
mean over samples of the cosine between PCD's gradient and KD's: 1 would mean that PCD is KD at another weight.
"""

import argparse
import sys
from pathlib import Path

import torch
from _bench import machine, report

from pcdistill.classification.data import build_data
from pcdistill.commands.folder import read_recipe
from pcdistill.data.loader import Stream
from pcdistill.losses import kd_loss, pcd_loss
from pcdistill.models import build_model, load_weights
from pcdistill.recipe import DataConfig

STAGES = (1, 2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    config = read_recipe(args.runs[0]).data
    data = build_data(DataConfig(args.data, eval_batch_size=500, limit=config.limit), Stream())
    images = next(iter(data.val.epoch(0))).images

    def logits(name: str, weights: str | None, kwargs: dict[str, object]) -> torch.Tensor:
        torch.manual_seed(0)
        model = build_model(name, num_classes=len(data.classes), in_channels=3, image_size=32, kwargs=kwargs)
        if weights is not None:
            load_weights(model, weights)
        with torch.no_grad():
            return model.eval()(images)

    teacher = logits(args.teacher, args.teacher_weights, {})
    student = read_recipe(args.runs[0]).student
    students = {"untrained": logits(student.name, None, student.kwargs)}
    for run in args.runs:
        name = "/".join(run.parts[-2:])
        students[f"trained: {name}"] = logits(student.name, str(run / "student.safetensors"), student.kwargs)
    rows = []
    for name, z in students.items():
        base = gradient(lambda s: kd_loss(s, teacher), z)
        for stages in STAGES:
            found = gradient(lambda s, k=stages: pcd_loss(s, teacher, stages=k), z)
            rows.append(
                {
                    "student": name,
                    "S": stages,
                    "weight of KD": float(found.norm(dim=1).mean() / base.norm(dim=1).mean()),
                    "cosine": float(torch.cosine_similarity(found, base, dim=1).mean()),
                }
            )
    report(rows, machine("cpu"), " ".join(["python", *sys.argv]), args.json)


def gradient(loss, logits: torch.Tensor) -> torch.Tensor:
    z = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


if __name__ == "__main__":
    main()
