"""One builder per zoo: torchvision, timm, Hugging Face, the user's own file, and our networks for small images."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from pcdistill.errors import InputError, NotFetched, PcdistillError, first_line, nearest
from pcdistill.extras import need
from pcdistill.files import home_followed
from pcdistill.models.fetching import out_of_reach

if TYPE_CHECKING:
    from torch import Tensor, nn


class Request(NamedTuple):
    """What a zoo is asked for: `name` has no prefix, `num_classes` None keeps the model's own classes."""

    name: str
    num_classes: int | None
    in_channels: int
    image_size: int | None
    pretrained: bool
    kwargs: Mapping[str, Any]


class Built(NamedTuple):
    """What a zoo made; `own_head`: the head was not replaced; `image_size`: the model was built for this size."""

    model: "nn.Module"
    own_head: bool = False
    image_size: int | None = None


class Origin(NamedTuple):
    """How `build_model` made a model; kept on the model for `input_stats` and `class_names`."""

    name: str
    request: Request
    own_head: bool
    image_size: int | None


@contextmanager
def _build_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence."""
    try:
        yield
    except OSError as error:
        if (host := out_of_reach(error)) is not None:
            raise NotFetched(f'the files of "{name}" are not on this machine, and {host} cannot be reached') from error
        raise NotFetched(f'the files of "{name}" could not be fetched: {first_line(error)}') from error
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise InputError(f'model "{name}" could not be built: {first_line(error)}') from error


def _build_cifar(request: Request) -> Built:
    from pcdistill.models.cifar import MODELS

    full_name = f"cifar/{request.name}"
    if request.pretrained:
        raise InputError(f'"{full_name}" has no pretrained weights; give a weights file, or train it first')
    kwargs: dict[str, Any] = {"in_channels": request.in_channels}
    if request.num_classes is not None:
        kwargs["num_classes"] = request.num_classes
    with _build_errors(full_name):
        model: Any = MODELS[request.name](**{**kwargs, **request.kwargs})
    model.in_chans = request.in_channels
    size = request.image_size
    model.pretrained_cfg = {  # what timm's tools ask of a model; its weights' normalisation is known with the weights
        "architecture": full_name,
        "num_classes": model.num_classes,
        "classifier": "fc",
        "first_conv": next(name for name, module in model.named_modules() if type(module).__name__ == "Conv2d"),
        **({"input_size": (request.in_channels, size, size)} if size else {}),
    }
    return Built(model)


def _build_timm(request: Request) -> Built:
    import timm

    full_name = f"timm/{request.name}"
    kwargs: dict[str, Any] = {"in_chans": request.in_channels}
    if request.num_classes is not None:
        kwargs["num_classes"] = request.num_classes
    with _build_errors(full_name):
        if not request.name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            config: Any = timm.get_pretrained_cfg(request.name)
            fixed = config is not None and config.fixed_input_size
            if fixed and request.image_size not in (None, config.input_size[-1]):
                kwargs["img_size"] = request.image_size
        model: Any = timm.create_model(request.name, pretrained=request.pretrained, **{**kwargs, **request.kwargs})
    own_head = request.num_classes in (None, model.pretrained_cfg.get("num_classes"))
    return Built(model, own_head, kwargs.get("img_size"))


def _build_torchvision(request: Request) -> Built:
    import torchvision

    full_name = f"torchvision/{request.name}"
    kwargs = dict(request.kwargs)
    weights = _torchvision_weights(request)
    kwargs.pop("weights", None)
    inception = request.name in ("googlenet", "inception_v3")
    if inception and weights is None:
        kwargs.setdefault("init_weights", True)  # what its default does, without the warning
    if weights is None and request.num_classes is not None:
        kwargs.setdefault("num_classes", request.num_classes)
    sized = request.name.startswith("vit_") or request.name == "maxvit_t"
    if sized and request.image_size is not None:
        native = weights.transforms().crop_size[0] if weights is not None else None
        if native not in (None, request.image_size):
            raise InputError(
                f"{full_name} with pretrained weights needs image_size {native}, got {request.image_size}; "
                "timm's vision transformers adapt theirs"
            )
        if request.name == "maxvit_t":
            kwargs.setdefault("input_size", (request.image_size, request.image_size))
        else:
            kwargs.setdefault("image_size", request.image_size)
    with _build_errors(full_name):
        model = torchvision.models.get_model(request.name, weights=weights, **kwargs)
    if inception:
        _drop_auxiliary_heads(model)
    own_head = weights is not None and request.num_classes in (None, len(weights.meta["categories"]))
    if weights is not None and not own_head:
        _replace_head(model, request.num_classes)
    if request.in_channels != 3:
        if getattr(model, "transform_input", False):
            raise InputError(
                f"{full_name} with pretrained weights reads 3 channels, got in_channels {request.in_channels}"
            )
        _replace_input(model, request.in_channels, keep=weights is not None)
    return Built(model, own_head)


def _drop_auxiliary_heads(model: Any) -> None:
    """Make forward give logits in training too, where it would give a tuple."""
    model.aux_logits = False
    for name in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, name):
            setattr(model, name, None)


def _torchvision_weights(request: Request) -> Any:
    import torchvision

    known = torchvision.models.get_model_weights(request.name)
    name = request.kwargs.get("weights")
    if name is None:
        return known.DEFAULT if request.pretrained else None
    if name not in known.__members__:
        choices = ", ".join(known.__members__)
        raise InputError(f'torchvision/{request.name} has no weights "{name}"; it has {choices}')
    if not request.pretrained:
        raise InputError(f'torchvision/{request.name}: weights "{name}" need pretrained to be true')
    return known[name]


def _replace_head(model: "nn.Module", num_classes: int | None) -> None:
    from torch import nn

    name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert num_classes is not None
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
    else:  # SqueezeNet classifies by a 1x1 convolution
        new = nn.Conv2d(head.in_channels, num_classes, kernel_size=1)
    model.set_submodule(name, new)


def _replace_input(model: "nn.Module", in_channels: int, *, keep: bool) -> None:
    """Swap the first convolution for one with `in_channels`; `keep` carries the weights over.

    For grey images the three colours' weights are added up, so that a grey picture gives what its coloured copy gave;
    otherwise they are repeated and rescaled to keep the size of the sum.
    """
    import torch
    from torch import nn

    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation, bias=conv.bias is not None,  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        if keep:
            old = conv.weight
            if in_channels == 1:
                new.weight.copy_(old.sum(dim=1, keepdim=True))
            else:
                repeats = -(-in_channels // old.shape[1])
                new.weight.copy_(old.repeat(1, repeats, 1, 1)[:, :in_channels] * (old.shape[1] / in_channels))
            if conv.bias is not None and new.bias is not None:
                new.bias.copy_(conv.bias)
        else:  # keep the initialisation that the network's author chose, at its own scale
            new.weight.normal_(std=float(conv.weight.std()) * (conv.in_channels / in_channels) ** 0.5)
    model.set_submodule(name, new)


def _build_hf(request: Request) -> Built:
    transformers = transformers_package(request.name)
    full_name, place = f"hf/{request.name}", place_of_hub(request.name)
    with _build_errors(full_name):
        config = transformers.AutoConfig.from_pretrained(place)
    unknown = [key for key in request.kwargs if not hasattr(config, key)]
    if unknown:  # transformers would take it and do nothing with it
        raise InputError(f'model "{full_name}" has no option "{unknown[0]}"{nearest(unknown[0], vars(config))}')
    kwargs: dict[str, Any] = {} if request.num_classes is None else {"num_labels": request.num_classes}
    own_head = request.num_classes in (None, len(config.id2label))
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    resized = request.image_size is not None and isinstance(size, int) and size != request.image_size
    auto = transformers.AutoModelForImageClassification
    if request.pretrained:
        if request.in_channels != channels:  # transformers would start the first layer afresh
            raise InputError(
                f"{full_name} with pretrained weights reads {channels} channels, got in_channels {request.in_channels}"
            )
        with _build_errors(full_name):
            model = auto.from_pretrained(place, ignore_mismatched_sizes=True, **{**kwargs, **request.kwargs})
        if not {"dtype", "torch_dtype"} & request.kwargs.keys():
            model = model.float()  # a file in half precision is read as such, and is too coarse to be trained
        if resized and not _takes(model, channels, request.image_size):
            needs = f"needs image_size {size}, got {request.image_size}"
            raise InputError(f"{full_name} with pretrained weights {needs}")
        return Built(logits_only(model), own_head)
    if request.in_channels != channels:
        kwargs["num_channels"] = request.in_channels
    if resized:
        kwargs["image_size"] = request.image_size
    with _build_errors(full_name):
        config = transformers.AutoConfig.from_pretrained(place, **{**kwargs, **request.kwargs})
        return Built(logits_only(auto.from_config(config)), own_head)


def place_of_hub(name: str) -> str:
    """What transformers is told: a name of the hub as it stands, of a folder its path with ~ followed."""
    return str(home_followed(name))


def _takes(model: Any, channels: int, image_size: int | None) -> bool:
    """Whether a pretrained model takes another size than its own: many do, and none of them says so."""
    import torch

    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, image_size or 0, image_size or 0))
    except (RuntimeError, ValueError):
        return False
    return True


def transformers_package(name: str) -> ModuleType:
    need("transformers", what=f'model "hf/{name}"')
    return importlib.import_module("transformers")


def logits_only(model: "nn.Module") -> "nn.Module":
    """A Hugging Face classifier as a module whose forward gives the logits alone."""
    from torch import nn

    class LogitsOnly(nn.Module):
        """A Hugging Face classifier whose forward gives the logits alone."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: "Tensor") -> "Tensor":
            logits: Tensor = self.model(images).logits
            return logits

    return LogitsOnly(model)


