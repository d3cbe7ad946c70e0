"""Tables of Hugging Face's `datasets` (`hf:NAME[:SPLIT]`), memory-mapped; the images are decoded here.

No script of a data set is run: `datasets` has known none since its version 4. Formats that can hold Python objects are
refused.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.data.encoded import EncodedItems, EncodedPart, EncodedSet
from pcdistill.errors import InputError, nearest
from pcdistill.extras import need

PREFIX = "hf:"
# The last colon begins a split, with slices and sums as `datasets` writes them: train[:80%]+validation
_SPLIT = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"
NAMED = re.compile(rf"(?P<name>.+?)(?::(?P<split>{_SPLIT}(?:\+{_SPLIT})*))?")
WORDS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
FORMATS = ("parquet", "arrow", "imagefolder")  # those of `datasets` that hold images, and nothing but data
CACHED = "cache"  # what a format of the hub was turned into: Arrow
IMAGES = ("image", "img", "jpg", "png", "webp")  # columns, where their types do not tell
LABELS = ("label", "labels", "cls", "fine_label", "class")
NO_LABEL = -1  # in the hub's test splits whose labels are kept back


class TableItems(EncodedItems):
    """The images of a table's column.

    Args:
        table: a data set whose only column holds encoded images.
        column: its name.
        source: what messages call the table.
    """

    kind = "a table"
    looked_at = 1_000

    def __init__(self, table: Any, column: str, source: str) -> None:
        self.table, self.column, self.source = table, column, source

    def __len__(self) -> int:
        return len(self.table)

    def content(self, i: int) -> bytes:
        try:
            cell = self.table[i][self.column]
            held, path = (None, None) if cell is None else (cell["bytes"], cell["path"])
            if held is None and path is not None:
                held = Path(path).read_bytes()
        except (OSError, TypeError, KeyError, ValueError) as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.name(i)} cannot be read: {told}") from None
        if not held:
            raise InputError(f"{self.name(i)} is empty")
        return bytes(held)

    def name(self, i: int) -> str:
        return f"{self.column} of row {i} of {self.source}"

    def layout(self) -> str:
        return self.column


def read_table(name: str, *, download: bool = False, labelled: bool = True) -> EncodedSet:
    """Open a table and find its images and labels.

    Args:
        name: NAME or NAME:SPLIT, without "hf:"; NAME is of the hub, a folder, or a .parquet or .arrow file.
        download: fetch from the hub what is not in its cache.
        labelled: every image must have a label; else labels are not looked at.

    Returns:
        Splits "train", "val" and "test". SPLIT is "train"; a split that it takes from is none of the others. A test
        split whose labels are all -1, as the hub keeps them back, counts as none.

    Raises:
        InputError: no such data, split or column, or a missing label; naming them.
    """
    need("datasets", what=f"{PREFIX}{name}")
    place, split = _parse(name)
    parts: dict[str, EncodedPart] = {}
    classes: list[str] | None = None
    with _without_bars():
        names, get = _open(place, download)
        for part, label in _choose(names, split, place).items():
            where = f"{PREFIX}{place}:{label}"
            with _told(where):
                table = get(label)
            items = _images(table, where)
            labels = np.zeros(len(table), np.int64)
            if labelled:
                column = _label_column(table, where)
                labels = _labels(table, column, where)
                if part == "test" and labels.dtype.kind == "i" and bool((labels == NO_LABEL).all()):
                    continue
                if part == "train":
                    known = getattr(table.features[column], "names", None)
                    classes = None if known is None else list(known)
            parts[part] = EncodedPart(items, labels, f"the split {label}")
    return EncodedSet(parts, classes)


def _parse(name: str) -> tuple[str, str | None]:
    match = NAMED.fullmatch(name)
    if match is None:
        raise InputError(f"{PREFIX}{name} names no data; it must be {PREFIX}NAME or {PREFIX}NAME:SPLIT")
    if match["split"] is None or Path(name).expanduser().exists():
        return name, None
    return match["name"], match["split"]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets` within the block."""
    import datasets

    if datasets.are_progress_bars_disabled() or datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _told(where: str, hint: str = "") -> Iterator[None]:
    """Turns what `datasets` and the libraries under it raise into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of files, Arrow, the hub
        cause = error.__cause__ or error
        told = " ".join(str(cause).split()) or type(cause).__name__
        raise InputError(f"{where} cannot be opened: {told}{hint}") from None


def _open(place: str, download: bool) -> tuple[list[str], Callable[[str], Any]]:
    """The names of the splits, and what opens one as a memory-mapped table."""
    import datasets

    path = Path(place).expanduser()
    with _told(f"{PREFIX}{place}"):
        if path.is_dir() and any((path / one).is_file() for one in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            held = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
            return list(held), held.__getitem__
        builder = _builder(place, path, download)
        modules = [one.__module__ for one in type(builder).__mro__ if "packaged_modules" in one.__module__]
        formats = {module.split(".")[2] for module in modules}
        if not formats & {*FORMATS, CACHED}:
            raise InputError(
                f"{PREFIX}{place} is of the format {', '.join(sorted(formats))}; {', '.join(FORMATS)} are read, and "
                "tar shards by wds:"
            )
        builder.download_and_prepare()
        return list(builder.info.splits), lambda split: builder.as_dataset(split=split)


def _builder(place: str, path: Path, download: bool) -> Any:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as packaged

    if path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if kind is None:
            raise InputError(f"{PREFIX}{place}: a file must be .parquet or .arrow")
        return datasets.load_dataset_builder(kind, data_files={"train": [str(path)]})
    if path.is_dir():
        return datasets.load_dataset_builder(str(path))
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", place) or place in packaged:
        raise InputError(f"{PREFIX}{place}: there is no such folder or file, and no name of the hub is like this")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not download
    try:
        hint = "" if download else "; data.download (--download) fetches what is not in the cache"
        with _told(f"{PREFIX}{place}", hint):
            return datasets.load_dataset_builder(place)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _choose(names: list[str], split: str | None, place: str) -> dict[str, str]:
    """What to take for "train", "val" and "test"."""
    there = f"{PREFIX}{place} has the splits {', '.join(names)}"
    if split is None:
        split = next((one for one in WORDS["train"] if one in names), names[0] if len(names) == 1 else None)
        if split is None:
            raise InputError(f"{there}, and no train; name the one to train on: {PREFIX}{place}:{names[0]}")
    taken = [re.split(r"\[", one)[0] for one in split.split("+")]
    for one in taken:
        if one not in names:
            raise InputError(f'{there}, and no "{one}"{nearest(one, names)}')
    found = {"train": split}
    for part in ("val", "test"):
        other = next((one for one in WORDS[part] if one in names and one not in taken), None)
        if other is not None:
            found[part] = other
    return found


def _images(table: Any, where: str) -> TableItems:
    """The images of the one column that holds some."""
    import datasets

    features = table.features
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = typed or [name for name in IMAGES if name in features and _holds_bytes(features[name])]
    named = [name for name in found if name in IMAGES]
    if len(found) != 1 and len(named) != 1:
        many = f"several columns of images ({', '.join(found)})" if found else "no column of images"
        raise InputError(f"{where} has {many}; of {', '.join(features)} one must be called {IMAGES[0]}")
    column = found[0] if len(found) == 1 else named[0]
    with _told(where):
        only = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return TableItems(only, column, where)


def _holds_bytes(kind: Any) -> bool:
    """Whether a column without a type of its own can hold image files: bytes, or bytes with a path."""
    if isinstance(kind, dict):
        return "bytes" in kind and "path" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _label_column(table: Any, where: str) -> str:
    import datasets

    features = table.features
    found = [name for name in LABELS if name in features]
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if found or len(typed) == 1:
        return found[0] if found else typed[0]
    raise InputError(f"{where} has no column of labels; of {', '.join(features)} one must be called {LABELS[0]}")


def _labels(table: Any, column: str, where: str) -> np.ndarray:
    """[N], int64 or text."""
    with _told(where):
        held = table.select_columns([column]).with_format("arrow")[:][column]
    if held.null_count:
        row = held.is_null().to_numpy().argmax()
        raise InputError(f"{where}: row {row} has no {column}; every image needs one")
    values = np.asarray(held.to_pylist()) if "string" in str(held.type) else held.to_numpy()
    if values.dtype.kind not in "iuU":
        raise InputError(f"{where}: the column {column} must hold whole numbers or text, not {held.type}")
    return values if values.dtype.kind == "U" else values.astype(np.int64)
