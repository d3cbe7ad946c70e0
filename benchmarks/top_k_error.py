"""How far KD and PCD move when the teacher's logits come from a cache of the k largest alone.

python benchmarks/top_k_error.py RUN --data FILE.npz --teacher cifar/resnet20 --teacher-weights FILE

Relative change of the loss, and the cosine between the changed gradient and the exact one, on validation images of a
trained student.
"""

import argparse
import sys
from pathlib import Path

import torch
from _bench import machine, report

from pcdistill.classification.data import build_data
from pcdistill.commands.folder import read_recipe
from pcdistill.data.loader import Stream
from pcdistill.distillation.cache_store import CacheInfo
from pcdistill.losses import kd_loss, pcd_loss
from pcdistill.models import build_model, load_weights
from pcdistill.recipe import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    recipe = read_recipe(args.run)
    data = build_data(DataConfig(args.data, eval_batch_size=500, limit=recipe.data.limit), Stream())
    images = next(iter(data.val.epoch(0))).images
    c = len(data.classes)
    student = build_model(
        recipe.student.name, num_classes=c, in_channels=3, image_size=32, kwargs=dict(recipe.student.kwargs)
    )
    load_weights(student, str(args.run / "student.safetensors"))
    teacher = build_model(args.teacher, num_classes=c, in_channels=3, image_size=32)
    load_weights(teacher, args.teacher_weights)
    with torch.no_grad():
        z_s, z_t = student.eval()(images), teacher.eval()(images)

    rows = []
    for k in (5, 10, 20, 50, None):
        form = CacheInfo("", "", 0, 1, 1, len(z_t), c, 1, k, 4.0)
        again = form.decode(form.encode(z_t))
        row: dict[str, object] = {"k": k or "all, float16", "bytes per image": form.row.itemsize}
        for name, loss in (("KD", kd_loss), ("PCD", pcd_loss)):
            z = z_s.clone().requires_grad_()
            exact = loss(z, z_t)
            changed = loss(z, again)
            slope, other = (torch.autograd.grad(value, z)[0] for value in (exact, changed))
            row[f"{name}: change"] = float(changed / exact - 1)
            row[f"{name}: cosine"] = float(torch.cosine_similarity(slope, other, dim=1).mean())
        rows.append(row)
    report(rows, machine("cpu"), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
