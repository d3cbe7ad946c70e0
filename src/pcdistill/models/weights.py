"""Weights on disk: read without executing anything, compared with the model by name and shape, written atomically."""

import argparse
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from pcdistill.errors import InputError, first_line
from pcdistill.files import (
    CHECKSUM,
    CHUNK,
    SEAL,
    UNSEALED,
    atomic_file,
    check_archive,
    home_followed,
    like_a_seal,
    new_digest,
    unreadable,
)
from pcdistill.plain import checked_json, parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn

PathLike = str | os.PathLike[str]
SIZE = 8  # bytes of the header's length, with which a safetensors file begins
MOST_HEADER = 100_000_000  # bytes; the format allows no more
STUDENT_FILE, TEACHER_FILE = "student.safetensors", "teacher.safetensors"  # in a run's folder
STATE_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "student", "ema")


Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, lt=2**16)]


@dataclass(frozen=True)
class Known:
    """The metadata that the package reads; anything may stand beside them."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")
    task: str = ""
    classes: list[str | int | float] = field(default_factory=list)
    mean: list[Finite] = field(default_factory=list)
    std: list[Annotated[Finite, Field(gt=0)]] = field(default_factory=list)
    image_size: Pixels | None = None
    short_side: Pixels | None = None
    category_ids: list[int | str] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightReport:
    """What :func:`load_weights` took from a file, and what did not fit."""

    path: str
    key: str | None
    other_keys: tuple[str, ...]
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        source = f'{self.path}, "{self.key}"' if self.key else self.path
        parts = [f"{self.loaded} tensors loaded from {source}"]
        if self.other_keys:
            parts.append(f"not used: {_few(self.other_keys)}")
        return "; ".join(parts + ([self.problems()] if not self.fits else []))

    def problems(self) -> str:
        lists = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.misshapen))
        return ", ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in lists if keys)


def _few(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def load_weights(model: "nn.Module", path: PathLike, *, allow_mismatch: bool = False) -> WeightReport:
    """Load a safetensors file or a torch checkpoint into `model`; no code in the file is ever executed.

    A checkpoint may be a state dict or hold one under the first present of `STATE_KEYS`. The prefixes that
    DistributedDataParallel and torch.compile add to names are ignored, in the file and in the model.

    Args:
        model: changed in place, unless an error is raised.
        path: `.safetensors`, or anything that torch.save wrote.
        allow_mismatch: load what fits, and leave the rest of the model as it is.

    Returns:
        What was loaded, from which key of the checkpoint, and what did not fit.

    Raises:
        InputError: a file that is missing, corrupt, holds code or no state dict; keys that do not fit; or, even with
            `allow_mismatch`, a file without a single parameter of the model.
    """
    import torch

    tensors, key, others = _read_state(home_followed(path))
    own = _plain(model.state_dict(keep_vars=True))
    fitting = {k: v for k, v in tensors.items() if k in own and v.shape == own[k].shape}
    present = {id(own[k]) for k in fitting}  # a tied tensor may be stored under one of its names only
    report = WeightReport(
        path=str(path),
        key=key,
        other_keys=others,
        loaded=len(fitting),
        missing=tuple(
            k for k, v in own.items()
            if k not in tensors and id(v) not in present and not k.endswith("num_batches_tracked")
        ),
        unexpected=tuple(k for k in tensors if k not in own),
        misshapen=tuple(
            f"{k} {list(v.shape)} in the file, {list(own[k].shape)} in the model"
            for k, v in tensors.items() if k in own and v.shape != own[k].shape
        ),
    )  # fmt: skip
    parameters = {id(p) for p in model.parameters()}
    source = f'{path} (its "{key}")' if key else str(path)
    if parameters and not parameters & present:
        raise InputError(f"{source} holds no parameter of this model, {type(model).__name__}: {report.problems()}")
    if not report.fits and not allow_mismatch:
        remedy = "allow_mismatch=True (in a recipe: allow mismatched-weights) loads what fits"
        raise InputError(f"{source} does not fit the model, {type(model).__name__}: {report.problems()}; {remedy}")
    _check_values(fitting, own, parameters, source)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    model._pcdistill_metadata = read_metadata(path)  # type: ignore[assignment]  # a plain attribute: in no state dict
    return report


def _check_values(
    fitting: "Mapping[str, Tensor]", own: "Mapping[str, Tensor]", parameters: set[int], source: str
) -> None:
    """Raise InputError for values that no trained model has. A buffer may be infinite where the model's own is."""
    broken = [k for k, v in fitting.items() if id(own[k]) in parameters and not _finite(v)]
    if broken:
        raise InputError(f"{source} holds parameters that are not finite: {_few(broken)}")
    broken = [k for k, v in fitting.items() if v.is_floating_point() and not _finite(v) and _finite(own[k])]
    if broken:
        raise InputError(f"{source} holds buffers that are not finite: {_few(broken)}")
    broken = [k for k, v in fitting.items() if k.endswith("running_var") and bool((v < 0).any())]
    if broken:
        raise InputError(f"{source} holds variances below 0: {_few(broken)}")


