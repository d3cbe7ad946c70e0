"""Detectors of transformers by name: weights of the hub or of a folder, or a configuration with random weights."""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pcdistill.detection.detectors.set_prediction import HubDetector, side_of
from pcdistill.errors import InputError, first_line, nearest
from pcdistill.extras import need
from pcdistill.models.zoos import place_of_hub

OWN_OPTIONS = ("min_size", "max_size", "square", "image_mean", "image_std", "detections_per_img")


def build_hub_detector(
    name: str, *, num_classes: int | None, image_size: int | None, pretrained: bool, options: Mapping[str, Any]
) -> HubDetector:
    """A detector of transformers.

    Args:
        name: a name of the hub, a folder, or a kind of model such as rt_detr.
        num_classes: K; None: those of the weights.
        image_size: side of the images; None: that of the weights, else the kind's own, 640 or 800.
        pretrained: load the weights that a name or a folder has; a kind has none.
        options: of :class:`HubDetector`, and keys of the model's configuration.

    Raises:
        InputError: transformers is missing or too old, there is no such model, the hub is out of reach, an option is
            unknown.
    """
    transformers, name = transformers_package(), place_of_hub(name)
    if pretrained and is_kind(name):
        raise InputError(
            f"hf/{name} is a kind of model and has no weights; name a model of the hub or a folder, or set pretrained "
            "to false"
        )
    own = {key: value for key, value in options.items() if key in OWN_OPTIONS}
    asked = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    labels = {} if num_classes is None else {"num_labels": num_classes}
    with _hub_errors(name):
        config = _config(name, {**labels, **asked}, pretrained)
        if type(config) not in transformers.AutoModelForObjectDetection._model_mapping:
            raise InputError(f"hf/{name} is a {config.model_type}, which is no detector of boxes")
        if pretrained:
            inner = transformers.AutoModelForObjectDetection.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True
            ).float()  # a file in half precision is read as such, and is too coarse to be trained
        else:
            inner = transformers.AutoModelForObjectDetection.from_config(config)
    facts = {} if is_kind(name) else _processor_facts(name)
    if image_size is not None:
        facts["min_size"] = image_size
    facts.setdefault("min_size", side_of(inner))
    return HubDetector(inner, **{**facts, **own})


def hub_classes(name: str) -> tuple[str, ...]:
    """Names of the classes 1..K of a model's weights; those that are not used are called "N/A <number>"."""
    transformers, name = transformers_package(), place_of_hub(name)
    with _hub_errors(name):
        labels = transformers.AutoConfig.from_pretrained(name).id2label
    names = [str(labels[i]) for i in sorted(labels)]
    return tuple(f"{label} {i + 1}" if names.count(label) > 1 else label for i, label in enumerate(names))


def is_kind(name: str) -> bool:
    """Whether a name is that of a kind of detector, which has a configuration but no weights."""
    return name in hub_kinds() and not Path(name).exists()


@cache
def hub_kinds() -> tuple[str, ...]:
    """The kinds of detectors that the installed transformers knows; none without it."""
    if importlib.util.find_spec("transformers") is None:
        return ()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return tuple(auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)


def transformers_package() -> ModuleType:
    need("transformers", what="an hf/ detector")
    return importlib.import_module("transformers")


def _config(name: str, asked: dict[str, Any], pretrained: bool) -> Any:
    """The model's configuration with the keys that were asked for."""
    transformers = transformers_package()
    if is_kind(name):
        config_class = transformers.CONFIG_MAPPING[name]
        known = config_class()
    else:
        known = transformers.AutoConfig.from_pretrained(name)
    for key in asked:
        if not hasattr(known, key) and key != "num_labels":
            raise InputError(f'hf/{name} has no option "{key}"{nearest(key, vars(known))}')
    if not pretrained and hasattr(known, "freeze_backbone_batch_norms"):
        asked = {"freeze_backbone_batch_norms": False, **asked}  # statistics of random weights are none to keep
    if is_kind(name):
        return config_class(**asked)
    return transformers.AutoConfig.from_pretrained(name, **asked)


def _processor_facts(name: str) -> dict[str, Any]:
    """Size and normalisation that a model's weights were trained with, where they say."""
    transformers = transformers_package()
    try:
        found, _ = transformers.image_processing_utils.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, AttributeError):
        return {}
    facts: dict[str, Any] = {}
    size = found.get("size") or {}
    if "shortest_edge" in size:
        facts.update(min_size=size["shortest_edge"], max_size=size.get("longest_edge"), square=False)
    elif "height" in size:
        facts.update(min_size=size["height"], square=True)
    if found.get("do_normalize") is False:
        facts.update(image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    elif found.get("image_mean") is not None:
        facts.update(image_mean=tuple(found["image_mean"]), image_std=tuple(found["image_std"]))
    return facts


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What transformers raises, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"hf/{name} is neither a folder nor a model that the hub gave; without a network, download it elsewhere "
            f"and name its folder, or name a kind of model: {first_line(error)}"
        ) from error
    except Exception as error:  # of any kind: each configuration has checks of its own
        raise InputError(f"hf/{name} cannot be built: {' '.join(str(error).split())}") from error
