"""Data sets by name: what their training, validation and test images and labels are."""

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcdistill.arrays import read_npz
from pcdistill.data import DATASETS
from pcdistill.data.digits import handwritten_digits
from pcdistill.data.download import CIFAR, read_cifar
from pcdistill.data.encoded import EncodedSet, as_numbers, label_numbers
from pcdistill.data.files import EXTENSIONS, DatasetItems, ImageFiles, Items, find_images
from pcdistill.data.shards import PREFIX as SHARDS
from pcdistill.data.shards import read_shards
from pcdistill.data.tables import PREFIX as TABLE
from pcdistill.data.tables import read_table
from pcdistill.errors import InputError, is_text, nearest
from pcdistill.files import home_followed
from pcdistill.plain import shown

VAL_NAMES = ("val", "valid", "validation")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": VAL_NAMES, "test": ("test", "testing")}  # in any case
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFICIAL = "the data set's own"
SPLIT_SEED = 20250524  # which images are held out never depends on a run's seed


@dataclass
class Split:
    """Images, either an array [N, C, H, W] uint8 or items to read, and labels [N] int64."""

    images: Tensor | None
    items: Items | None
    labels: Tensor


@dataclass
class Source:
    """A data set. `stats` are the customary mean and std, None to compute them from the training images.

    `origins` says of each split that there is where it comes from.
    """

    classes: list[str]
    train: Split
    val: Split | None = None
    test: Split | None = None
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    origins: dict[str, str] = field(default_factory=dict)


def open_source(name: str, *, root: str | Path | None = None, download: bool = False, streamed: bool = False) -> Source:
    """Find a data set by name or path; `streamed` reads the parquet files of `hf:NAME` where they lie.

    Raises:
        InputError: an unknown name, a missing file or folder, or one that does not hold what it should.
    """
    base = data_root(root)
    if name.startswith((SHARDS, TABLE)):
        return _encoded(name, open_encoded(name, base, download=download, streamed=streamed))
    if name == "digits":
        return _digits()
    if name in CIFAR:
        return _cifar(name, base, download)
    if name == "imagenet":
        folder = base if (base / "train").is_dir() else base / "imagenet"
        if not (folder / "train").is_dir():
            raise InputError(
                f"imagenet: no folder train/ in {base}; give the folder that holds train/ and val/ as root"
            )
        return _folders(folder)
    if name.startswith("torchvision/"):
        return _torchvision(name.removeprefix("torchvision/"), base, download)
    path = path_of(name, "data")
    if path.suffix == ".npz":
        return _npz(path)
    if path.is_dir():
        return _folders(path)
    if path.is_file():
        raise InputError(f"data: {path} is a file; it must be a folder of class folders, or an .npz file")
    if len(path.parts) > 1 or name.startswith(("~", ".")):
        raise InputError(f"data: the folder {path} does not exist")
    known = [known for known in DATASETS if known.islower()]
    raise InputError(
        f'data: unknown name "{name}"{nearest(name, known)}, and no such folder; known: {", ".join(DATASETS)}'
    )


def data_root(root: str | Path | None = None) -> Path:
    """The folder of downloads and indexes: the one given, $PCDISTILL_DATA, or one in the user's cache."""
    return path_of(
        root or os.environ.get("PCDISTILL_DATA") or Path.home() / ".cache" / "pcdistill" / "data", "data.root"
    )


def open_encoded(
    name: str, root: Path, *, download: bool = False, streamed: bool = False, labelled: bool = True
) -> EncodedSet:
    """The splits of `wds:PATTERN` or `hf:NAME`.

    Raises:
        InputError: as `read_shards` and `read_table` say.
    """
    if name.startswith(SHARDS):
        return read_shards(name.removeprefix(SHARDS), root, labelled=labelled)
    return read_table(name.removeprefix(TABLE), root, download=download, streamed=streamed, labelled=labelled)


def path_of(name: str | Path, key: str) -> Path:
    """The path that a name stands for, ~ followed.

    Args:
        name: as the user gave it.
        key: of the recipe, to name in messages.

    Raises:
        InputError: no file can have this name.
    """
    if str(name) == "":
        raise InputError(f"{key} is empty; name a folder or a file")
    try:
        path = home_followed(name)
        path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{key}: no file or folder can be called {shown(str(name))}: {reason}") from None
    return path


