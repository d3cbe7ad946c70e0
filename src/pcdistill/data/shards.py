"""WebDataset's tar shards (`wds:PATTERN`), read by position after an index of each shard was made once.

Of a sample, the files that share a name up to the first dot, the image and the label are read; nothing else in a shard
is looked into, and nothing is unpickled.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from pcdistill.data.copies import Copies, copies_in
from pcdistill.data.decoding import Plan, read_windows
from pcdistill.data.encoded import EncodedItems, EncodedPart, EncodedSet
from pcdistill.data.files import EXTENSIONS, Names
from pcdistill.data.indexes import kept_indexes, state_of
from pcdistill.errors import InputError
from pcdistill.extras import need
from pcdistill.files import new_digest
from pcdistill.plain import parse_json
from pcdistill.remote import common_folder, file_system, files_at, place_of, said, within

PREFIX = "wds:"
CLASSES_FILE = "classes.txt"  # in the folder that all shards are in
LABELS = ("cls", "json")  # a sample's file with the label, the first that is there
JSON_KEYS = ("label", "cls", "class")  # of the json
LARGEST_LABEL = 2**20  # bytes
INDEX_FORMAT = 1  # counts up when an index holds something else
INDEXED = ("keys", "offsets", "sizes", "labels")  # what it holds
BLOCK = 512  # of tar
FETCHED = 4  # shards at a time, for a batch
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's images are.

    Attributes:
        keys: of the samples.
        offsets: [N] int64, of the image's first byte in the shard.
        sizes: [N] int64, bytes of the image.
        labels: [N] text, as the shard has it; "" where labels are not asked for.
        state: changes when the shard does.
    """

    keys: Names
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    state: str = ""


class ShardItems(EncodedItems):
    """The images of shards, in their order.

    Args:
        places: of the shards: paths, or URLs that fsspec opens.
        indexes: of each.
        copies: of the shards that lie elsewhere.
    """

    kind = "tar shards"

    def __init__(self, places: list[Path | str], indexes: list[ShardIndex], copies: Copies) -> None:
        self.places, self.copies = places, copies
        self.states = [index.state for index in indexes]
        self.keys = Names(key for index in indexes for key in index.keys)
        self.ends = np.cumsum([len(index.keys) for index in indexes])
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        if any(isinstance(place, str) for place in places):
            self.groups = np.arange(len(places)).repeat(np.diff(self.ends, prepend=0))

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, i: int) -> int:
        """The number of the shard that sample i is in."""
        return int(np.searchsorted(self.ends, i, side="right"))

    def prepare(self, rows: Iterable[int]) -> None:
        known = {(self.places[n], self.states[n]) for n in {self.shard_of(i) for i in rows}}
        missing = [
            (place, state) for place, state in known if isinstance(place, str) and not self.copies.holds(place, state)
        ]
        if len(missing) > 1:  # one alone is fetched when it is read
            with ThreadPoolExecutor(FETCHED) as pool:
                list(pool.map(self._fetch, missing))

    def _fetch(self, shard: tuple[str, str]) -> None:
        with suppress(OSError):  # told when an image is read
            self.copies.open(*shard).close()

    def content(self, i: int) -> bytes:
        return self._bytes(i, copied=False)

    def read(self, i: int, plan: Plan) -> list[Tensor]:
        return read_windows(self.name(i), plan, self._bytes(i, copied=True))

    def _bytes(self, i: int, *, copied: bool) -> bytes:
        """Of image i; `copied` fetches a shard that lies elsewhere whole, as more will be read of it."""
        number, start, size = self.shard_of(i), int(self.offsets[i]), int(self.sizes[i])
        place = self.places[number]
        try:
            if isinstance(place, Path):
                with open(place, "rb") as file:
                    file.seek(start)
                    found = file.read(size)
            elif copied:
                found = self.copies.read(place, start, size, self.states[number])
            else:
                system, path = file_system(place)  # fsspec keeps one for each process
                found = system.cat_file(path, start=start, end=start + size)
        except OSError as error:
            raise InputError(f"{self.name(i)} cannot be read: {said(error)}") from None
        if len(found) != size:
            raise InputError(f"{self.name(i)} cannot be read: the shard was cut off after the run had begun")
        return bytes(found)

    def name(self, i: int) -> str:
        return f"{self.keys[i]} of {self.places[self.shard_of(i)]}"

    def layout(self) -> str:
        digest = new_digest()
        digest.update("\n".join(self.keys).encode(errors="surrogateescape"))
        for array in (self.ends, self.offsets, self.sizes):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return str(digest.hexdigest())


