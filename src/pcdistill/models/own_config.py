"""What others read beside a student's weights: timm's pretrained_cfg and config.json, transformers' config.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdistill.models.weights import save_weights
from pcdistill.models.zoos import Origin, logits_only, transformers_package

if TYPE_CHECKING:
    from torch import nn


def own_config(model: "nn.Module", metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """A classifier's own `pretrained_cfg`, in timm's words.

    Args:
        model: a model whose `pretrained_cfg` says what the zoo's weights were made for.
        metadata: what stands beside its weights: `classes`, `mean`, `std`, `image_size`, `short_side`.

    Returns:
        The keys of its zoo that stay true, with the student's own pre-processing; None where the metadata do not tell.
    """
    zoo: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(zoo, Mapping) or not {"classes", "mean", "std", "image_size"} <= set(metadata):
        return None
    size, mean = int(metadata["image_size"]), list(metadata["mean"])
    kept = ("architecture", "classifier", "first_conv", "pool_size", "license", "fixed_input_size")
    short = metadata.get("short_side")
    return {
        **{key: zoo[key] for key in kept if key in zoo},
        "url": "",
        "num_classes": len(metadata["classes"]),
        "input_size": (len(mean), size, size),
        "mean": tuple(mean),
        "std": tuple(metadata["std"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if short is None else _crop_share(size, short),
        "crop_mode": "squash" if short is None else "center",
        "label_names": list(metadata["classes"]),
    }


def _crop_share(size: int, short: int) -> float:
    """The share that makes timm scale the short side to `short`: it takes the floor of size over share."""
    share = size / short
    return share if math.floor(size / share) == short else size / (short + 0.5)


def adopt_config(model: "nn.Module", metadata: Mapping[str, Any]) -> None:
    """Put a student's own `pretrained_cfg` in the place of its zoo's; nothing for a model that has none."""
    config = own_config(model, metadata)
    if config is not None:
        model.pretrained_cfg = config  # type: ignore[assignment]  # a plain attribute
        if hasattr(model, "default_cfg"):
            model.default_cfg = config  # type: ignore[assignment]


def save_config(model: "nn.Module", folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write what timm or transformers need beside the weights to load a student from its folder.

    For a model of timm config.json; for one of transformers also its weights, which have other names there, and
    preprocessor_config.json. For any other, and for one with another model's head, nothing.
    """
    origin: Origin | None = getattr(model, "_pcdistill_origin", None)
    if origin is None or "head" in metadata or not metadata.get("classes"):
        return
    adopt_config(model, metadata)
    zoo = origin.name.partition("/")[0]
    if zoo == "timm":
        config = own_config(model, metadata)
        if config is not None:
            (folder / "config.json").write_text(_timm_json(model, config, origin), encoding="utf-8")
    elif zoo == "hf":
        _save_transformers(model, folder, metadata)


def _timm_json(model: Any, config: dict[str, Any], origin: Origin) -> str:
    """config.json as timm's `local-dir:` and `hf-hub:` read it."""
    inner = {key: value for key, value in config.items() if key not in ("architecture", "label_names", "url")}
    arguments = {**origin.request.kwargs, **({"img_size": origin.image_size} if origin.image_size else {})}
    tree = {
        "architecture": config["architecture"],
        "num_classes": config["num_classes"],
        "num_features": model.num_features,
        "label_names": config["label_names"],
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": inner,
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _save_transformers(model: Any, folder: Path, metadata: Mapping[str, Any]) -> None:
    inner = model.model
    inner.config.id2label = dict(enumerate(metadata["classes"]))
    inner.config.label2id = {name: i for i, name in enumerate(metadata["classes"])}
    inner.save_pretrained(folder, state_dict={key: value.contiguous() for key, value in inner.state_dict().items()})
    size, short = metadata.get("image_size"), metadata.get("short_side")
    if size is None or len(metadata["mean"]) != 3:
        return
    square = {"height": size, "width": size}
    transformers_package("").CLIPImageProcessor(
        size={"shortest_edge": short} if short else square,
        do_center_crop=short is not None,
        crop_size=square,
        resample=2,  # bilinear
        image_mean=list(metadata["mean"]),
        image_std=list(metadata["std"]),
    ).save_pretrained(folder)


def save_pretrained(model: "nn.Module", folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write a student of timm or transformers as a folder that these load: weights, config, pre-processing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(model, folder, metadata)
    if not (folder / "model.safetensors").exists():  # transformers' names are written already
        save_weights(model, folder / "model.safetensors", metadata)


def read_transformers(folder: Path) -> "nn.Module":
    """A classifier out of a folder, by transformers' AutoModelForImageClassification; its forward gives the logits."""
    auto = transformers_package("").AutoModelForImageClassification
    return logits_only(auto.from_pretrained(folder)).eval()
