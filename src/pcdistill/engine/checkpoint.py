"""Checkpoints that survive a kill at any moment: written beside, read back, renamed; checked whole, read as data only.

What a run must remember is a mapping of names to parts; one loop saves them and one loads them.
"""

import pickle
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from pcdistill.errors import InputError
from pcdistill.files import (
    atomic_file,
    atomic_write,
    check_archive,
    damaged_archive,
    new_digest,
    seal_archive,
    unreadable,
)

FORMAT = "pcdistill-1"
COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's state
__all__ = [
    "COMPILED", "FORMAT", "Part", "Randomness", "Scaler", "Value", "Weights", "atomic_write", "collect",
    "load_checkpoint", "load_state", "random_state", "restore", "restore_random_state", "save_checkpoint", "to_cpu",
]  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> str:
    """Save tensors and plain values atomically; the format's name is added. Equal states give equal bytes.

    The file is read back before it takes the place of the old one: what could not be loaded is found now.

    Returns:
        The checksum, which also stands in the file.

    Raises:
        InputError: the state holds more than tensors and plain values, so that it could not be loaded again.
    """
    with atomic_file(path) as file:
        writer = _Hashing(file)
        torch.save({"format": FORMAT, **_canonical(state)}, writer)  # type: ignore[arg-type]  # write() is all it calls
        checksum = writer.digest.hexdigest()
        seal_archive(file, checksum)
        file.flush()
        _read_back(Path(file.name), path)
    return checksum


class _Hashing:
    """A file that torch writes to, and the digest of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, new_digest()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _canonical(value: Any) -> Any:
    """The same with containers and strings that nothing else shares: pickle writes what is shared as a reference."""
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_canonical(one) for one in value)
    return value


def _read_back(written: Path, path: Path) -> None:
    """Every byte against torch's own checksums, then the structure as a resumed run reads it."""
    if damaged_archive(written):
        raise unreadable(path)
    try:
        torch.load(written, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({code[1]})" if code else ""
        raise InputError(
            f"checkpoint {path} could not be loaded again: the state of a model, a loss or the optimiser holds more "
            f"than tensors and plain values{what}; convert it in state_dict or get_extra_state"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint as data: `weights_only`, so that nothing in it can run.

    Returns:
        The state, with "checksum": what :func:`save_checkpoint` gave, or None of a file that an older version wrote.

    Raises:
        InputError: missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        found = check_archive(path)
    except InputError as error:
        raise InputError(f"checkpoint {error}; put a copy back, or begin anew in another --out") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way there is
        raise InputError(
            f"checkpoint {path} cannot be read: it is damaged, or holds more than tensors and plain values"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"checkpoint {path} was not written by pcdistill's training")
    return {**state, "checksum": found}


class Part(Protocol):
    """Something that a checkpoint remembers: an optimiser is one, and so are the classes below."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def collect(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The state of every part by its name; every process must call it, for some gather."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Part], state: Mapping[str, Any]) -> None:
    """Give every part its state back, in order."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


@dataclass(frozen=True)
class Weights:
    """A module's parameters and buffers, kept on the CPU; without a module, None."""

    module: nn.Module | None

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.module is None else to_cpu(self.module.state_dict())

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.module is not None and state is not None:
            load_state(self.module, state)


@dataclass(frozen=True)
class Scaler:
    """The loss scaling of float16, where there is any."""

    accelerator: Accelerator

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.accelerator.scaler is not None and state is not None:
            self.accelerator.scaler.load_state_dict(state)


@dataclass(frozen=True)
class Value:
    """An attribute that holds plain values."""

    owner: Any
    name: str

    def state_dict(self) -> Any:
        return getattr(self.owner, self.name)

    def load_state_dict(self, state: Any) -> None:
        setattr(self.owner, self.name, state)


@dataclass(frozen=True)
class Randomness:
    """The generators of every process; each takes its own back."""

    accelerator: Accelerator

    def state_dict(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = gather_object([random_state()])
        return states

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        restore_random_state(state[self.accelerator.process_index])


def to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict on the CPU, free of the wrappers' prefixes."""
    return {
        key.replace(COMPILED, ""): value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def load_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module a state of :func:`to_cpu` back: it, or a part of it, may be in torch.compile."""
    own = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    module.load_state_dict({own.get(name, name): value for name, value in state.items()})


def random_state() -> dict[str, Any]:
    """The states of every generator that a step may draw from, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
