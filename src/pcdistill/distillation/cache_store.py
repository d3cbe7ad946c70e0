"""A teacher's logits on disk: computed once for some epochs of a fixed stream of augmented batches, then replayed.

A cache is a folder: cache.json says what made it, epoch-0000.bin and so on hold one row for each image of the stream.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.fingerprint import update_digest
from pcdistill.errors import InputError
from pcdistill.files import file_checksum, new_digest, unsealed_json
from pcdistill.plain import checked_json, read_text

FORMAT = "pcdistill-cache-1"
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

    @property
    def row(self) -> np.dtype[Any]:
        """How one image's logits lie in a file."""
        if self.top_k is None:
            return np.dtype([("values", "<f2", (self.classes,))])
        place = "<u2" if self.classes <= 65536 else "<u4"
        return np.dtype([("values", "<f2", (self.top_k,)), ("places", place, (self.top_k,)), ("rest", "<f2")])

    def encode(self, logits: Tensor) -> np.ndarray[Any, Any]:
        """Rows of logits [N, C] as they are stored.

        With top_k, the other C - k classes share one value, which keeps their summed probability at `temperature` T:
        rest = T (logsumexp(z_rest / T) - log(C - k)).
        """
        rows = np.zeros(len(logits), self.row)
        z = logits.detach().float().cpu()
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
        checksums: of the finished epochs.
        rows: that are written of the epoch under way.
        recipe: that it was made by; older caches do not say.
        teacher: its name, size and metrics by split; older caches do not say.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")
    format: Literal["pcdistill-cache-1"]
    info: CacheInfo
    checksums: list[str]
    rows: Annotated[int, Field(ge=0)]
    recipe: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None


class TeacherCache:
    """A complete cache, memory-mapped. Each epoch's checksum is verified when the epoch is first read.

    Raises:
        InputError: the folder is not a cache, or an unfinished or damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        state = read_state(self.path)
        self.info = state.info
        self.checksums = state.checksums
        if len(self.checksums) < self.info.epochs:
            raise InputError(
                f"the cache {self.path} is not finished: {len(self.checksums)} of {self.info.epochs} epochs; the "
                "command that began it continues it"
            )
        self._maps: dict[int, np.ndarray[Any, Any]] = {}

    def logits(self, epoch: int, places: Tensor) -> Tensor:
        """Logits [N, C] float32 of rows of an epoch of the stream, repeated beyond the stored ones."""
        stored = epoch % self.info.epochs
        if stored not in self._maps:
            file = epoch_file(self.path, stored)
            wanted = self.info.batches * self.info.rows * self.info.row.itemsize
            if not file.is_file() or file.stat().st_size != wanted or file_checksum(file) != self.checksums[stored]:
                raise InputError(
                    f"{file} is damaged: its checksum is not the one that was written; make the cache again"
                )
            self._maps = {stored: np.memmap(file, self.info.row, "r")}
        return self.info.decode(self._maps[stored][places.numpy()])

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


def epoch_file(path: Path, epoch: int) -> Path:
    """Where a stored epoch's rows lie."""
    return path / f"epoch-{epoch:04d}.bin"


def read_state(path: Path) -> CacheState:
    """What cache.json holds.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    file = path / "cache.json"
    if not file.is_file():
        raise InputError(f"{path} is not a teacher cache: it has no cache.json; `pcdistill cache` makes one")
    text = read_text(file)
    form = unsealed_json(text, str(file)).get("format")
    if isinstance(form, str) and form != FORMAT:
        raise InputError(f"{file} has the format {form!r}; this version reads {FORMAT!r}")
    try:
        state = checked_json(text, TypeAdapter(CacheState), str(file))
    except InputError as error:
        raise InputError(f"{error}; it is damaged: make the cache again") from None
    info = state.info
    if info.top_k is not None and info.top_k >= info.classes:
        raise InputError(f"{file}: info.top_k must be below info.classes; it is damaged: make the cache again")
    if len(state.checksums) > info.epochs or state.rows > info.rows * info.batches:
        raise InputError(f"{file} tells of more than a whole cache; it is damaged: make the cache again")
    return state
