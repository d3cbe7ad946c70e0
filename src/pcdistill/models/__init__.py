"""Models by name, their weights, and what the weights know of themselves: classes, normalisation, resolution.

Importing this package is cheap: torch and the model libraries are imported by the functions that need them.
"""

from pcdistill.models.build import build_model
from pcdistill.models.facts import class_names, input_stats, model_info
from pcdistill.models.names import list_models, resolve_name
from pcdistill.models.own_config import adopt_config, read_transformers, save_config, save_pretrained
from pcdistill.models.weights import (
    WeightReport,
    load_weights,
    read_classes,
    read_metadata,
    read_stats,
    run_weights,
    save_weights,
)

__all__ = [
    "WeightReport",
    "adopt_config",
    "build_model",
    "class_names",
    "input_stats",
    "list_models",
    "load_weights",
    "model_info",
    "read_classes",
    "read_metadata",
    "read_stats",
    "read_transformers",
    "resolve_name",
    "run_weights",
    "save_config",
    "save_pretrained",
    "save_weights",
]
