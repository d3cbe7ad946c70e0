"""Students that do not end in their own classifier: what their weights file says, and the way back to a model."""

from os import PathLike
from typing import Any

from torch import nn

from pcdistill.errors import InputError
from pcdistill.losses.simkd import SimKDHead
from pcdistill.models.feature_maps import Headed
from pcdistill.models.weights import read_metadata


def head_metadata(student: nn.Module) -> dict[str, Any]:
    """What stands beside the weights of a student with a new head, so that it can be built again; {} for others."""
    if not isinstance(student, Headed):
        return {}
    head = student.head
    assert isinstance(head, SimKDHead)
    return {"head": {"method": "simkd", "stage": student.name, **head.config()}}


def with_head(model: nn.Module, weights: str | PathLike[str] | None) -> nn.Module:
    """The model as its weights file says: with the head that it was trained with, where that is not the model's own.

    Args:
        model: as its constructor gives it.
        weights: the file whose metadata are read; nothing is loaded from it. None leaves the model as it is.

    Raises:
        InputError: the file describes a head that cannot be built, or one for another model.
    """
    if weights is None:
        return model
    found = read_metadata(weights).get("head")
    if not isinstance(found, dict) or found.get("method") != "simkd":
        return model
    config = {key: value for key, value in found.items() if key not in ("method", "stage")}
    try:
        return Headed(model, found["stage"], SimKDHead(**config))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{weights} describes a head that does not fit: {error}") from error
