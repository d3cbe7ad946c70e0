"""The tables of docs/scale.md: ImageNet-1k, ImageNet-21k and a billion images, with a live teacher and from caches.

python benchmarks/scale.py --json benchmarks/results/scale--h100.json     # and then, without measuring anew:
python benchmarks/scale.py --docs benchmarks/results/scale--h100.json     # the table in docs/scale.md

The arithmetic is that of `pcdistill plan`. Its constants are measured: a step of ResNet-18 and the forward pass of
ResNet-50 are the H100's (gpu--h100.json), decoding is that of pictures--cpu.json, and what a cache costs to write and
to read is timed here. A teacher ten times as slow is ResNet-50's time times ten, not a measurement.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import machine, save, show, table, time_ms

from pcdistill.commands.costs import FULL, LIVE, TOP_K, Measured, Prices, Scale, Way, assumptions, ways, workers_needed
from pcdistill.commands.plan import size_text
from pcdistill.distillation.cache_store import CacheInfo
from pcdistill.models import build_model

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- made by benchmarks/scale.py -->", "<!-- end -->"
FROM = ("less time from", "less money from")
HEAD = "| teacher | images | bound by | live, hours | cached + made, h | all, top-k | all pays from | top-k pays from |"
BATCH, K = 256, 100
# Name: images, classes, epochs, nodes of eight cards.
SETS = {
    "ImageNet-1k": (1_281_167, 1000, 100, 1),
    "ImageNet-21k": (14_197_122, 21_841, 30, 4),
    "a billion images": (1_000_000_000, 21_841, 1, 16),
}
# Teacher: times ResNet-50's time; worker processes for each card.
CASES = {
    "ResNet-50, 16 workers a card": (1, 16),
    "ResNet-50, 64 workers a card": (1, 64),
    "ten times ResNet-50, 16 workers a card": (10, 16),
}


def rows_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())["rows"]
    return found


def speed(way: str) -> float:
    """Images a second on the H100: batch 256, bfloat16, not compiled."""
    (row,) = (
        row
        for row in rows_of("gpu--h100.json")
        if (row.get("way"), row.get("batch"), row.get("dtype"), row.get("compile")) == (way, BATCH, "bfloat16", "no")
    )
    return float(row["images/s"])


def loss_ms(logits: str) -> float:
    """Milliseconds of PCD for logits [N, C] on the H100, in float32."""
    rows = [row for row in rows_of("gpu--h100.json") if row.get("part") == "loss"]
    return float(next(row["PCD ms"] for row in rows if (row["logits"], row["dtype"]) == (logits, "float32")))


def cache_seconds(classes: int, top_k: int | None) -> tuple[float, float]:
    """Seconds to write and to read an image's logits on this machine."""
    info = CacheInfo("", "", 0, epochs=1, batches=1, rows=BATCH, classes=classes, views=1, top_k=top_k)
    logits = torch.randn(BATCH, classes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.bin"
        store, _ = time_ms(lambda: file.write_bytes(info.encode(logits).tobytes()), 0.5)
        rows = np.arange(BATCH)
        load, _ = time_ms(lambda: info.decode(np.memmap(file, info.row, "r")[rows]), 0.5)
    return store / 1e3 / BATCH, load / 1e3 / BATCH


def constants(classes: int) -> Measured:
    """Of ResNet-50 teaching ResNet-18 by PCD at 224 px."""
    teacher = 1 / speed("teacher alone, forward")
    thousand, many = loss_ms("1024 x 1000") / 1024, loss_ms("256 x 21841") / 256
    full, few = (CacheInfo("", "", 0, 1, 1, 1, classes, 1, top_k=k).row.itemsize for k in (None, K))
    store, load = cache_seconds(classes, None)
    top_k_store, top_k_load = cache_seconds(classes, K)
    reading = next(row for row in rows_of("pictures--cpu.json") if row["pictures"] == "500 x 375")
    student = build_model("torchvision/resnet18", num_classes=classes, in_channels=3, image_size=224)
    return Measured(
        read=1 / reading["images/s and worker"],
        teacher=teacher,
        step=1 / speed("pcdistill.distill, PCD") - teacher + (many - thousand if classes > 1000 else 0) / 1e3,
        store=store,
        load=load,
        top_k_store=top_k_store,
        top_k_load=top_k_load,
        row_bytes=full,
        top_k_bytes=few,
        parameters=sum(p.numel() for p in student.parameters()),
    )


def times(way: Way) -> str:
    """How often a stored epoch must be used until the cache is the cheaper."""
    return "" if way.name == LIVE else "never" if way.pays_from is None else f"{way.pays_from:.2f}"


def compact(rows: list[dict[str, Any]]) -> str:
    """The table of docs/scale.md out of the rows: one line for each case and set of images."""
    lines = [HEAD, "|" + " --- |" * 3 + " ---: |" * 5]
    for live, full, few in zip(*(iter(rows),) * 3, strict=True):
        hours = [f"{row['a training, hours']:.3g}" for row in (live, full)]
        cells = [live["case"], live["images"], live["bound by"], hours[0]]
        cells += [f"{hours[1]} + {full['cache before it, hours']:.3g}", f"{full['its size']}, {few['its size']}"]
        cells += [" / ".join(row[key] for key in FROM) for row in (full, few)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_docs(rows: list[dict[str, Any]]) -> None:
    """Put the table where docs/scale.md has it."""
    page = DOCS.read_text(encoding="utf-8")
    head, _, rest = page.partition(f"{BEGIN}\n")
    DOCS.write_text(f"{head}{BEGIN}\n{compact(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="a table that was made")
    args = parser.parse_args()
    if args.docs:
        into_docs(json.loads(args.docs.read_text())["rows"])
        return
    info, prices, rows = machine("cpu"), Prices(), []
    of = {classes: constants(classes) for classes in sorted({classes for _, classes, _, _ in SETS.values()})}
    for classes, one in of.items():
        show({"classes": classes, **{key: value for key, value in vars(one).items() if value}})
    for case, (slower, workers) in CASES.items():
        part = []
        for name, (images, classes, epochs, nodes) in SETS.items():
            one = replace(of[classes], teacher=slower * of[classes].teacher)
            at = Scale(images, epochs, batch=BATCH * 8 * nodes, nodes=nodes, gpus=8, workers=workers)
            by_time, by_price = ways(one, at), ways(one, at, prices)
            for way, priced in zip(by_time, by_price, strict=True):
                if way.name not in (LIVE, FULL, TOP_K):
                    continue
                part.append(
                    {
                        "case": case,
                        "images": f"{name}, {epochs} epoch{'s' if epochs > 1 else ''}, {8 * nodes} cards",
                        "way": way.name,
                        "a training, hours": (way.total - way.build) / 3600,
                        "cache before it, hours": way.build / 3600 if way.disk else "",
                        "its size": size_text(way.disk) if way.disk else "",
                        "bound by": way.bound,
                        "workers that would do": workers_needed(one, way, at),
                        "less time from": times(way),
                        "less money from": times(priced),
                    }
                )
        shown = [{key: value for key, value in row.items() if key != "case"} for row in part]
        print(f"\n{case}\n\n{table(shown)}", flush=True)
        rows += part
    print("\n" + "\n".join(assumptions(at, prices)))
    if args.json:
        save(rows, info, " ".join(["python", *sys.argv]), args.json, by="case")


if __name__ == "__main__":
    main()