def _finite(values: "Tensor") -> bool:
    """Whether all are; by the extremes, because `isfinite` takes more memory than a large layer itself."""
    if values.numel() == 0 or not values.is_floating_point() or values.itemsize == 1:  # float8 has no extremes
        return bool(values.isfinite().all())
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def _plain(state: "Mapping[str, Any]") -> "dict[str, Tensor]":
    """The tensors of a state dict, under the names that they have without torch.compile and parallel wrappers."""
    import torch

    plain = {k.replace("_orig_mod.", ""): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    wrapped = [k for k in plain if k != "n_averaged"]  # torch's moving average adds this to its "module"
    if wrapped and all(k.startswith("module.") for k in wrapped):
        plain = {k.removeprefix("module."): plain[k] for k in wrapped}
    return plain


def _read_state(path: Path) -> "tuple[dict[str, Tensor], str | None, tuple[str, ...]]":
    content = _read_file(path)
    key: str | None = None
    others: tuple[str, ...] = ()
    if not _is_state(content):
        found = [k for k in STATE_KEYS if isinstance(content, Mapping) and _is_state(content.get(k))]
        if not found:
            raise InputError(f"{path} holds no state dict, neither as a whole nor under one of {', '.join(STATE_KEYS)}")
        key, others = found[0], tuple(found[1:])
        content = content[key]
    return _plain(content), key, others


def _is_state(content: object) -> bool:
    import torch

    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) for k in content)
        and all(isinstance(v, torch.Tensor) or k.endswith("_extra_state") for k, v in content.items())
    )


def _read_file(path: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path)
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            return load_file(path)
        check_archive(path)
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)  # a Namespace of values is not code
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file: {first_line(error)}") from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        raise InputError(f"{path} {_why_unreadable(error)}") from error


def _why_unreadable(error: Exception) -> str:
    """One sentence without torch's advice to switch its safety off."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"holds pickled code ({code[1]}), which was not executed; save its state dict alone, best as safetensors"
    if "TorchScript" in str(error):
        return "is a TorchScript program; save its state dict alone, best as safetensors"
    if isinstance(error, pickle.UnpicklingError):
        return "is damaged or a pickle that torch.save did not write; nothing in it was executed"
    return f"is not a complete torch checkpoint: {first_line(error).split('. ')[0]}"


def check_file(path: PathLike) -> None:
    """Raise InputError if there is no weights file; nothing is read."""
    path = home_followed(path)
    if not path.exists():
        raise InputError(f"weights file {path} does not exist")
    if not path.is_file():
        raise InputError(f"weights must be a file, got the folder {path}")


def run_weights(folder: Path) -> Path:
    """The weights in a run's folder: a teacher that was trained for a run has teacher.safetensors."""
    whose = TEACHER_FILE if (folder / TEACHER_FILE).exists() and not (folder / STUDENT_FILE).exists() else STUDENT_FILE
    return folder / whose


