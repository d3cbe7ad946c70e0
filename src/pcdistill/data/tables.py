"""Tables of Hugging Face's `datasets` (`hf:NAME[@CONFIG][:SPLIT]`), memory-mapped, or parquet files where they lie.

No script of a data set is run: `datasets` has known none since its version 4. Formats that can hold Python objects are
refused.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.data.columns import choose_splits, class_names, held_back, image_column, label_column, label_values
from pcdistill.data.encoded import EncodedItems, EncodedPart, EncodedSet
from pcdistill.data.parquet import find_tables, read_parquet
from pcdistill.errors import InputError, nearest
from pcdistill.extras import need
from pcdistill.files import home_followed
from pcdistill.remote import URL, place_of

PREFIX = "hf:"
# The last colon begins a split, with slices and sums as `datasets` writes them: train[:80%]+validation
_SPLIT = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"
NAMED = re.compile(rf"(?P<name>.+?)(?::(?P<split>{_SPLIT}(?:\+{_SPLIT})*))?")
FORMATS = ("parquet", "arrow", "imagefolder")  # those of `datasets` that hold images, and nothing but data
CACHED = "cache"  # what a format of the hub was turned into: Arrow


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


def read_table(
    name: str, root: Path, *, download: bool = False, labelled: bool = True, streamed: bool = False
) -> EncodedSet:
    """Open a table and find its images and labels.

    Args:
        name: NAME, NAME@CONFIG and :SPLIT behind it, without "hf:"; NAME is of the hub, a folder, a .parquet or .arrow
            file, or a URL or glob of parquet files, which are read where they lie.
        root: folder of downloads, for what is kept of files that are read where they lie.
        download: fetch from the hub what is not in its cache.
        labelled: every image must have a label; else labels are not looked at.
        streamed: read parquet files of the hub or of a folder where they lie too.

    Returns:
        Splits "train", "val" and "test". SPLIT is "train"; a split that it takes from is none of the others. A test
        split whose labels are all -1, as the hub keeps them back, counts as none.

    Raises:
        InputError: no such data, configuration, split or column, or a missing label; naming them.
    """
    need("datasets", what=f"{PREFIX}{name}")
    place, config, split = _parse(name)
    where = f"{PREFIX}{place}" + (f"@{config}" if config else "")
    if config is not None and home_followed(place).is_file():
        raise InputError(f"{where}: {place} is a file, and has no configurations")
    if streamed or lies_elsewhere(place):
        found, features = _files(place, config, where)
        return read_parquet(found, split, where, root, features=features, labelled=labelled)
    parts: dict[str, EncodedPart] = {}
    classes: list[str] | None = None
    with _without_bars():
        names, get = _open(place, config, download)
        for part, label in choose_splits(names, split, where).items():
            with _told(f"{where}:{label}"):
                table = get(label)
            items = _images(table, f"{where}:{label}")
            labels = np.zeros(len(table), np.int64)
            if labelled:
                column = label_column(table.features, f"{where}:{label}")
                labels = _labels(table, column, f"{where}:{label}")
                if part == "test" and held_back(labels):
                    continue
                if part == "train":
                    classes = class_names(table.features, column)
            parts[part] = EncodedPart(items, labels, f"the split {label}")
    return EncodedSet(parts, classes)


def lies_elsewhere(place: str) -> bool:
    """Whether a place is a URL or a glob, whose files are read where they lie."""
    return URL.match(place) is not None or (has_magic(place) and not home_followed(place).exists())


def _files(place: str, config: str | None, where: str) -> tuple[dict[str, list[Path | str]], Any]:
    """The parquet files of each split, and the features that the hub tells; None where the files tell them."""
    path = home_followed(place)
    if lies_elsewhere(place) or path.is_file():
        return find_tables(place, where), None
    with _without_bars(), _told(where):
        builder = _builder(place, config, path, download=True)
        if "parquet" not in _formats(builder):
            raise InputError(
                f"{where} is of the format {', '.join(sorted(_formats(builder)))}; data.streamed reads parquet alone"
            )
        files = dict(builder.config.data_files or {})
        return {
            str(split): [place_of(str(one)) for one in found] for split, found in files.items()
        }, builder.info.features


def _parse(name: str) -> tuple[str, str | None, str | None]:
    """The place, the configuration and the split that a name has."""
    match = NAMED.fullmatch(name)
    if match is None:
        raise InputError(f"{PREFIX}{name} names no data; it must be {PREFIX}NAME or {PREFIX}NAME:SPLIT")
    if match["split"] is None or home_followed(name).exists():
        place, split = name, None
    else:
        place, split = match["name"], match["split"]
    before, at, config = place.rpartition("@")
    if not at or not before or not config or URL.match(place) or home_followed(place).exists():
        return place, None, split
    return before, config, split


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


def _open(place: str, config: str | None, download: bool) -> tuple[list[str], Callable[[str], Any]]:
    """The names of the splits, and what opens one as a memory-mapped table."""
    import datasets

    path = home_followed(place)
    with _told(f"{PREFIX}{place}"):
        if path.is_dir() and any((path / one).is_file() for one in ("state.json", "dataset_dict.json")):
            if config is not None:
                raise InputError(f"{PREFIX}{place} was written by save_to_disk, and has no configuration {config}")
            found = datasets.load_from_disk(str(path))
            held = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
            return list(held), held.__getitem__
        builder = _builder(place, config, path, download)
        formats = _formats(builder)
        if not formats & {*FORMATS, CACHED}:
            raise InputError(
                f"{PREFIX}{place} is of the format {', '.join(sorted(formats))}; {', '.join(FORMATS)} are read, and "
                "tar shards by wds:"
            )
        builder.download_and_prepare()
        return list(builder.info.splits), lambda split: builder.as_dataset(split=split)


def _formats(builder: Any) -> set[str]:
    """What a builder of `datasets` reads, in its words."""
    modules = [one.__module__ for one in type(builder).__mro__ if "packaged_modules" in one.__module__]
    return {module.split(".")[2] for module in modules}


def _builder(place: str, config: str | None, path: Path, download: bool) -> Any:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as packaged

    if path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if kind is None:
            raise InputError(f"{PREFIX}{place}: a file must be .parquet or .arrow")
        return datasets.load_dataset_builder(kind, data_files={"train": [str(path)]})
    if path.is_dir():
        with _configured(str(path), config):
            return datasets.load_dataset_builder(str(path), config)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", place) or place in packaged:
        raise InputError(f"{PREFIX}{place}: there is no such folder or file, and no name of the hub is like this")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not download
    try:
        hint = "" if download else "; data.download (--download) fetches what is not in the cache"
        with _told(f"{PREFIX}{place}", hint), _configured(place, config):
            return datasets.load_dataset_builder(place, config)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _configured(place: str, config: str | None) -> Iterator[None]:
    """Says which configurations there are, where one must be named or a wrong one is."""
    import datasets

    try:
        yield
    except ValueError as error:
        text = str(error)
        if "Config name is missing" not in text and not ("BuilderConfig" in text and "not found" in text):
            raise
        names = [str(one) for one in datasets.get_dataset_config_names(place)]
        there = f"{PREFIX}{place} has the configurations {', '.join(names)}"
        if config is None:
            raise InputError(f"{there}; name one: {PREFIX}{place}@{names[0]}") from None
        raise InputError(f'{there}, and no "{config}"{nearest(config, names)}') from None


def _images(table: Any, where: str) -> TableItems:
    """The images of the one column that holds some."""
    import datasets

    column = image_column(table.features, where)
    with _told(where):
        only = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return TableItems(only, column, where)


def _labels(table: Any, column: str, where: str) -> np.ndarray:
    """[N], int64 or text."""
    with _told(where):
        held = table.select_columns([column]).with_format("arrow")[:][column]
    return label_values(held, column, where)
