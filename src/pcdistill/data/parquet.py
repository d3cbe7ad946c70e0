"""Parquet files read where they lie: footers and labels first, then the images of row groups as they are needed.

What is read of a row group is kept for all processes of the machine, within what copies may take on the disk, and is
mapped into memory from there. No path that a file names is followed.
"""

import mmap
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pcdistill.data.columns import choose_splits, class_names, held_back, image_column, label_column, label_values
from pcdistill.data.copies import LIMIT, Copies, copies_in
from pcdistill.data.encoded import EncodedItems, EncodedPart, EncodedSet
from pcdistill.data.indexes import kept_indexes, state_of
from pcdistill.data.loader import WINDOW
from pcdistill.errors import InputError
from pcdistill.files import new_digest
from pcdistill.remote import common_folder, file_system, files_at, said, within

ENDING = ".parquet"
INDEX_FORMAT = "parquet 1"  # counts up when an index holds something else
INDEXED = ("rows", "packed", "plain", "labels", "column", "leaf", "classes", "named")  # what it holds
FEWEST = 256  # images: neighbouring row groups of a file are read together up to so many
FETCHED = 4  # files at a time, for a batch
HELD = 2 * WINDOW  # pieces that a process has mapped
ROWS = 64  # that are decoded at a time
BUFFER = 2**24  # bytes of one request
GIB = 2**30
# As `datasets` finds splits: photos-00000-of-00012.parquet, else words in the names of folders, then of files.
SHARDED = re.compile(r"(?P<stem>[^/]+)-\d{5}-of-\d{5}[^/]*")
KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class ParquetIndex:
    """What is known of a file before an image is read.

    Attributes:
        place: of the file.
        state: changes when it does.
        rows: [G] int64, of each row group.
        packed: [G] int64, bytes of its images as they are stored.
        plain: [G] int64, and as they are without compression.
        labels: [N] int64 or text; zeros where labels are not asked for.
        column: of the images.
        leaf: the part of the column that holds their bytes.
        classes: the names of a ClassLabel; None of another type.
    """

    place: Path | str
    state: str
    rows: np.ndarray
    packed: np.ndarray
    plain: np.ndarray
    labels: np.ndarray
    column: str
    leaf: str
    classes: list[str] | None


@dataclass(frozen=True)
class Piece:
    """Neighbouring row groups of a file, which are read together.

    Attributes:
        file: its number.
        first: row group.
        last: the one after the last.
        skip: rows before the first that counts, as of a slice of a split.
        count: rows that count.
    """

    file: int
    first: int
    last: int
    skip: int
    count: int