def read_shards(pattern: str, root: Path, *, labelled: bool = True) -> EncodedSet:
    """Find shards and index them.

    Args:
        pattern: paths or URLs with braces and globs, several joined by `::`, or a folder; without "wds:".
        root: folder of downloads; indexes are kept in it, and copies of shards that lie elsewhere.
        labelled: every sample must have a label; else labels are not looked at.

    Returns:
        Splits by the words train, val and test in the names of files and folders; without such words all is "train".

    Raises:
        InputError: no shards, one that is damaged, or a sample without image or label; naming shard and sample.
    """
    places, copies = find_shards(pattern), copies_in(root / "shards")
    kept = kept_indexes(
        places,
        root / "indexes",
        lambda place: _state(place, labelled),
        lambda place, state: _arrays(make_index(place, copies, labelled=labelled, state=state)),
        INDEXED,
    )
    found = [_index(*one) for one in kept]
    folder = common_folder(places)
    parts: dict[str, EncodedPart] = {}
    for split, numbers in _by_split(places, folder).items():
        chosen = [found[i] for i in numbers]
        items = ShardItems([places[i] for i in numbers], chosen, copies)
        if len(items) == 0:
            raise InputError(f"{PREFIX}{pattern}: the {split} shards hold no samples")
        word = f" whose names say {split}" if len(numbers) < len(places) else ""
        origin = f"{len(numbers)} shard{'s' if len(numbers) > 1 else ''}{word}"
        parts[split] = EncodedPart(items, np.concatenate([index.labels for index in chosen]), origin)
    if "train" not in parts:
        raise InputError(f"{PREFIX}{pattern}: no shard is for training; the names say {' and '.join(parts)}")
    return EncodedSet(parts, _classes(places, folder) if labelled else None)


def find_shards(pattern: str) -> list[Path | str]:
    """The shards of a pattern in order.

    Raises:
        InputError: none, or one that is named and not there.
    """
    need("webdataset", what=f"{PREFIX}{pattern}")
    from webdataset.shardlists import expand_urls

    try:
        names = expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise InputError(f"{PREFIX}{pattern} is no pattern of shards: {said(error)}") from None
    found = [place for name in names for place in _matches(name, pattern)]
    seen: set[str] = set()
    for place in found:
        if str(place) in seen:
            raise InputError(f"{PREFIX}{pattern} names the shard {place} twice")
        seen.add(str(place))
    return found


def _matches(name: str, pattern: str) -> list[Path | str]:
    """What one name without braces stands for: a file, the shards of a folder, or what a glob finds."""
    try:
        found = files_at(name, ".tar")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{PREFIX}{pattern}: {name} cannot be looked at: {said(error)}") from None
    if not found:
        raise InputError(f"{PREFIX}{pattern}: there is no shard {name}; it must be .tar files, or a folder of them")
    return found


