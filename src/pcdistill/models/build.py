"""A model from its name, with its classes, channels and weights."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pcdistill.errors import InputError
from pcdistill.models.fetching import within_reach
from pcdistill.models.names import is_user_code, resolve_name
from pcdistill.models.own_config import adopt_config
from pcdistill.models.weights import PathLike, load_weights, read_classes, read_metadata
from pcdistill.models.zoos import BUILDERS, Origin, Request

if TYPE_CHECKING:
    from torch import nn


def build_model(
    name: str,
    *,
    num_classes: int | None,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    weights: PathLike | None = None,
    allow_mismatch: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> "nn.Module":
    """An image classifier whose forward maps images [N, in_channels, H, W] to logits [N, num_classes].

    Args:
        name: `timm/NAME`, `torchvision/NAME`, `cifar/NAME`, `hf/NAME` (hub or folder), `path/to/file.py:function`, or a
            NAME that exactly one zoo has. A user's function is called with those of num_classes, in_channels and
            image_size that it accepts.
        num_classes: C; None keeps as many as the weights' metadata name, or else the model has of its own.
        in_channels: channels of the images; a pretrained first layer is adapted to them.
        image_size: pixels, for models that are built for one resolution, such as ViTs.
        pretrained: start from the library's weights, downloaded if they are not cached.
        weights: a file for `load_weights`.
        allow_mismatch: as in `load_weights`.
        kwargs: further arguments of the model's own constructor; `weights: NAME` chooses among torchvision's.

    Raises:
        InputError: an unknown or ambiguous name, an argument that the model refuses, or weights that do not fit.
        PcdistillError: pretrained weights that cannot be fetched, or a user's file that fails.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if value is not None and value < 1:
            raise InputError(f"{argument} must be 1 or more, got {value}")
    if pretrained and weights is not None:
        raise InputError(f'model "{name}": "pretrained" and "weights" exclude each other; leave one out')
    if num_classes is None and weights is not None and (classes := read_classes(weights)):
        num_classes = len(classes)
    full_name = resolve_name(name)
    own = is_user_code(full_name) or full_name.endswith(".py")  # without a function, the builder says what is missing
    zoo, inner = ("file", full_name) if own else full_name.split("/", 1)
    request = Request(inner, num_classes, in_channels, image_size, pretrained, kwargs or {})
    fetches = pretrained or zoo == "hf" or inner.startswith(("hf-hub:", "hf_hub:"))
    with within_reach() if fetches and zoo in ("hf", "timm", "torchvision") else nullcontext():
        built = BUILDERS[zoo](request)
    origin = Origin(full_name, request, built.own_head, built.image_size)
    built.model._pcdistill_origin = origin  # type: ignore[assignment]  # a plain attribute: in no state dict
    if weights is None:
        return built.model
    from pcdistill.models.heads import with_head  # only here: it imports torch

    model = with_head(built.model, weights)
    model._pcdistill_origin = origin  # type: ignore[assignment]
    load_weights(model, weights, allow_mismatch=allow_mismatch)
    adopt_config(model, read_metadata(weights))
    return model
