"""A teacher's logits on disk: computed once for some epochs of a fixed stream of augmented batches, then replayed.

A cache is a folder, local or under a URL: cache.json says what made it, epoch-0000.bin and so on hold one row for each
image of the stream. A long epoch is cut into epoch-0000-00000.bin and so on. Where it is cut follows from what is
stored, never from how many processes write.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from pcdistill.distillation.cache_files import CacheFolder, cache_folder
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.fingerprint import update_digest
from pcdistill.errors import InputError
from pcdistill.files import new_digest, unsealed_json
from pcdistill.plain import checked_json

Format = Literal["pcdistill-cache-1", "pcdistill-cache-2"]
FORMAT: Format = "pcdistill-cache-1"  # a file for each epoch, in float16: earlier versions read no other
FORMATS: tuple[Format, Format] = (FORMAT, "pcdistill-cache-2")
MANIFEST = "cache.json"
SHARD_BYTES, SHARD_ROWS = 1 << 26, 1 << 16  # at most so much in a file, unless a batch is more
STEPS = 255  # of int8: from a row's smallest logit to its largest
LARGEST = 65504.0  # of float16
STRICT = ConfigDict(strict=True, extra="forbid")
Count = Annotated[int, Field(ge=1, lt=2**40)]


@dataclass(frozen=True)
class CacheInfo:
    """What made a cache; a run that differs in any of it is refused.

    Attributes:
        teacher: fingerprint of the teacher: weights, class map, normalisation, resolution.
        stream: signature of the batches: images, split, order, augmentation, batch size, views.
        seed: of the stream.
        epochs: of the stream that are stored; longer trainings repeat them.
        batches: in an epoch.
        rows: images in a batch, over all processes and views.
        classes: C.
        views: of each image.
        top_k: logits stored for each image; None stores all C.
        temperature: at which the mass of the logits that top_k leaves out is kept.
        storage: of one logit: float16, or int8, which cuts the range of each row into 255 steps.
    """

    __pydantic_config__ = STRICT
    teacher: str
    stream: str
    seed: Annotated[int, Field(ge=0)]
    epochs: Count
    batches: Count
    rows: Count
    classes: Count
    views: Annotated[int, Field(ge=1, le=2)]
    top_k: Count | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    storage: Literal["float16", "int8"] = "float16"

    @property
    def row(self) -> np.dtype[Any]:
        """How one image's logits lie in a file."""
        if self.storage == "int8":
            return np.dtype([("values", "u1", (self.classes,)), ("lowest", "<f4"), ("step", "<f4")])
        if self.top_k is None:
            return np.dtype([("values", "<f2", (self.classes,))])
        place = "<u2" if self.classes <= 65536 else "<u4"
        return np.dtype([("values", "<f2", (self.top_k,)), ("places", place, (self.top_k,)), ("rest", "<f2")])

    def encode(self, logits: Tensor) -> np.ndarray[Any, Any]:
        """Rows of logits [N, C] as they are stored.

        With top_k, the other C - k classes share one value, which keeps their summed probability at `temperature` T:
        rest = T (logsumexp(z_rest / T) - log(C - k)).

        In int8, a logit becomes round((z - min z) / step) with step = (max z - min z) / 255 of its row: it comes back
        within half a step.
        """
        rows = np.zeros(len(logits), self.row)
        z = logits.detach().float().cpu()
        if self.storage == "int8":
            lowest, highest = z.amin(1), z.amax(1)
            step = (highest - lowest) / STEPS
            counted = ((z - lowest[:, None]) / step.where(step > 0, 1.0)[:, None]).round().clamp(0, STEPS)
            rows["values"], rows["lowest"], rows["step"] = counted.byte().numpy(), lowest.numpy(), step.numpy()
            return rows
        if self.top_k is None:
            rows["values"] = z.half().numpy()
            return rows
        values, places = z.topk(self.top_k, dim=1)
        others = z.scatter(1, places, -torch.inf) / self.temperature
        rest = self.temperature * (others.logsumexp(1) - float(np.log(self.classes - self.top_k)))
        rows["values"], rows["places"], rows["rest"] = values.half().numpy(), places.numpy(), rest.half().numpy()
        return rows

    def decode(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """Stored rows -> logits [N, C], float32."""
        if self.storage == "int8":
            counted = torch.from_numpy(np.ascontiguousarray(rows["values"])).float()
            lowest, step = (torch.from_numpy(np.ascontiguousarray(rows[part])) for part in ("lowest", "step"))
            return counted.mul_(step[:, None]).add_(lowest[:, None])
        values = torch.from_numpy(np.ascontiguousarray(rows["values"])).float()
        if self.top_k is None:
            return values
        rest = torch.from_numpy(np.ascontiguousarray(rows["rest"])).float()
        places = torch.from_numpy(rows["places"].astype(np.int64))
        return rest[:, None].repeat(1, self.classes).scatter_(1, places, values)


@dataclass(frozen=True)
class CacheState:
    """What cache.json holds.

    Attributes:
        info: what made the cache.
        checksums: of the finished files, in their order. While a cache is made, each file's own state says more.
        rows: that are written of the file behind those; of caches that earlier versions did not finish.
        recipe: that it was made by; older caches do not say.
        teacher: its name, size and metrics by split; older caches do not say.
        shard: batches in a file; None: a file holds an epoch.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")
    format: Format
    info: CacheInfo
    checksums: list[str]
    rows: Annotated[int, Field(ge=0)]
    recipe: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    shard: Count | None = None


@dataclass(frozen=True)
class Layout:
    """How the rows of a cache lie in files, which are numbered through all epochs.

    Attributes:
        info: of the cache.
        shard: batches in a file, the last of an epoch may have fewer; None: a file holds an epoch.
    """

    info: CacheInfo
    shard: int | None

    @classmethod
    def of(cls, info: CacheInfo) -> "Layout":
        """The layout of a new cache, a function of what is stored alone."""
        most = min(SHARD_BYTES // (info.rows * info.row.itemsize), SHARD_ROWS // info.rows)
        return cls(info, None if most >= info.batches else max(1, most))

    @property
    def step(self) -> int:
        """Batches in a file that is full."""
        return self.shard or self.info.batches

    @property
    def parts(self) -> int:
        """Files of an epoch."""
        return -(-self.info.batches // self.step)

    def __len__(self) -> int:
        return self.parts * self.info.epochs

    def name(self, number: int) -> str:
        epoch, part = divmod(number, self.parts)
        return f"epoch-{epoch:04d}.bin" if self.shard is None else f"epoch-{epoch:04d}-{part:05d}.bin"

    def batches(self, number: int) -> tuple[int, int, int]:
        """Epoch, first batch and the one behind the last."""
        epoch, part = divmod(number, self.parts)
        return epoch, part * self.step, min(self.info.batches, (part + 1) * self.step)

    def size(self, number: int) -> int:
        """Bytes of a file."""
        _, first, last = self.batches(number)
        return (last - first) * self.info.rows * self.info.row.itemsize

    def key(self) -> str:
        """Changes with what is stored, and where it is cut: parts of another cache are not taken for this one's."""
        digest = new_digest()
        digest.update(repr((sorted(asdict(self.info).items()), self.shard)).encode())
        return digest.hexdigest()


class TeacherCache:
    """A complete cache. A file's checksum is verified when it is opened; the next one is opened by a thread meanwhile.

    Local files are memory-mapped; those under a URL are held in memory, two at most.

    Raises:
        InputError: the folder is not a cache, or an unfinished or damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = cache_folder(path)
        self.path = self.folder.place
        state = read_state(self.folder)
        self.info = state.info
        self.checksums = state.checksums
        self.layout = Layout(state.info, state.shard)
        if len(self.checksums) < len(self.layout):
            done = len(finished(self.folder, state)) // self.layout.parts
            raise InputError(
                f"the cache {self.path} is not finished: {done} of {self.info.epochs} epochs; the "
                "command that began it continues it"
            )
        self._opened: dict[int, _Opening] = {}

    def logits(self, epoch: int, places: Tensor) -> Tensor:
        """Logits [N, C] float32 of rows of an epoch of the stream, repeated beyond the stored ones."""
        first, size = epoch % self.info.epochs * self.layout.parts, self.layout.step * self.info.rows
        parts = places // size
        low, high = int(parts.min()), int(parts.max())
        if low == high:
            rows = self._rows(first + low)[(places - low * size).numpy()]
        else:
            rows = np.empty(len(places), self.info.row)
            for part in parts.unique().tolist():
                here = (parts == part).numpy()
                rows[here] = self._rows(first + part)[places.numpy()[here] - part * size]
        return self.info.decode(rows)

    def ahead(self, epoch: int, batch: int) -> None:
        """Begin to open the file that a batch of an epoch lies in, so that nobody waits for it."""
        self._open(epoch % self.info.epochs * self.layout.parts + batch // self.layout.step)

    def _open(self, number: int) -> "_Opening":
        if number not in self._opened:
            self._opened[number] = _Opening(self, number)
        return self._opened[number]

    def _rows(self, number: int) -> np.ndarray[Any, Any]:
        rows = self._open(number).rows()
        following = (number + 1) % len(self.layout)
        self._opened = {one: found for one, found in self._opened.items() if one in (number, following)}
        self._open(following)
        return rows

    def read(self, number: int) -> np.ndarray[Any, Any]:
        """The rows of a file, checked."""
        name = self.layout.name(number)
        rows = self.folder.rows(name, self.info.row, self.checksums[number])
        if rows is None or rows.nbytes != self.layout.size(number):
            place = Path(self.path, name) if isinstance(self.path, Path) else f"{self.path}/{name}"
            raise InputError(f"{place} is damaged: its checksum is not the one that was written; make the cache again")
        return rows

    def check(self, *, teacher: str | None, stream: str, classes: int, views: int) -> None:
        """Refuse a run whose teacher, classes, views or stream of batches is not the cache's; None is any teacher."""
        info = self.info
        if teacher not in (None, info.teacher):
            raise InputError(
                f"the cache {self.path} comes from another teacher (weights, class order, normalisation or resolution)"
                "; make one with this teacher"
            )
        if (classes, views) != (info.classes, info.views):
            raise InputError(
                f"the cache {self.path} has {info.classes} classes and {info.views} view(s) of each image, this run "
                f"has {classes} and {views}"
            )
        if stream != info.stream:
            raise InputError(
                f"the cache {self.path} comes from other batches: data, split, augmentation, batch size, data.seed "
                f"(the cache's is {info.seed}) and this version's way to read images must be as when it was made"
            )


def fingerprint(teacher: Teacher) -> str:
    """Changes with anything that decides the teacher's logits: weights, class map, normalisation, resolution."""
    digest = new_digest()
    tensors = dict(sorted(teacher.model.state_dict().items()))
    for name in ("class_map", "scale", "shift"):
        value = getattr(teacher, name)
        if value is not None:
            tensors[f"({name})"] = value
    update_digest(digest, tensors)
    digest.update(f"{teacher.image_size} {type(teacher.model).__name__}".encode())
    return digest.hexdigest()


class _Opening:
    """A file that a thread opens. The thread ends with it, so that none is there when processes are forked later."""

    def __init__(self, cache: TeacherCache, number: int) -> None:
        self._found: np.ndarray[Any, Any] | Exception | None = None
        self._thread = Thread(target=self._read, args=(cache, number), daemon=True)
        self._thread.start()

    def _read(self, cache: TeacherCache, number: int) -> None:
        try:
            self._found = cache.read(number)
        except Exception as error:  # raised where the rows are asked for
            self._found = error

    def rows(self) -> np.ndarray[Any, Any]:
        self._thread.join()
        assert self._found is not None
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def epoch_file(path: Path, epoch: int) -> Path:
    """Where a stored epoch's rows lie, if one file holds them."""
    return path / f"epoch-{epoch:04d}.bin"


def side_file(name: str) -> str:
    """The name of what says how far a file is written, as long as the cache is not finished."""
    return f"{name.removesuffix('.bin')}.json"


def written(folder: CacheFolder, name: str, key: str) -> tuple[int, str | None]:
    """Rows of an unfinished cache's file that are safe, and its checksum once it is whole; by what is beside it."""
    try:
        found = unsealed_json(folder.text(side_file(name)), name)
    except (InputError, OSError):
        return 0, None
    rows, checksum = found.get("rows"), found.get("whole")
    if found.get("of") != key or not isinstance(rows, int) or not isinstance(checksum, str | None):
        return 0, None
    return rows, checksum


def finished(folder: CacheFolder, state: CacheState, sizes: Mapping[str, int] | None = None) -> dict[int, str]:
    """Files that are whole, by their number: their checksums."""
    layout, sizes = Layout(state.info, state.shard), folder.sizes() if sizes is None else sizes
    key, found = layout.key(), {}
    for number in range(len(layout)):
        name = layout.name(number)
        if sizes.get(name) != layout.size(number):
            continue
        checksum = state.checksums[number] if number < len(state.checksums) else None
        if checksum is None and side_file(name) in sizes:
            checksum = written(folder, name, key)[1]
        if checksum is not None:
            found[number] = checksum
    return found


def read_state(place: Path | str | CacheFolder) -> CacheState:
    """What cache.json holds.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    folder = cache_folder(place) if isinstance(place, Path | str) else place
    path = folder.place
    if MANIFEST not in folder.sizes():
        raise InputError(f"{path} is not a teacher cache: it has no cache.json; `pcdistill cache` makes one")
    file = f"{path}/{MANIFEST}"
    text = folder.text(MANIFEST)
    form = unsealed_json(text, file).get("format")
    if isinstance(form, str) and form not in FORMATS:
        raise InputError(f"{file} has the format {form!r}; this version reads {' and '.join(FORMATS)}")
    try:
        state = checked_json(text, TypeAdapter(CacheState), file)
    except InputError as error:
        raise InputError(f"{error}; it is damaged: make the cache again") from None
    info = state.info
    if info.top_k is not None and info.top_k >= info.classes:
        raise InputError(f"{file}: info.top_k must be below info.classes; it is damaged: make the cache again")
    if info.top_k is not None and info.storage != "float16":
        raise InputError(f"{file}: info.storage must be float16 with info.top_k; it is damaged: make the cache again")
    layout = Layout(info, state.shard)
    if len(state.checksums) > len(layout) or state.rows > info.rows * layout.step or layout.step > info.batches:
        raise InputError(f"{file} tells of more than a whole cache; it is damaged: make the cache again")
    return state
