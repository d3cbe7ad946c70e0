"""The losses, usable in anybody's training loop: ``from pcdistill.losses import pcd_loss``.

METHODS is the registry: a plain dict from a recipe's method name to where the class is. Nothing is imported until it
is asked for, so that listing the methods needs no torch.
"""

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pcdistill.losses.ce import CELoss as CELoss
    from pcdistill.losses.ce import ce_loss as ce_loss
    from pcdistill.losses.kd import KDLoss as KDLoss
    from pcdistill.losses.kd import kd_loss as kd_loss
    from pcdistill.losses.lskd import StandardizedLoss as StandardizedLoss
    from pcdistill.losses.lskd import standardize_logits as standardize_logits
    from pcdistill.losses.pcd import PCDLoss as PCDLoss
    from pcdistill.losses.pcd import pcd_loss as pcd_loss
    from pcdistill.losses.pcd_released import PCDReleasedLoss as PCDReleasedLoss
    from pcdistill.losses.pcd_released import pcd_released_loss as pcd_released_loss


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        path: "module:Class" of the loss; importing it imports torch.
        kind: what the loss compares.
        source: the paper.
        summary: one line for `pcdistill list`.
        terms: the whole objective that the method's name stands for in `--method NAME`: recipe terms.
    """

    path: str
    kind: Literal["logits", "features", "detection"]
    source: str
    summary: str
    terms: tuple[dict[str, Any], ...] = field(default=())

    def load(self) -> type:
        """The class; imports its module."""
        module, name = self.path.split(":")
        loaded: type = getattr(importlib.import_module(module), name)
        return loaded


CE = {"method": "ce", "weight": 1.0}

METHODS: dict[str, Method] = {
    "ce": Method(
        "pcdistill.losses.ce:CELoss", "logits", "standard", "cross-entropy with the labels", ({"method": "ce"},)
    ),
    "kd": Method(
        "pcdistill.losses.kd:KDLoss",
        "logits",
        "arXiv 1503.02531",
        "softened class probabilities (Hinton)",
        ({"method": "ce", "weight": 0.1}, {"method": "kd", "weight": 0.9, "temperature": 4.0}),
    ),
    "lskd": Method(
        "pcdistill.losses.lskd:LSKDLoss",
        "logits",
        "arXiv 2403.01427",
        "KD on standardised logits; any other term takes `standardize: true`",
        ({"method": "ce", "weight": 0.1}, {"method": "lskd", "weight": 9.0, "temperature": 2.0}),
    ),
    "pcd": Method(
        "pcdistill.losses.pcd:PCDLoss",
        "logits",
        "arXiv 2505.24310",
        "progressive class-level distillation, as the paper defines it",
        (CE, {"method": "pcd", "weight": 1.0}),
    ),
    "pcd-released": Method(
        "pcdistill.losses.pcd_released:PCDReleasedLoss",
        "logits",
        "arXiv 2505.24310, authors' code",
        "what the released code of PCD computes, for comparison",
        (CE, {"method": "pcd-released", "weight": 1.0, "warmup_epochs": 20}),
    ),
}

_EXPORTS = {
    "ce_loss": "ce",
    "CELoss": "ce",
    "kd_loss": "kd",
    "KDLoss": "kd",
    "standardize_logits": "lskd",
    "StandardizedLoss": "lskd",
    "LSKDLoss": "lskd",
    "pcd_loss": "pcd",
    "PCDLoss": "pcd",
    "pcd_released_loss": "pcd_released",
    "PCDReleasedLoss": "pcd_released",
}

__all__ = ["METHODS", "Method", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"pcdistill.losses.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'pcdistill.losses' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
