"""What each way to store a teacher's logits takes on disk, and how far it turns the gradient of KD.

python benchmarks/cache_forms.py --json benchmarks/results/cache-forms--cpu.json

Logits are drawn: a row's largest is of its class, the others fall off as a trained network's do (normal, plus a class
structure of low rank), with a spread that gives the teacher a mean top probability near `--confidence`. The student's
are the teacher's with noise. The angle is between KD's gradient with the stored logits and with the exact ones.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from _bench import machine, report

from pcdistill.distillation.cache_store import CacheInfo
from pcdistill.losses import kd_loss

TEMPERATURE = 4.0


def logits(images: int, classes: int, confidence: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits [N, C], the teacher's scaled to a mean top probability of `confidence`."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (images,), generator=generator)
    names = torch.randn(classes, 32, generator=generator) / math.sqrt(32)
    shape = names[target] @ names.T * 3 + torch.randn(images, classes, generator=generator)
    shape[torch.arange(images), target] += 3
    low, high = 0.1, 50.0
    for _ in range(40):
        scale = (low + high) / 2
        if float((shape * scale).softmax(1).amax(1).mean()) < confidence:
            low = scale
        else:
            high = scale
    teacher = shape * low
    return teacher + 0.5 * low * torch.randn(images, classes, generator=generator), teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--confidence", type=float, default=0.85)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows = []
    for classes in (100, 1000):
        student, teacher = logits(args.images, classes, args.confidence)
        z = student.requires_grad_()
        exact = torch.autograd.grad(kd_loss(z, teacher, temperature=TEMPERATURE), z)[0].double()
        forms = [("float16", None), ("int8", None), *(("float16", k) for k in (10, 50, classes // 5) if k < classes)]
        for storage, k in forms:
            form = CacheInfo("", "", 0, 1, 1, len(z), classes, 1, k, TEMPERATURE, storage)
            again = form.decode(form.encode(teacher))
            changed = torch.autograd.grad(kd_loss(z, again, temperature=TEMPERATURE), z)[0].double()
            # Through the difference: a cosine so near 1 has no digits left for a small angle.
            unit, other = (torch.nn.functional.normalize(one, dim=1) for one in (exact, changed))
            angle = 2 * torch.asin(((unit - other).norm(dim=1) / 2).clamp(max=1))
            rows.append(
                {
                    "classes": classes,
                    "stored": storage if k is None else f"top {k}",
                    "bytes per image": form.row.itemsize,
                    "cosine": float(torch.cosine_similarity(exact, changed, dim=1).mean()),
                    "angle, degrees": float(angle.rad2deg().mean()),
                    "largest angle": float(angle.rad2deg().max()),
                }
            )
    report(rows, machine("cpu"), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
