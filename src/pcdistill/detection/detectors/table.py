"""The families of detectors: what builds one, and what adapts it to a distiller."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torchvision.models import detection as zoo

from pcdistill.detection.detectors.base import Adapter
from pcdistill.detection.detectors.dense import Dense
from pcdistill.detection.detectors.two_stage import TwoStage
from pcdistill.errors import InputError


class Family(NamedTuple):
    """One family.

    Attributes:
        detector: the class of its models, which also builds them.
        adapter: the class of its adapters.
    """

    detector: type[nn.Module]
    adapter: Callable[[Any], Adapter]


FAMILIES: dict[str, Family] = {
    "fasterrcnn": Family(zoo.FasterRCNN, TwoStage),
    "retinanet": Family(zoo.RetinaNet, Dense),
    "fcos": Family(zoo.FCOS, Dense),
}


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter for a detector.

    Raises:
        InputError: it is of no family of the table, or predicts masks or keypoints too.
    """
    heads: Any = getattr(model, "roi_heads", None)
    if heads is not None and (heads.has_mask() or heads.has_keypoint()):
        raise InputError(f"{type(model).__name__} predicts more than boxes; only detectors of boxes can be distilled")
    for family in FAMILIES.values():
        if isinstance(model, family.detector):
            return family.adapter(model)
    raise InputError(
        f"{type(model).__name__} is not a detector that can be distilled; it must be torchvision's FasterRCNN, "
        "RetinaNet or FCOS"
    )
