"""What benchmarks of whole training steps share: data, a teacher on disk, our engine, a loop as others write it."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import Round
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from pcdistill.commands.cache import Storage, make_cache
from pcdistill.commands.session import Session
from pcdistill.engine.placement import emulates_bfloat16
from pcdistill.models import build_model, save_weights
from pcdistill.recipe import load_recipe

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CLASSES = 100


def write_data(folder: Path, steps: int, batch: int) -> Path:
    """Noise in the shape of CIFAR-100, enough for `steps` batches: only its size matters here."""
    rng = np.random.default_rng(0)
    n, held_out = steps * batch, CLASSES
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


def our_round(data: Path, teacher: tuple[str, Path], student: str, batch: int, **values: Any) -> Round:
    """A round is an epoch of the engine; a step before the first warms up and compiles."""
    recipe = load_recipe(
        "cifar100",
        values={
            "data.name": str(data),
            "data.batch_size": batch,
            "teacher.name": teacher[0],
            "teacher.weights": str(teacher[1]),
            "student.name": student,
            "train.epochs": 1000,
            "allow": ["weak-teacher"],
            **values,
        },
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # it warns of the untrained teacher
        session = Session(recipe)
        session.prepare()
    trainer = session.trainer

    def epoch(first: int = 0) -> float:
        trainer.batch = first
        started = time.perf_counter()
        trainer._train_epoch()
        wait(trainer.placement.device.type)
        seen = (len(trainer.batches) - first) * batch
        trainer.epoch += 1
        trainer.tally.clear()
        trainer.watch.clear()
        return seen / (time.perf_counter() - started)

    epoch(len(trainer.batches) - 1)
    return epoch


def cached_round(
    folder: Path, storage: Storage, data: Path, teacher: tuple[str, Path], student: str, batch: int, **values: Any
) -> Round:
    """A round from a cache of one epoch, which is made first, and repeated."""
    cache = folder / f"cache-{teacher[0].split('/')[1]}"
    made = {
        **values,
        "method": "kd",
        "data.name": str(data),
        "data.batch_size": batch,
        "teacher.name": teacher[0],
        "teacher.weights": str(teacher[1]),
        "allow": ["weak-teacher"],
    }
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # it warns of the untrained teacher
        if not cache.exists():
            make_cache(load_recipe("cifar100", values=made), cache, epochs=1, storage=storage)
    return our_round(data, teacher, student, batch, **values, **{"teacher.cache": str(cache)})


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def own_precision(device: str) -> str:
    """The fastest precision that the machine computes in, rather than emulates."""
    return "float32" if device == "cpu" and emulates_bfloat16() else "bfloat16"


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


def plain_round(data: Path, teacher: nn.Module, student: nn.Module, batch: int, steps: int, device: str) -> Round:
    """A round is `steps` of a loop as released repositories have it: float32, PIL workers, numbers read every step."""
    pictures = Pictures(data)
    forever = torch.utils.data.RandomSampler(pictures, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(pictures, batch, sampler=forever, num_workers=2 if device == "cpu" else 8)
    given = iter(loader)
    teacher.to(device).eval()
    student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def some(count: int = steps) -> float:
        started, seen, shown = time.perf_counter(), 0, 0.0
        for _ in range(count):
            images, target = (part.to(device) for part in next(given))
            logits = student(images)
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = F.cross_entropy(logits, target) + masked_pcd(logits, teacher_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shown += loss.item() + (logits.argmax(1) == target).float().mean().item()
            seen += len(target)
        return seen / (time.perf_counter() - started)

    some(1)
    return some
