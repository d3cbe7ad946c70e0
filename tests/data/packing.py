"""Small tar shards and tables of images, made on the spot."""

import functools
import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image


@functools.cache
def picture(number: int, side: int = 10) -> bytes:
    """A PNG file; every number has its own colours, and its class (number % 3) shows in them."""
    rng = np.random.default_rng(number)
    array = rng.integers(0, 80, (side, side, 3), dtype=np.uint8)
    array[..., number % 3] += 150
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, numbers: Iterable[int], names: Mapping[int, str] | None = None) -> Path:
    """A shard of the pictures `numbers`, keyed by them; labels are number % 3, or their names."""
    label = {c: str(c) for c in range(3)} if names is None else names
    files = ((number, kind) for number in numbers for kind in ("cls", "png"))
    return pack(
        path,
        ((f"{n:05}.{kind}", picture(n) if kind == "png" else label[n % 3].encode()) for n, kind in files),
    )


def shards(folder: Path, sizes: Iterable[int], word: str = "train", first: int = 0) -> int:
    """Shards of the given sizes; gives the number after the last picture's."""
    for i, size in enumerate(sizes):
        shard(folder / f"set-{word}-{i:04}.tar", range(first, first + size))
        first += size
    return first


def parquet(
    path: Path, groups: Iterable[Iterable[int]], names: Iterable[str] | None = ("a", "b", "c"), side: int = 10
) -> Path:
    """A parquet file as `datasets` writes it, of row groups of pictures; labels are number % 3."""
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    schema = datasets.Features({"image": datasets.Image(), "label": label}).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    with ParquetWriter(path, schema) as writer:
        for group in map(list, groups):
            images = [{"bytes": picture(n, side), "path": f"{n}.png"} for n in group]
            writer.write_table(pyarrow.table({"image": images, "label": [n % 3 for n in group]}, schema=schema))
    return path


def grouped(sizes: Iterable[int], first: int = 0) -> list[range]:
    """Neighbouring ranges of the given sizes."""
    ends = [first]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [range(low, high) for low, high in pairwise(ends)]


def configured(folder: Path) -> Path:
    """A data set of the hub's form with the configurations "small" and "large"."""
    parquet(folder / "small" / "train-00000-of-00001.parquet", [range(3)])
    parquet(folder / "large" / "train-00000-of-00001.parquet", [range(6), range(6, 9)])
    files = "".join(f'- config_name: {name}\n  data_files: "{name}/*.parquet"\n' for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    return folder
