"""Reading photographs for training: ours against timm's loader, same files, same transform, in turns.

python benchmarks/bench_pictures.py --json benchmarks/results/pictures--MACHINE.json

Each loader gives random resized crops of 224 px, mirrored half of the time, as float32 batches, from its own worker
processes over whole epochs. timm's also jitters colours by default; "timm, no jitter" leaves that out, and is what we
are compared with. Files are made on the fly, upscaled from --photographs or drawn. The last rows are the memory of our
worker processes at a million names: USS is what a process has for itself.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _bench import machine, report, show
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader

from pcdistill.data.augment import make_augment
from pcdistill.data.decoding import Plan
from pcdistill.data.files import ImageFiles
from pcdistill.data.loader import Feed, Job, SplitBatches, Stream
from pcdistill.data.readers import ItemReader
from pcdistill.data.workers import Workers

SIDE, BATCH = 224, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"500 x 375": (500, 375), "2 MP": (1632, 1224), "12 MP": (4000, 3000)}
IMAGES = {"500 x 375": 384, "2 MP": 192, "12 MP": 96}  # of an epoch
NAMES = 1_300_000


def write_photographs(folder: Path, size: tuple[int, int], count: int, photographs: Path | None) -> None:
    """JPEG files of quality 90 in two class folders, with grain as a camera leaves it; 24 different ones."""
    rng = np.random.default_rng(0)
    sources = sorted(photographs.rglob("*.jpg")) if photographs else []
    made = []
    for i in range(24):
        if sources:
            with Image.open(sources[i * len(sources) // 24]) as opened:
                small = opened.convert("RGB")
        else:
            # Noise of all scales, as photographs have it.
            layers = [rng.normal(0, 30 * 2**-k, (3 * 2**k, 4 * 2**k, 3)) for k in range(7)]
            whole = sum(np.kron(layer, np.ones((2 ** (6 - k), 2 ** (6 - k), 1))) for k, layer in enumerate(layers))
            small = Image.fromarray((128 + whole).clip(0, 255).astype(np.uint8))
        pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + rng.integers(-4, 5, pixels.shape, dtype=np.int16)
        held = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(held, "JPEG", quality=90)
        made.append(held.getvalue())
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made[i % len(made)])


def ours(folder: Path, workers: int) -> Callable[[int], Iterable[Any]]:
    """Our training batches, by epoch."""
    files = ImageFiles(str(path) for path in sorted(folder.rglob("*.jpg")))
    augment = make_augment("imagenet", size=SIDE, channels=3, folder=True)
    fill = torch.zeros(3, dtype=torch.uint8)
    rows = torch.arange(len(files))
    reader = ItemReader(files, rows, (augment,), size=SIDE, fill=fill, workers=Workers(workers))
    return SplitBatches(reader, rows % 2, Feed(2, MEAN, STD, SIDE, BATCH, Stream(), train=True)).epoch


def timms(folder: Path, workers: int, jitter: float) -> Callable[[int], Iterable[Any]]:
    """timm's training loader, by epoch; workers stay, as is its default."""
    loader = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, SIDE, SIDE),
        batch_size=BATCH,
        is_training=True,
        color_jitter=jitter,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )
    return lambda epoch: loader


def speed(epoch: Iterable[Any]) -> float:
    """Images a second over an epoch's batches."""
    began, images = time.perf_counter(), 0
    for batch in epoch:
        images += len(batch[0] if isinstance(batch, list | tuple) else batch.images)
    return images / (time.perf_counter() - began)


def compare(folder: Path, workers: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Medians over rounds in which the loaders take turns; the first round, which starts workers, is not counted."""
    contenders = {
        "ours": ours(folder, workers),
        "timm, no jitter": timms(folder, workers, 0.0),
        "timm": timms(folder, workers, 0.4),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, epoch in contenders.items():
            measured = speed(epoch(number))
            if number:
                found[name].append(measured)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        spread = float(np.subtract(*np.percentile(values, [75, 25])))
        per_worker = medians[name] / max(1, workers)
        ratio = medians["ours"] / medians[name]
        yield {"loader": name, "images/s and worker": per_worker, "iqr": spread / max(1, workers), "ours / it": ratio}


class NoFiles(ImageFiles):
    """Names of files that are not there; instead of an image's pixels comes how much memory the process has."""

    def read(self, i: int, plan: Plan) -> list[torch.Tensor]:
        plan(500, 375)
        return [told(i, self.paths[i])]


class NameList(torch.utils.data.Dataset[torch.Tensor]):
    """The same with a list of (path, label), as torchvision's ImageFolder keeps them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.samples = [(name, i // 1300) for i, name in enumerate(names)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> torch.Tensor:
        path, label = self.samples[i]
        assert label >= 0
        return told(i, path)


def told(i: int, path: str) -> torch.Tensor:
    """The memory of this process at some images, which is slow to find; [2], zeros at the others."""
    assert path.endswith(".JPEG")
    return memory() if i % 256 == 0 else torch.zeros(2)


def memory() -> torch.Tensor:
    """MiB of this process, [2]: resident, and its own."""
    found = psutil.Process().memory_full_info()
    return torch.tensor([found.rss, found.uss]) / 2**20


def names() -> Iterator[str]:
    folder = "/data/imagenet/train"
    return (f"{folder}/n{i // 1300:08d}/n{i // 1300:08d}_{i:07d}.JPEG" for i in range(NAMES))


def worker_memory() -> Iterator[dict[str, Any]]:
    """The larger of two workers' memory at the beginning, at an eighth and at the end of a shuffled epoch."""
    rows, black = torch.arange(NAMES), torch.zeros(3, dtype=torch.uint8)
    reader = ItemReader(NoFiles(names()), rows, (None,), size=SIDE, fill=black, workers=Workers(2))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(NAMES, generator=generator)
    jobs = (Job(0, n, 128, part, part, len(part), part[:0]) for n, part in enumerate(order.split(128)))
    listed = DataLoader(NameList(names()), 128, shuffle=True, num_workers=2, generator=generator)
    for name, batches in (("ours", (views[0] for views in reader.read(jobs))), ("list of (path, label)", listed)):
        marks = torch.stack([batch.max(0).values for batch in batches])
        parts = {"at the beginning": marks[:20], "at an eighth": marks[: len(marks) // 8], "at the end": marks}
        own = {f"{part}, MiB USS": float(of[:, 1].max()) for part, of in parts.items()}
        yield {"loader": name, **own, "RSS": float(marks[:, 0].max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="named in the table; reading is the CPU's work")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", type=Path, help="a folder of JPEG files to upscale")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size, pixels in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            write_photographs(Path(name), pixels, IMAGES[size], args.photographs)
            for row in compare(Path(name), args.workers, args.rounds):
                rows.append({"pictures": size, **row})
                show(rows[-1])
    for row in worker_memory():
        rows.append({"pictures": "1.3 million names", **row})
        show(rows[-1])
    report(rows, machine(args.device), " ".join(["python", *sys.argv]), args.json)


if __name__ == "__main__":
    main()
