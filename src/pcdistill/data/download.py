"""CIFAR-10 and CIFAR-100 in torchvision's layout: fetched with a checksum, read without running what a pickle holds."""

import hashlib
import os
import pickle
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.errors import InputError, PcdistillError
from pcdistill.files import only_one

MIRRORS = "PCDISTILL_MIRRORS"  # environment: base URLs that hold the archives, tried before the built-in ones


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFAR archives."""

    folder: str
    archive: str
    sha256: str
    train: tuple[str, ...]
    test: str
    meta: str
    classes: bytes
    labels: bytes
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        classes=b"label_names",
        labels=b"labels",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        train=("train",),
        test="test",
        meta="meta",
        classes=b"fine_label_names",
        labels=b"fine_labels",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}
# PaddlePaddle's copy of the same archives first: the original server is slow. The checksum decides, not the place.
SOURCES = ("https://dataset.bj.bcebos.com/cifar", "https://www.cs.toronto.edu/~kriz")


def read_cifar(
    name: str, root: Path, *, download: bool = False
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, then images [N, 3, 32, 32] uint8 and labels [N] int64 of training and test.

    Args:
        name: "cifar10" or "cifar100".
        root: the folder that holds torchvision's folder of the data set.
        download: fetch the archive if the folder is not there.

    Raises:
        InputError: the data is not there, or a file of it is damaged.
        PcdistillError: no server gave the archive.
    """
    cifar = CIFAR[name]
    folder = root / cifar.folder
    if not folder.is_dir():
        if not download:
            raise InputError(
                f"{name} is not in {root} (no folder {cifar.folder}); allow the download, or give its root"
            )
        with only_one(root / f".{cifar.folder}.lock"):
            if not folder.is_dir():
                _install(cifar, root)
    names = _field(folder / cifar.meta, cifar.classes)
    classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    parts = [_batch_file(folder / file, cifar.labels, len(classes)) for file in cifar.train]
    x_test, y_test = _batch_file(folder / cifar.test, cifar.labels, len(classes))
    return classes, np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), x_test, y_test


def mirror_urls(archive: str) -> list[str]:
    """Where to look for an archive, in order."""
    bases = [*os.environ.get(MIRRORS, "").replace(",", " ").split(), *SOURCES]
    return [f"{base.rstrip('/')}/{archive}" for base in bases]


def fetch(urls: Sequence[str], path: Path, sha256: str) -> None:
    """Put the file with this checksum at the path, from the first URL that gives it; never a wrong or partial one.

    Raises:
        PcdistillError: no URL gave it, with the reason for each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in urls:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                found = _copy(url, out)
            if found == sha256:
                os.replace(part, path)
                return
            reasons.append(f"{url}: wrong checksum (sha256 {found[:12]}..., expected {sha256[:12]}...)")
        except (OSError, ValueError) as error:
            reasons.append(f"{url}: {error}")
        finally:
            Path(part).unlink(missing_ok=True)
    raise PcdistillError(
        f"could not download {path.name}; put it under your data root yourself, or name a mirror in {MIRRORS}; "
        f"tried {'; '.join(reasons)}"
    )


def _copy(url: str, out: Any) -> str:
    """Copy a URL into a file, with progress on a terminal; returns the SHA-256."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    digest = hashlib.sha256()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        urllib.request.urlopen(url, timeout=30) as source,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress,
    ):
        length = source.headers.get("Content-Length")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=int(length) if length else None)
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


def _install(cifar: Cifar, root: Path) -> None:
    """Fetch and unpack an archive; the folder appears only when it is complete."""
    archive = root / cifar.archive
    if not archive.is_file() or _sha256(archive) != cifar.sha256:
        fetch(mirror_urls(cifar.archive), archive, cifar.sha256)
    with tempfile.TemporaryDirectory(prefix=f".{cifar.folder}.", dir=root) as scratch:
        try:
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(scratch, filter="data")
                else:  # Python before 3.11.4; the checksum was right
                    tar.extractall(scratch)
        except tarfile.TarError as error:
            raise PcdistillError(f"{archive} cannot be unpacked: {error}") from None
        os.replace(Path(scratch) / cifar.folder, root / cifar.folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes into a protocol-2 pickle for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not allowed")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings, numbers and NumPy arrays, and nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not data")


def _field(path: Path, key: bytes) -> Any:
    """One value of a pickled dict, whose keys are bytes in the original files and may be text in copies."""
    if not path.is_file():
        raise InputError(f"{path} is missing; delete the folder {path.parent.name} and download it again")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        found = content[key] if key in content else content[key.decode()]
    except KeyError:
        raise InputError(f"{path} has no {key.decode()}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path} cannot be read: {error}") from None
    return found


def _batch_file(path: Path, labels: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _field(path, b"data"), np.asarray(_field(path, labels))
    right = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3 * 32 * 32
    if not right or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not ((y >= 0) & (y < num_classes)).all():
        raise InputError(f"{path} does not hold images of 32 x 32 with labels below {num_classes}")
    return x.reshape(-1, 3, 32, 32), y.astype(np.int64)
