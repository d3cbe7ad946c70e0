"""What benchmarks of whole training steps share: data, a teacher on disk, our engine, a loop as others write it."""

import contextlib
import csv
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from pcdistill.commands.session import run
from pcdistill.models import build_model, save_weights
from pcdistill.recipe import load_recipe

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CLASSES = 100


def write_data(folder: Path, steps: int, batch: int) -> Path:
    """Noise in the shape of CIFAR-100, enough for `steps` batches: only its size matters here."""
    rng = np.random.default_rng(0)
    n, held_out = steps * batch, 200
    path = folder / "noise.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        y_train=np.arange(n) % CLASSES,
        x_val=rng.integers(0, 256, (held_out, 32, 32, 3), dtype=np.uint8),
        y_val=np.arange(held_out) % CLASSES,
        x_test=rng.integers(0, 256, (held_out, 32, 32, 3), dtype=np.uint8),
        y_test=np.arange(held_out) % CLASSES,
    )
    return path


def write_teacher(folder: Path, name: str) -> Path:
    """An untrained teacher's weights: only its cost matters here."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=CLASSES, in_channels=3, image_size=32)
    path = folder / f"{name.replace('/', '-')}.safetensors"
    save_weights(model, path, {"model": name, "classes": [str(i) for i in range(CLASSES)]})
    return path


def our_speed(
    data: Path, teacher: tuple[str, Path], student: str, batch: int, epochs: int, **values: Any
) -> list[float]:
    """Images per second of a run of the engine, epoch by epoch; the first, which warms up and compiles, is left out."""
    recipe = load_recipe(
        "cifar100",
        values={
            "data.name": str(data),
            "data.batch_size": batch,
            "teacher.name": teacher[0],
            "teacher.weights": str(teacher[1]),
            "student.name": student,
            "train.epochs": epochs + 1,
            "allow": ["weak-teacher"],
            **values,
        },
    )
    with tempfile.TemporaryDirectory() as out:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # it warns of the untrained teacher
            run(recipe, Path(out) / "run")
        with open(Path(out) / "run" / "metrics.csv", newline="") as file:
            return [float(row["images_per_second"]) for row in csv.DictReader(file)][1:]


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images one by one through PIL, as torchvision's data sets give them."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["x_train"], arrays["y_train"]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def masked_pcd(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 4.0, stages: int = 3
) -> torch.Tensor:
    """What the released PCD code computes, the way such code is written: a mask of [N, C] for every group."""
    n, c = student.shape
    total = student.new_zeros(())
    for direction in (range(stages, 0, -1), range(1, stages + 1)):
        for groups in direction:
            for group in range(groups):
                inside = torch.zeros(n, c, dtype=torch.bool)
                inside[:, group * c : (group + 1) * c] = True  # its block size is C: every group but the first is empty
                inside = inside.to(student.device)
                log_q = F.log_softmax(student.masked_fill(~inside, -1e9) / temperature, dim=1)
                p = F.softmax(teacher.masked_fill(~inside, -1e9) / temperature, dim=1)
                weight = 1 - F.cosine_similarity(p, log_q, dim=1)
                kl = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
                total = total + (kl * weight).mean()
    return total


def plain_speed(
    data: Path, teacher: nn.Module, student: nn.Module, batch: int, epochs: int, device: str
) -> list[float]:
    """Images per second of a loop as released repositories have it: float32, PIL workers, numbers read every step."""
    workers = 2 if device == "cpu" else 8
    loader = torch.utils.data.DataLoader(Pictures(data), batch, shuffle=True, num_workers=workers, drop_last=True)
    teacher.to(device).eval()
    student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    speeds = []
    for _ in range(epochs + 1):
        started, seen, shown = time.perf_counter(), 0, 0.0
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            logits = student(images)
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = F.cross_entropy(logits, target) + masked_pcd(logits, teacher_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shown += loss.item() + (logits.argmax(1) == target).float().mean().item()
            seen += len(target)
        speeds.append(seen / (time.perf_counter() - started))
    return speeds[1:]


def summary(speeds: list[float]) -> dict[str, float]:
    """Median and interquartile range of images per second."""
    low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else (speeds[0],) * 3
    return {"images_per_second": middle, "iqr": high - low}