def save_weights(model: "nn.Module", path: PathLike, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the model's state as safetensors, complete or not at all; equal states give equal bytes.

    The metadata hold a checksum of the whole file, which :func:`load_weights` and :func:`read_metadata` check.

    Args:
        model: tied tensors are written under each of their names; a compiled or wrapped model like the plain one.
        path: the file; its folder is made if it is not there.
        metadata: plain values. `classes` (names in the order of the logits), `mean`, `std` (per channel, of images in
            [0, 1]) and `image_size` are understood by :func:`class_names` and :func:`input_stats`.
    """
    from safetensors.torch import save

    path = Path(path)
    state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in _plain(model.state_dict()).items()}
    raw = save(state)
    start = SIZE + int.from_bytes(raw[:SIZE], "little")
    # The library writes metadata in the order of a hash map, so the header is written anew, in one order.
    known = {CHECKSUM: UNSEALED, "format": "pt", "pcdistill": json.dumps(dict(metadata or {}), sort_keys=True)}
    text = json.dumps({"__metadata__": known, **json.loads(raw[SIZE:start])}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % SIZE)
    head, tensors = len(text).to_bytes(SIZE, "little") + text, memoryview(raw)[start:]
    digest = new_digest()
    digest.update(head)
    digest.update(tensors)
    with atomic_file(path) as file:
        file.write(head.replace(UNSEALED.encode(), SEAL.encode() + digest.hexdigest().encode(), 1))
        file.write(tensors)
        file.flush()
        try:
            check_safetensors(Path(file.name))
        except InputError:
            raise unreadable(path) from None


def check_safetensors(path: Path) -> None:
    """Check a safetensors file of ours against the checksum in its metadata; one without a checksum passes.

    Raises:
        InputError: damaged.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(SIZE), "little")
        if length > min(path.stat().st_size - SIZE, MOST_HEADER):
            return  # the library says so
        text = file.read(length)
        try:
            metadata = parse_json(text, str(path))["__metadata__"]
            seals = [one for one in metadata.values() if like_a_seal(one)]
        except (InputError, KeyError, TypeError, AttributeError):
            return
        if not seals and not (CHECKSUM in metadata and "pcdistill" in metadata):
            return
        digest = new_digest()
        digest.update(length.to_bytes(SIZE, "little"))
        digest.update(text.replace(seals[0].encode(), UNSEALED.encode(), 1) if seals else text)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if seals != [SEAL + digest.hexdigest()]:
        raise InputError(f"{path} is damaged: its checksum is not the one that was written")


def read_metadata(path: PathLike) -> dict[str, Any]:
    """What :func:`save_weights` was told about the weights; a foreign safetensors file's own strings; {} for others.

    Of a foreign file's strings those are left out whose names mean something here.

    Raises:
        InputError: a file that is missing, a corrupt safetensors file, or metadata of other types.
    """
    from safetensors import SafetensorError, safe_open

    path = home_followed(path)
    check_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            raw: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {first_line(error)}") from error
    if "pcdistill" in raw:
        return checked_metadata(raw["pcdistill"], str(path))
    return {key: value for key, value in raw.items() if key not in Known.__dataclass_fields__}


def checked_metadata(text: str, where: str) -> dict[str, Any]:
    """The metadata that :func:`save_weights` wrote as JSON, the types of what the package reads checked.

    Raises:
        InputError: naming the key that is not of its type.
    """
    known = checked_json(text, TypeAdapter(Known), f"{where}: metadata")
    if len(known.mean) != len(known.std):
        raise InputError(f"{where}: metadata: mean has {len(known.mean)} channels and std {len(known.std)}")
    return dict(parse_json(text, where))


def read_classes(path: PathLike) -> list[str] | None:
    """The class names, in the order of the logits, in the metadata of a weights file; None if it has none."""
    classes = read_metadata(path).get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) and classes else None


def read_stats(path: PathLike, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and std by channel, with which a model's images were normalised, in the metadata of its weights file; None
    if it has none for so many channels.
    """
    metadata = read_metadata(path)
    found = []
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        values = metadata.get(name)
        if not isinstance(values, list) or len(values) != channels:
            return None
        if not all(isinstance(value, int | float) and least < value < math.inf for value in values):
            return None
        found.append([float(value) for value in values])
    return found[0], found[1]