def _by_split(places: list[Path | str], folder: str) -> dict[str, list[int]]:
    """Numbers of the shards of each split, by words in the part of their names that is not common to all."""
    splits: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        words = re.split(r"[^a-z]+", within(place, folder).lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        splits.setdefault(split, []).append(i)
    return splits if len(splits) > 1 else {"train": list(range(len(places)))}


def _classes(places: list[Path | str], folder: str) -> list[str] | None:
    """Class names, one a line, of a file in the folder of the shards; None without one."""
    place: Any = Path(folder, CLASSES_FILE) if isinstance(places[0], Path) else f"{folder}/{CLASSES_FILE}"
    try:
        if isinstance(place, Path):
            content = place.read_bytes() if place.is_file() else None
        else:
            place = place_of(place)
            system, path = file_system(str(place))
            content = system.cat_file(path) if system.exists(path) else None
        lines = None if content is None else content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{place} cannot be read: {said(error)}; it must be text in UTF-8, a class a line") from None
    return None if lines is None else [line.strip() for line in lines if line.strip()]


def _state(place: Path | str, labelled: bool) -> str:
    try:
        return state_of(place, INDEX_FORMAT, labelled)
    except OSError as error:
        raise InputError(f"the shard {place} cannot be read: {said(error)}") from None


def _arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    keys = np.array(list(index.keys), dtype=str)
    return {"keys": keys, "offsets": index.offsets, "sizes": index.sizes, "labels": index.labels}


def _index(state: str, kept: Mapping[str, np.ndarray]) -> ShardIndex:
    keys = Names(kept["keys"].tolist())
    return ShardIndex(keys, kept["offsets"], kept["sizes"], kept["labels"].astype(str), state)


def make_index(place: Path | str, copies: Copies, *, labelled: bool = True, state: str = "") -> ShardIndex:
    """Read a shard's headers and its samples' labels.

    Args:
        place: of the shard.
        copies: of the shards that lie elsewhere, such as this one may.
        labelled: as of `read_shards`.
        state: of the shard, by `state_of`; another one is another copy.

    Raises:
        InputError: it is damaged, cut off or compressed, or a sample has no image, or none or a wrong label.
    """
    keys, offsets, sizes, labels = [], [], [], []
    try:
        with copies.open(place, state) if isinstance(place, str) else place.open("rb") as file:
            for key, members in _samples(file, place):
                image = _image(key, members, place)
                keys.append(key)
                offsets.append(image.offset_data)
                sizes.append(image.size)
                labels.append(_label(key, members, file, place) if labelled else "")
    except tarfile.TarError as error:
        raise InputError(
            f"the shard {place} cannot be read: {said(error)}; it must be a whole .tar file that is not compressed"
        ) from None
    except OSError as error:
        raise InputError(f"the shard {place} cannot be read: {said(error)}") from None
    where = np.array(offsets, np.int64), np.array(sizes, np.int64)
    return ShardIndex(Names(keys), *where, np.array(labels, dtype=str), state)


def _members(file: BinaryIO, place: Path | str) -> Iterator[tarfile.TarInfo]:
    """The files of a tar archive; after the last, that it ends as an archive does."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # not in its types; it would keep them all
            if member.isfile() and not member.issparse():
                yield member
        # A header that is damaged ends the archive for Python without a word, as does the end of the file.
        file.seek(archive.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise InputError(
                f"the shard {place} is cut off or damaged at byte {archive.offset}; fetch or write it anew"
            )


def _samples(file: BinaryIO, place: Path | str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighbouring files that share a key: the key, and the files by what follows its first dot, in small letters."""
    from webdataset.tariterators import base_plus_ext

    key, members = None, dict[str, tarfile.TarInfo]()
    for member in _members(file, place):
        base, ending = base_plus_ext(member.name)
        if base is None or os.path.basename(base).startswith("__"):  # no sample's, or WebDataset's own notes
            continue
        if base != key:
            if key is not None:
                yield key, members
            key, members = base, {}
        if ending.lower() in members:
            raise InputError(f"the shard {place} holds {member.name} twice")
        members[ending.lower()] = member
    if key is not None:
        yield key, members


def _image(key: str, members: dict[str, tarfile.TarInfo], place: Path | str) -> tarfile.TarInfo:
    found = [ending for ending in members if f".{ending}" in EXTENSIONS]
    if len(found) != 1:
        many = f"several images ({', '.join(found)})" if found else f"no image, only {', '.join(members)}"
        raise InputError(f"the sample {key} of the shard {place} has {many}; it must have one")
    return members[found[0]]


def _label(key: str, members: dict[str, tarfile.TarInfo], file: BinaryIO, place: Path | str) -> str:
    """The text of a sample's label."""
    where = f"the sample {key} of the shard {place}"
    ending = next((one for one in LABELS if one in members), None)
    if ending is None:
        raise InputError(f"{where} has no label: it needs a file .cls or .json beside the image")
    member = members[ending]
    if member.size > LARGEST_LABEL:
        raise InputError(f"{where}: its .{ending} has {member.size} bytes, which is no label")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode().strip()
    except UnicodeDecodeError:
        raise InputError(f"{where}: its .{ending} is no text in UTF-8") from None
    if ending == "cls":
        if not text:
            raise InputError(f"{where}: its .cls is empty")
        return text
    told = parse_json(text, f"{where}: .json")
    value = next((told[one] for one in JSON_KEYS if one in told), None) if isinstance(told, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{where}: its .json must have one of {', '.join(JSON_KEYS)}, a whole number or a name")
    return str(value)
