"""The names under which the zoos' classifiers go."""

import difflib
import fnmatch
from collections.abc import Callable

from pcdistill.errors import InputError, nearest
from pcdistill.files import home_followed


def list_models(pattern: str = "") -> list[str]:
    """Full names, sorted, of the classifiers that `pattern` fits: a zoo's prefix, a part of a name, or a glob.

    `hf/NAME` and `path/to/file.py:function` name models too, but cannot be listed.
    """
    zoo = pattern.split("/", 1)[0]
    names = [f"{prefix}/{name}" for prefix in ([zoo] if zoo in LISTERS else LISTERS) for name in LISTERS[prefix]()]
    if any(character in pattern for character in "*?["):
        return sorted(n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.split("/", 1)[1], pattern))
    return sorted(n for n in names if pattern in n)


def resolve_name(name: str) -> str:
    """The full name that `name` stands for; a user's `file.py:function` and hub names pass as they are.

    Raises:
        InputError: no zoo has it, or more than one.
    """
    if is_user_code(name) or name.endswith(".py"):
        return name
    if is_endpoint(name):
        raise InputError(f"{name} is an endpoint, which can only be the teacher of a classifier")
    zoo, slash, inner = name.partition("/")
    if zoo == "hf" and inner:
        return name
    if zoo in LISTERS and slash:
        if inner.split(":")[0] in ("hf-hub", "hf_hub", "local-dir") and zoo == "timm":
            return name
        names = LISTERS[zoo]()
        if _architecture(zoo, inner) in names:
            return name
        if zoo == "torchvision" and inner in _torchvision_others():
            raise InputError(f'model "{name}" is not an image classifier')
        raise InputError(f'unknown model "{name}"{nearest(name, [f"{zoo}/{n}" for n in names])}')
    found = [f"{zoo}/{name}" for zoo, lister in LISTERS.items() if _architecture(zoo, name) in lister()]
    if not found:
        raise InputError(f'unknown model "{name}"{_hint(name)}')
    if len(found) > 1:
        raise InputError(f'model "{name}" is ambiguous; write {" or ".join(found)}')
    return found[0]


def _hint(name: str) -> str:
    zoo, slash, _ = name.rpartition("/")
    if slash and not nearest(zoo, [*LISTERS, "hf"]):
        return f'; a model of the Hugging Face hub is written "hf/{name}", your own "path/to/file.py:function"'
    full_names = {full_name.split("/", 1)[1]: full_name for full_name in list_models()}
    close = difflib.get_close_matches(name.rpartition("/")[2], full_names, n=1, cutoff=0.5)
    return f'; did you mean "{full_names[close[0]]}"?' if close else ""


def _architecture(zoo: str, name: str) -> str:
    return name.split(".")[0] if zoo == "timm" else name  # what follows the point in timm names its weights


def is_user_code(name: str) -> bool:
    """Whether a model or a loss is the user's own: `path/to/file.py:name`."""
    return ".py:" in name and not is_endpoint(name)


def is_endpoint(name: str) -> bool:
    """Whether a teacher is behind HTTP: `http://HOST/v2/models/NAME`."""
    return name.startswith(("http://", "https://"))


def has_zoo_weights(name: str, task: str = "classification") -> bool:
    """Whether a full name is of a model that comes with trained weights.

    Of a detector FAMILY/BACKBONE these are the backbone's, which a tiny one has not; hf/KIND has none.
    """
    if is_user_code(name) or is_endpoint(name):
        return False
    zoo, _, rest = name.partition("/")
    if task != "detection" or zoo == "torchvision":
        return zoo in ("timm", "torchvision", "hf")
    if zoo == "hf":
        return "/" in rest or home_followed(rest).exists()
    return bool(rest) and not rest.startswith("tiny")


def _cifar_names() -> list[str]:
    from pcdistill.models.cifar import MODELS

    return list(MODELS)


def _torchvision_names() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))  # without detectors, video and the like


def _torchvision_others() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models())


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


LISTERS: dict[str, Callable[[], list[str]]] = {
    "cifar": _cifar_names,
    "torchvision": _torchvision_names,
    "timm": _timm_names,
}