def stratified(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw `count` positions, from each class its share; returns (drawn, the others), both in ascending order.

    Shares are whole numbers, by the largest remainders; every class that occurs has at least one sample drawn.

    Args:
        labels: [N] int64.
        count: at least the number of classes that occur, at most N.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    take = exact.floor().long().maximum(sizes.clamp(max=1))
    while (short := count - int(take.sum())) != 0:
        step = 1 if short > 0 else -1
        free = take < sizes if step > 0 else take > 1
        need = torch.where(free, (exact - take) * step, -torch.inf)
        take[need.argsort(descending=True, stable=True)[: min(abs(short), int(free.sum()))]] += step
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    drawn = rank < take.repeat_interleave(sizes)
    return by_class[drawn].sort().values, by_class[~drawn].sort().values


def _digits() -> Source:
    """The 8 x 8 digits; as there is no official test set, a fixed fifth of each class is held out for it."""
    ink, digits = handwritten_digits()
    images = torch.from_numpy(np.round(ink * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.astype(np.int64))
    train, test = stratified(labels, len(labels) - len(labels) // 5)
    return Source(
        [str(digit) for digit in range(10)],
        Split(images[train], None, labels[train]),
        test=Split(images[test], None, labels[test]),
        origins={"test": "a fifth of the digits, set aside, as they have no official test set"},
    )


def _cifar(name: str, root: Path, download: bool) -> Source:
    classes, *arrays = read_cifar(name, root, download=download)
    x_train, y_train, x_test, y_test = map(torch.from_numpy, arrays)
    stats = CIFAR[name].mean, CIFAR[name].std
    test = Split(x_test, None, y_test)
    return Source(classes, Split(x_train, None, y_train), test=test, stats=stats, origins={"test": OFFICIAL})


def _npz(path: Path) -> Source:
    arrays = read_npz(path)
    missing = [key for key in ("x_train", "y_train") if key not in arrays]
    missing += [
        f"{other}_{part}"
        for part in ("val", "test")
        for one, other in (("x", "y"), ("y", "x"))
        if f"{one}_{part}" in arrays and f"{other}_{part}" not in arrays
    ]
    if missing:
        raise InputError(f"{path} must hold {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    y_train = arrays["y_train"]
    classes = _class_names(arrays["classes"], path) if "classes" in arrays else None
    if classes is None:
        classes = _numbered_classes(y_train, f"{path.name}: y_train")
    splits = {
        part: _array_split(arrays[f"x_{part}"], arrays[f"y_{part}"], len(classes), f"{path.name}: x_{part}")
        for part in ("train", "val", "test")
        if f"x_{part}" in arrays
    }
    shapes = {part: tuple(split.images.shape[1:]) for part, split in splits.items() if split.images is not None}
    for part, shape in shapes.items():
        if shape != shapes["train"]:
            raise InputError(f"{path.name}: the images of x_{part} must be shaped like those of x_train")
    origins = {part: f"x_{part}" for part in splits}
    return Source(classes, splits["train"], splits.get("val"), splits.get("test"), origins=origins)


def _encoded(name: str, found: EncodedSet) -> Source:
    """Class names as the data have them, else as the training labels; a validation split alone is kept for the test."""
    parts = dict(found.parts)
    origins = {split: part.origin for split, part in parts.items()}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        origins = {"train": origins["train"], "test": f"{origins['val']}, as there is no test split"}
    classes = found.classes
    if classes is None:
        labels = parts["train"].labels
        numbers = as_numbers(labels)
        if numbers is None:
            classes = sorted(set(labels.tolist()))
        else:
            classes = _numbered_classes(numbers, f"{name}: the training labels")
    splits = {
        split: Split(None, part.items, label_numbers(part, classes, f"{name}: {split}"))
        for split, part in parts.items()
    }
    return Source(
        classes, splits["train"], splits.get("val"), splits.get("test"), stats=IMAGENET_STATS, origins=origins
    )


def _class_names(names: np.ndarray, path: Path) -> list[str]:
    if names.dtype.kind not in "USiu":
        raise InputError(f"{path.name}: classes must be text, got {names.dtype}")
    try:
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names.ravel()]
    except UnicodeDecodeError:
        raise InputError(f"{path.name}: classes must be text in UTF-8") from None


def _numbered_classes(labels: np.ndarray, where: str) -> list[str]:
    """Names "0" to "C - 1" for labels of training images, each of which must have an image.

    Raises:
        InputError: the labels leave some out for certain.
    """
    top = int(labels.max()) if labels.size and labels.dtype.kind in "iu" else 0
    if top >= max(labels.size, 1):
        raise InputError(
            f"{where}: there is a label {top}, and {labels.size} images cannot have {top + 1} classes; labels must be "
            "0 to the number of classes - 1"
        )
    return [str(i) for i in range(top + 1)]


def images_of(x: np.ndarray, where: str) -> Tensor:
    """Check [N, H, W, C] or [N, H, W] uint8; gives [N, C, H, W].

    Raises:
        InputError: another type or shape.
    """
    if x.dtype != np.uint8:
        raise InputError(f"{where} must be uint8 (0 to 255), got {x.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] > 4:
        turned = "; move the channels last" if x.ndim == 4 and x.shape[1] <= 4 else ""
        raise InputError(f"{where} must be [N, H, W, C] or [N, H, W], got {list(x.shape)}{turned}")
    if 0 in x.shape[1:]:
        raise InputError(f"{where} has images without pixels: {list(x.shape)}")
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _array_split(x: np.ndarray, y: np.ndarray, num_classes: int, where: str) -> Split:
    """Checked images [N, C, H, W], and labels [N]."""
    images = images_of(x, where)
    y = y.ravel() if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise InputError(f"{where}: labels must be {len(x)} whole numbers, got {y.dtype} {list(y.shape)}")
    if len(y) and not (y.min() >= 0 and y.max() < num_classes):
        raise InputError(f"{where}: labels must be 0 to {num_classes - 1}, got {y.min()} to {y.max()}")
    return Split(images, None, torch.from_numpy(y.astype(np.int64)))


def _folders(root: Path) -> Source:
    """train/ with val/ and test/, or class folders alone; val/ without test/ is kept for the test, as in ImageNet.

    A folder train/ with images right in it, beside other folders, is the class of that name.
    """
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    splits = {split: _split_folder(root, folders, names) for split, names in SPLIT_FOLDERS.items()}
    train_dir, val, test = splits["train"], splits["val"], splits["test"]
    others_too = any(f.name.lower() not in chain(*SPLIT_FOLDERS.values()) for f in folders)
    if train_dir is None and not others_too and any(_holds_folders(f) for f in folders):
        raise InputError(f"{root} holds {', '.join(f'{f.name}/' for f in folders)} and no folder train/ to learn from")
    lone = train_dir is not None and train_dir.name.lower() != "train" and val is None and test is None
    if train_dir is None or (others_too and (lone or not _holds_folders(train_dir))):
        classes, train = _class_folders(root)
        return Source(classes, train, stats=IMAGENET_STATS)
    classes, train = _class_folders(train_dir)
    origins = {"train": f"the folder {train_dir.name}/"}
    if test is not None:
        origins["test"] = f"the folder {test.name}/"
    elif val is not None:
        origins["test"] = f"the folder {val.name}/, as there is no test/"
        val, test = None, val
    if val is not None:
        origins["val"] = f"the folder {val.name}/"
    others = {}
    for folder in (val, test):
        if folder is None:
            continue
        names, split = _class_folders(folder)
        if names != classes:
            only_train, only_here = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
            told = [f"only in {train_dir.name}/: {', '.join(only_train[:3])}"] if only_train else []
            told += [f"only in {folder.name}/: {', '.join(only_here[:3])}"] if only_here else []
            raise InputError(
                f"{root}: the class folders of {train_dir.name}/ and {folder.name}/ differ ({'; '.join(told)})"
            )
        others[folder] = split
    return Source(
        classes,
        train,
        others[val] if val is not None else None,
        others[test] if test is not None else None,
        stats=IMAGENET_STATS,
        origins=origins,
    )


def _holds_folders(folder: Path) -> bool:
    return any(inside.is_dir() for inside in folder.iterdir())


def _split_folder(root: Path, folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The folder of a split: the first of the names that there is, in any case.

    Raises:
        InputError: two folders differ in nothing but case.
    """
    for name in names:
        found = [folder for folder in folders if folder.name.lower() == name]
        if len(found) > 1:
            both = " and ".join(f"{folder.name}/" for folder in found)
            raise InputError(f"{root} holds {both}; which of them is the split {name}? Keep one")
        if found:
            return found[0]
    return None


def _class_folders(folder: Path) -> tuple[list[str], Split]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in classes:
        if not is_text(name):  # it goes into files that hold nothing else
            raise InputError(f"the class folder {shown(name)} in {folder} has a name that is not in UTF-8; rename it")
    if not classes:
        raise InputError(f"{folder} has no class folders; it must hold one folder of images for each class")
    counts: list[int] = []

    def paths() -> Iterator[str]:
        for name in classes:
            found = find_images(folder / name)
            if not found:
                raise InputError(f"the class folder {folder / name} has no images ({', '.join(sorted(EXTENSIONS))})")
            counts.append(len(found))
            yield from found

    files = ImageFiles(paths())
    return classes, Split(None, files, torch.arange(len(classes)).repeat_interleave(torch.tensor(counts)))


def _torchvision(name: str, root: Path, download: bool) -> Source:
    from torchvision import datasets

    if name.lower() in CIFAR:
        return _cifar(name.lower(), root, download)
    known = [known for known in datasets.__all__ if inspect.isclass(getattr(datasets, known, None))]
    if name not in known:
        raise InputError(f'data: torchvision has no data set "{name}"{nearest(name, known)}')
    kind = getattr(datasets, name)
    options = inspect.signature(kind).parameters
    if "root" not in options:
        raise InputError(f"data: torchvision/{name} is not a data set of labelled images")
    given: dict[str, Any] = {"root": str(root)}
    if "download" in options:
        given["download"] = download
    names: dict[str, list[dict[str, Any]]] = {"train": [{}], "val": [], "test": []}
    if "train" in options:
        names = {"train": [{"train": True}], "val": [], "test": [{"train": False}]}
        if "split" in options:
            given["split"] = "balanced"  # EMNIST
    elif "split" in options:
        names = {
            "train": [{"split": "train"}, {"split": "trainval"}],
            "val": [{"split": split} for split in VAL_NAMES],
            "test": [{"split": "test"}],
        }
    parts = {part: _first_that_works(kind, given, tries, name, root) for part, tries in names.items()}
    if parts["train"] is None:
        raise InputError(f"data: torchvision/{name} has no training split that is known here")
    origins = dict.fromkeys(("train", "val", "test"), OFFICIAL)
    if parts["test"] is None:
        parts["val"], parts["test"] = None, parts["val"]
        origins["test"] = "the data set's own validation split, as it has no test split"
    labels = {part: _labels(found, name) for part, found in parts.items() if found is not None}
    numbered = _numbered_classes(labels["train"].numpy(), f"torchvision/{name}")
    classes = [_class_name(c) for c in getattr(parts["train"], "classes", None) or numbered]
    splits = {part: _dataset_split(parts[part], labels[part], f"torchvision/{name}") for part in labels}
    stats = IMAGENET_STATS if splits["train"].images is None else None
    return Source(classes, splits["train"], splits.get("val"), splits.get("test"), stats, origins)


def _class_name(found: Any) -> str:
    """ImageNet gives a tuple of synonyms."""
    return ", ".join(found) if isinstance(found, tuple) else str(found)


def _first_that_works(kind: Any, given: dict[str, Any], tries: list[dict[str, Any]], name: str, root: Path) -> Any:
    for options in tries:
        try:
            return kind(**given, **options)
        except ValueError:  # torchvision's answer to a split that the data set does not have
            continue
        except (RuntimeError, OSError) as error:
            hint = "" if given.get("download") else "; allow the download, or give its root"
            raise InputError(f"torchvision/{name} cannot be read from {root}: {error}{hint}") from None
        except TypeError as error:
            raise InputError(f"data: torchvision/{name} cannot be opened by name: {error}") from None
    return None


def _labels(dataset: Any, name: str) -> Tensor:
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            break
    else:
        found = [dataset[i][1] for i in range(len(dataset))]
    array = np.asarray(found)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"data: torchvision/{name} does not have one class per image")
    return torch.from_numpy(array.astype(np.int64))


def _dataset_split(dataset: Any, labels: Tensor, name: str) -> Split:
    """In memory where the data set already is; read one by one where it is not."""
    data = getattr(dataset, "data", None)
    array = np.asarray(data) if isinstance(data, Tensor | np.ndarray) else None
    if array is None or array.dtype != np.uint8 or array.ndim not in (3, 4) or len(array) != len(labels):
        return Split(None, DatasetItems(dataset, name), labels)
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)  # SVHN and STL10 have the channels first
    return _array_split(array, labels.numpy(), int(labels.max()) + 1, name)