def user_object(name: str) -> Any:
    """What `path/to/file.py:function` names, after its file was executed.

    Raises:
        InputError: there is no such file, or nothing callable of this name in it.
        PcdistillError: the file fails.
    """
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(f'model "{name}" must be written path/to/file.py:function')
    with user_code(path):
        namespace = _execute(home_followed(path))
    found = getattr(namespace, attribute, None)
    if not callable(found):
        public = [n for n, value in vars(namespace).items() if callable(value) and not n.startswith("_")]
        raise InputError(f'{path} has no function or class "{attribute}"{nearest(attribute, public)}')
    return found


def _build_user(request: Request) -> Built:
    from torch import nn

    path = request.name.rpartition(":")[0]
    if request.pretrained and path.endswith(".py"):
        raise InputError(
            f'model "{request.name}" is your own: it has no pretrained weights; give a weights file instead'
        )
    make = user_object(request.name)
    offered = {k: getattr(request, k) for k in ("num_classes", "in_channels", "image_size")}
    kwargs = {k: v for k, v in offered.items() if v is not None and k in _parameters(make)}
    with user_code(path):
        model = make(**{**kwargs, **request.kwargs})
    if not isinstance(model, nn.Module):
        raise InputError(f"{request.name} must return a torch.nn.Module, got {type(model).__name__}")
    return Built(model)


def _parameters(make: Callable[..., Any]) -> Iterable[str]:
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return ("num_classes", *parameters) if takes_any else parameters


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    name = f"pcdistill_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def user_code(path: str) -> Iterator[None]:
    """Let a user's file import its neighbours, as a script may, and name the line where it fails."""
    folder = str(home_followed(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except PcdistillError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == Path(path).name]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise PcdistillError(f"{path}{line}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)


BUILDERS: dict[str, Callable[[Request], Built]] = {
    "cifar": _build_cifar,
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "hf": _build_hf,
    "file": _build_user,
}
