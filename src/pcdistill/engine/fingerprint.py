"""What a run is made of, in fingerprints: a result belongs to contents, not to the paths that they were found under.

They stand in last.pt and result.json, by the keys that :func:`words` puts into words. They cost one pass over the bytes
of each model, once in a run.

Limits: code is not looked at. A `forward` that was rewritten, with the same modules and weights, passes for the same.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pcdistill.engine.checkpoint import COMPILED
from pcdistill.errors import InputError
from pcdistill.files import new_digest
from pcdistill.models.feature_maps import unwrap

Contents = dict[str, str]
START, KEPT = "student.start", "student.kept"


def update_digest(digest: Any, tensors: Mapping[str, Any]) -> None:
    """Put names, dtypes, shapes and bytes of tensors into a digest, in the mapping's order; other values are passed."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if is_lazy(value):
            digest.update(f"{name} lazy ".encode())
            continue
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())


def weights_fingerprint(state: Mapping[str, Any]) -> str:
    """Of every tensor of a state dict, whatever their order, compiled or not."""
    digest = new_digest()
    update_digest(digest, dict(sorted((name.replace(COMPILED, ""), value) for name, value in state.items())))
    return str(digest.hexdigest())


def structure_fingerprint(module: nn.Module) -> str:
    """Of the modules as they print (classes, sizes, strides), and the tensors' names, dtypes and shapes."""
    module = unwrap(module)
    digest = new_digest()
    digest.update(re.sub(r"\b0x[0-9a-f]+", "", repr(module)).encode())
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and not is_lazy(value):
            digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
    return str(digest.hexdigest())


def student_contents(student: nn.Module) -> Contents:
    """Of a student before it is trained."""
    return {"student.structure": structure_fingerprint(student), START: weights_fingerprint(student.state_dict())}


def teacher_contents(teacher: Any, name: str = "teacher") -> Contents:
    """Of a wrapped teacher: what is in its `model`, and apart from it what is done with images and outputs."""
    digest = new_digest()
    update_digest(digest, {key: one for key, one in teacher.named_buffers() if not key.startswith("model.")})
    digest.update(repr(teacher.image_size).encode())
    return {
        f"{name}.structure": structure_fingerprint(teacher.model),
        f"{name}.weights": weights_fingerprint(teacher.model.state_dict()),
        f"{name}.input": digest.hexdigest(),
    }


def words(key: str) -> str:
    """A key of contents, for a sentence."""
    owner, _, what = key.partition(".")
    if owner == "data":
        part, _, what = what.partition(".")
        return f"the {what} of {part}" if what else f"the {part} of the data"
    named = f"teacher {owner.removeprefix('teacher-')}'s" if owner.startswith("teacher-") else f"the {owner}'s"
    told = {"input": "class order, normalisation or resolution", "start": "start weights"}
    return f"{named} {told.get(what, what)}"


def changes(found: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """In words, what both know and is not the same. Of a split whose labels changed, the images are not named."""
    keys = [key for key, value in recorded.items() if found.get(key, value) != value]
    labels = {key.removesuffix(".labels") for key in keys if key.endswith(".labels")}
    return [words(key) for key in keys if not (key.endswith(".images") and key.removesuffix(".images") in labels)]


def settle(where: Any, found: Contents, recorded: Any, own: Iterable[str] = ()) -> None:
    """Refuse to go on with what was made of other contents; what older versions recorded nothing of passes.

    Args:
        where: the file or folder, for the error.
        found: of the run at hand. Where its student is the recorded run's own, trained further, its start weights
            become the recorded ones.
        recorded: what the file says; not looked at unless it is a mapping.
        own: fingerprints of weights that the recorded run left in its student.

    Raises:
        InputError: saying what changed.
    """
    if not isinstance(recorded, Mapping):
        return
    if found.get(START) in set(own) and START in recorded:
        found[START] = recorded[START]
    changed = changes(found, recorded)
    if not changed:
        return
    listed = ", ".join(changed[:-1]) + (" and " if len(changed) > 1 else "") + changed[-1]
    hint = " (a student that was trained since must be built anew)" if changed == [words(START)] else ""
    raise InputError(
        f"{where} was made of other contents: {listed} changed{hint}; name another --out (from Python: out), or delete "
        "the folder"
    )