class ParquetItems(EncodedItems):
    """The images of parquet files, in their order.

    Args:
        files: their indexes.
        ranges: (file, from, to), the rows that count, in order.
        copies: of what is read.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[ParquetIndex], ranges: Sequence[tuple[int, int, int]], copies: Copies) -> None:
        self.files, self.copies = list(files), copies
        self.pieces = [piece for file, low, high in ranges for piece in _pieces(file, files[file].rows, low, high)]
        counts = np.array([piece.count for piece in self.pieces], np.int64)
        self.ends = np.cumsum(counts)
        self.groups = np.arange(len(counts)).repeat(counts)
        self._held: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}  # a process opens its own

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def prepare(self, rows: Iterable[int]) -> None:
        missing: dict[int, list[int]] = {}
        for number in {self._where(i)[0] for i in rows} - self._held.keys():
            missing.setdefault(self.pieces[number].file, []).append(number)
        if len(missing) > 1:  # one alone is fetched when it is read
            with ThreadPoolExecutor(FETCHED) as pool:
                list(pool.map(self._fetch, missing.values()))

    def _fetch(self, numbers: Iterable[int]) -> None:
        with suppress(OSError):  # told when an image is read
            for number in numbers:
                self._copied(number).close()

    def content(self, i: int) -> bytes:
        number, row = self._where(i)
        try:
            cell = self._mapped(number)[row].as_py()
        except OSError as error:
            raise InputError(f"{self.name(i)} cannot be read: {said(error)}") from None
        if not cell:
            raise InputError(f"{self.name(i)} is empty")
        return bytes(cell)

    def name(self, i: int) -> str:
        number, row = self._where(i)
        piece = self.pieces[number]
        index = self.files[piece.file]
        starts = np.cumsum(index.rows) - index.rows
        row += int(starts[piece.first])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{index.column} of row {row} (row group {group}) of {index.place}"

    def layout(self) -> str:
        digest = new_digest()
        for index in self.files:
            digest.update(index.leaf.encode())
            for array in (index.rows, index.packed, index.plain):
                digest.update(array.tobytes())
        digest.update(repr([(p.file, p.first, p.last, p.skip, p.count) for p in self.pieces]).encode())
        return str(digest.hexdigest())

    def window_bytes(self) -> int:
        """Of the images that are shuffled together, at most."""
        sizes = sorted(int(self.files[piece.file].plain[piece.first : piece.last].sum()) for piece in self.pieces)
        return sum(sizes[-WINDOW:])

    def _where(self, i: int) -> tuple[int, int]:
        """The piece that image i is in, and its row there."""
        number = int(np.searchsorted(self.ends, i, side="right"))
        piece = self.pieces[number]
        return number, i - int(self.ends[number]) + piece.count + piece.skip

    def _mapped(self, number: int) -> Any:
        """A piece's images, a column of Arrow over a file that is mapped."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        import pyarrow

        with self._copied(number) as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        alone = pyarrow.ipc.IpcReadOptions(use_threads=False)
        column = pyarrow.ipc.open_file(pyarrow.py_buffer(held), options=alone).read_all().column(0)
        self._held[number] = column
        while len(self._held) > HELD:
            self._held.popitem(last=False)
        return column

    def _copied(self, number: int) -> BinaryIO:
        """The file that a piece's images were put into."""
        piece = self.pieces[number]
        index = self.files[piece.file]
        what = f"{index.place} {index.state} {index.leaf} {piece.first} {piece.last}"
        return self.copies.made(what, ".arrow", lambda file: _copy(index, piece, file))


def _pieces(file: int, rows: np.ndarray, low: int, high: int) -> Iterator[Piece]:
    """The pieces of a file that rows `low` to `high` are in."""
    first, start = 0, 0
    while first < len(rows):
        last, size = first, 0
        while last < len(rows) and size < FEWEST:
            size += int(rows[last])
            last += 1
        skip = max(0, low - start)
        count = min(size, high - start) - skip
        if count > 0:
            yield Piece(file, first, last, skip, count)
        first, start = last, start + size


def _copy(index: ParquetIndex, piece: Piece, file: BinaryIO) -> None:
    """Write a piece's images, a column of Arrow.

    Raises:
        InputError: a row group cannot be read, or is not as it was.
        OSError: the disk is full.
    """
    import pyarrow

    schema = pyarrow.schema([("image", pyarrow.large_binary())])
    with opened(index.place) as table, pyarrow.ipc.new_file(file, schema) as writer:
        for group in range(piece.first, piece.last):
            found = 0
            for images in _images(table, index, group):
                found += len(images)
                writer.write_batch(pyarrow.record_batch([images], schema=schema))
            if found != index.rows[group]:
                raise InputError(
                    f"row group {group} of {index.place} has {found} rows, and had {index.rows[group]} before; data "
                    "must not change while they are used"
                )


def _images(table: Any, index: ParquetIndex, group: int) -> Iterator[Any]:
    """The images of a row group, some at a time."""
    import pyarrow

    hint = "; the file is damaged, or was written anew after the run had begun"
    with told(f"row group {group} of {index.place}", hint):
        if group >= table.num_row_groups:
            raise InputError(f"{index.place} has lost its row group {group}; data must not change while they are used")
        rows = table.iter_batches(ROWS, row_groups=[group], columns=[index.leaf], use_threads=False)
    while True:
        with told(f"row group {group} of {index.place}", hint):
            batch = next(rows, None)
            if batch is None:
                return
            images = batch.column(0)
            if pyarrow.types.is_struct(images.type):
                (images,) = images.flatten()
            images = images.cast(pyarrow.large_binary())
        yield images


