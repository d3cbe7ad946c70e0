"""Distillation of detectors. The names below are for a user's own adapter, and are loaded when they are used."""

import importlib
from typing import Any

_EXPORTS = {
    "Adapter": "pcdistill.detection.detectors.base",
    "Candidates": "pcdistill.detection.detectors.base",
    "HubDetector": "pcdistill.detection.detectors.set_prediction",
    "Observed": "pcdistill.detection.detectors.base",
    "PreparedBatch": "pcdistill.detection.detectors.base",
    "Regions": "pcdistill.detection.detectors.base",
    "StudentPass": "pcdistill.detection.detectors.base",
    "adapter_of": "pcdistill.detection.detectors.table",
    "build_detector": "pcdistill.detection.detectors.build",
    "register_adapter": "pcdistill.detection.detectors.table",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'pcdistill.detection' has no attribute {name!r}")
