"""The families of detectors and their adapters; a user's own are registered here."""

from typing import Any, NamedTuple

from torch import nn
from torchvision.models import detection as zoo

from pcdistill.detection.detectors.base import Adapter
from pcdistill.detection.detectors.dense import SSD, Dense
from pcdistill.detection.detectors.set_prediction import SetPrediction
from pcdistill.detection.detectors.two_stage import TwoStage
from pcdistill.distillation.objective import import_user_object
from pcdistill.errors import InputError


class Family(NamedTuple):
    """One family that can be built as FAMILY/BACKBONE.

    Attributes:
        detector: the class of its models, which also builds them.
    """

    detector: type[nn.Module]


FAMILIES: dict[str, Family] = {
    "fasterrcnn": Family(zoo.FasterRCNN),
    "retinanet": Family(zoo.RetinaNet),
    "fcos": Family(zoo.FCOS),
    "ssd": Family(zoo.ssd.SSD),
}
ADAPTERS: list[type[Adapter]] = [TwoStage, Dense, SSD, SetPrediction]  # those that are registered stand before them


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Make an adapter known; for the models that it fits, it goes before all that were known. Works as a decorator.

    Raises:
        InputError: it is no class that derives from Adapter, or lacks one of its methods.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise InputError(
            f"an adapter must be a class that derives from Adapter, got {getattr(adapter, '__name__', adapter)}"
        )
    missing = sorted(getattr(adapter, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"the adapter {adapter.__name__} lacks {', '.join(missing)}")
    if adapter not in ADAPTERS:
        ADAPTERS.insert(0, adapter)
    return adapter


def register_user_adapters(names: tuple[str, ...]) -> None:
    """Register adapters that a recipe names as `path/to/file.py:Adapter`."""
    for i, name in enumerate(names):
        found: Any = import_user_object(name, f"detection.adapters.{i}")
        register_adapter(found)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter for a detector.

    Raises:
        InputError: none fits it, or it predicts masks or keypoints too.
    """
    for adapter in ADAPTERS:
        if adapter.fits(model):
            heads: Any = getattr(model, "roi_heads", None)
            if adapter is TwoStage and (heads.has_mask() or heads.has_keypoint()):
                raise InputError(
                    f"{type(model).__name__} predicts more than boxes; only detectors of boxes can be distilled"
                )
            return adapter(model)
    raise InputError(
        f"{type(model).__name__} is not a detector that can be distilled; it must be torchvision's FasterRCNN, "
        "RetinaNet, FCOS or SSD, one of transformers for object detection, or one with an adapter of your own "
        "(detection.adapters)"
    )