@contextmanager
def told(what: str, hint: str = "") -> Iterator[None]:
    """Turns what Arrow and file systems raise into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of Arrow, of any file system, of the network
        raise InputError(f"{what} cannot be read: {said(error)}{hint}") from None


@contextmanager
def opened(place: Path | str) -> Iterator[Any]:
    """A parquet file by its footer. Of the rest no more is read than is asked for."""
    import pyarrow.parquet

    with told(str(place), "; it must be a whole parquet file"):
        if isinstance(place, Path):
            file = place.open("rb")
        else:
            system, path = file_system(place)
            file = system.open(path, "rb", cache_type="none")  # else each request reads megabytes ahead
    with file:
        with told(str(place), "; it must be a whole parquet file"):
            table = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, page_checksum_verification=True)
        yield table


def find_tables(place: str, where: str) -> dict[str, list[Path | str]]:
    """The parquet files of each split, as their names say.

    Args:
        place: a path, a folder, a glob or a URL.
        where: the data, for messages.

    Raises:
        InputError: there are none, or they cannot be looked at.
    """
    with told(where):
        found = files_at(place, ENDING)
    folder = common_folder(found)
    names = [within(one, folder) for one in found]
    shown = [i for i, name in enumerate(names) if not re.search(r"(^|/)[._]", name) or len(found) == 1]
    if not shown:
        raise InputError(f"{where}: there is no {place}; it must be {ENDING} files, or a folder of them")
    splits: dict[str, list[Path | str]] = {}
    for i in shown:
        if not names[i].endswith(ENDING):
            raise InputError(f"{where}: {found[i]} is no {ENDING} file; tar shards are read by wds:")
        splits.setdefault(_split_of(names[i]), []).append(found[i])
    return splits


def _split_of(name: str) -> str:
    """The split that a file's name, or its folders', tell; else "train"."""
    folders, _, last = name.rpartition("/")
    match = SHARDED.fullmatch(last)
    for text in (match["stem"] if match else "", folders, last):
        for word in re.split(r"[-._ 0-9/]+", text):
            if word.lower() in KEYWORDS:
                return KEYWORDS[word.lower()]
    return match["stem"] if match else "train"


def read_parquet(
    found: Mapping[str, Sequence[Path | str]],
    split: str | None,
    where: str,
    root: Path,
    *,
    features: Any = None,
    labelled: bool = True,
) -> EncodedSet:
    """Index parquet files where they lie: their footers and their labels are read, and no image.

    Args:
        found: the files of each split.
        split: to train on, as of `choose_splits`.
        where: the data, for messages.
        root: folder of downloads; indexes are kept in it, and what is read of the files.
        features: of the columns, as `datasets` has them; None takes those in the files.
        labelled: every image must have a label; else labels are not looked at.

    Returns:
        Splits "train", "val" and "test", as of `read_table`.

    Raises:
        InputError: a file that is damaged or unlike the others, no such split or column, a missing label, or row groups
            that are too large.
    """
    import datasets

    chosen = choose_splits(list(found), split, where)
    copies = copies_in(root / "shards")
    taken = dict.fromkeys(re.split(r"\[", one)[0] for spec in chosen.values() for one in spec.split("+"))
    indexes = _indexes({name: found[name] for name in taken}, root / "indexes", features, labelled)
    lengths = {name: sum(int(one.rows.sum()) for one in files) for name, files in indexes.items()}
    parts: dict[str, EncodedPart] = {}
    for part, spec in chosen.items():
        with told(f"{where}:{spec}"):
            slices = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        items, labels = _rows([(one.splitname, one.from_, one.to) for one in slices], indexes, copies)
        if len(items) == 0:
            raise InputError(f"{where}:{spec} holds no images")
        if part == "test" and labelled and held_back(labels):
            continue
        _check_size(items, copies)
        count = len({index.place for index in items.files})
        origin = f"the split {spec}, of {count} parquet file{'s' if count != 1 else ''}"
        parts[part] = EncodedPart(items, labels, origin)
    return EncodedSet(parts, indexes[next(iter(taken))][0].classes if labelled else None)


def _rows(
    slices: Sequence[tuple[str, int, int]], indexes: Mapping[str, Sequence[ParquetIndex]], copies: Copies
) -> tuple[ParquetItems, np.ndarray]:
    """The images and labels of slices of splits: name, from, to."""
    files: list[ParquetIndex] = []
    ranges: list[tuple[int, int, int]] = []
    labels: list[np.ndarray] = [np.zeros(0, np.int64)]
    for name, low, high in slices:
        start = 0
        for index in indexes[name]:
            count = int(index.rows.sum())
            first, last = max(0, low - start), min(count, high - start)
            if first < last:
                ranges.append((len(files), first, last))
                files.append(replace(index, labels=np.zeros(0, np.int64)))  # processes that read need none
                labels.append(index.labels[first:last])
            start += count
    return ParquetItems(files, ranges, copies), np.concatenate(labels[1:] or labels)


def _check_size(items: ParquetItems, copies: Copies) -> None:
    """That what is shuffled together can be kept on the disk, as otherwise it is read again for each image."""
    needed = items.window_bytes()
    if needed <= copies.limit:
        return
    index, group = max(((one, int(one.plain.argmax())) for one in items.files), key=lambda pair: pair[0].plain.max())
    raise InputError(
        f"row group {group} of {index.place} holds {index.plain[group] / GIB:.3g} GiB of images; {WINDOW} such are "
        f"shuffled together and take {needed / GIB:.3g} GiB of the disk, and {LIMIT} allows {copies.limit / GIB:.3g}; "
        "raise it, or write the files with smaller row groups (row_group_size=1000)"
    )


def _indexes(
    places: Mapping[str, Sequence[Path | str]], folder: Path, features: Any, labelled: bool
) -> dict[str, list[ParquetIndex]]:
    """Those of each split's files, which must have the same columns and classes."""
    wanted = [place for files in places.values() for place in files]

    def state(place: Path | str) -> str:
        with told(str(place)):
            return state_of(place, INDEX_FORMAT, labelled, features)

    def make(place: Path | str, _: str) -> dict[str, np.ndarray]:
        return make_index(place, features, labelled=labelled)

    kept = kept_indexes(wanted, folder, state, make, INDEXED)
    made = {place: _index(place, *one) for place, one in zip(wanted, kept, strict=True)}
    first = made[wanted[0]]
    for index in made.values():
        if (index.leaf, index.classes) != (first.leaf, first.classes):
            what = "columns" if index.leaf != first.leaf else "class names"
            raise InputError(f"{index.place} has other {what} than {first.place}; files of one data set must agree")
    return {name: [made[place] for place in files] for name, files in places.items()}


def _index(place: Path | str, state: str, kept: Mapping[str, np.ndarray]) -> ParquetIndex:
    rows, packed, plain, labels = (kept[key] for key in ("rows", "packed", "plain", "labels"))
    classes = kept["classes"].tolist() if kept["named"] else None
    return ParquetIndex(place, state, rows, packed, plain, labels, str(kept["column"]), str(kept["leaf"]), classes)


def make_index(place: Path | str, features: Any = None, *, labelled: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a ParquetIndex, out of a file's footer and its labels.

    Args:
        place: of the file.
        features: as of `read_parquet`.
        labelled: as of `read_parquet`.

    Raises:
        InputError: it is damaged, or has no column of images or of labels.
    """
    import datasets

    with opened(place) as table, told(str(place), "; the file is damaged"):
        known = features or datasets.Features.from_arrow_schema(table.schema_arrow)
        column = image_column(known, str(place))
        leaves = [table.schema.column(i).path for i in range(len(table.schema))]
        number = next((i for i, leaf in enumerate(leaves) if leaf in (column, f"{column}.bytes")), None)
        if number is None:
            raise InputError(f"{place}: the column {column} holds no bytes of images")
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        chunks = [group.column(number) for group in groups]
        labels, names = np.zeros(table.metadata.num_rows, np.int64), None
        if labelled:
            target = label_column(known, str(place))
            held = table.read(columns=[target], use_threads=False).column(target)
            labels, names = label_values(held, target, str(place)), class_names(known, target)
    return {
        "rows": np.array([group.num_rows for group in groups], np.int64),
        "packed": np.array([chunk.total_compressed_size for chunk in chunks], np.int64),
        "plain": np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64),
        "labels": labels,
        "column": np.array(column),
        "leaf": np.array(leaves[number]),
        "classes": np.array(names or [], dtype=str),
        "named": np.array(names is not None),
    }
