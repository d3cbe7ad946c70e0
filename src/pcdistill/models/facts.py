"""What is known of a model: its size, and the classes, normalisation and resolution of its weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pcdistill.errors import InputError, what_failed
from pcdistill.models.fetching import within_reach
from pcdistill.models.zoos import Origin, place_of_hub, transformers_package

if TYPE_CHECKING:
    from torch import nn


def model_info(model: "nn.Module", image_size: int, *, in_channels: int = 3) -> dict[str, int]:
    """Parameters, and multiply-accumulate operations for one image of `image_size` pixels square, in eval mode.

    Counted by torch: convolutions and matrix products, attention's included; the model is left as it was.

    Raises:
        InputError: the model cannot be run on such an image.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = getattr(model, "_orig_mod", model)
    modes = {module: module.training for module in model.modules()}
    reference = next(model.parameters())
    dtype = torch.bfloat16 if reference.dtype.itemsize == 1 else reference.dtype  # float8 is only stored
    images = torch.zeros(1, in_channels, image_size, image_size, device=reference.device, dtype=dtype)
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # neither it nor every fused attention is counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(images)
    except Exception as error:  # a user's model may raise anything, and a zoo's at sizes that it is not made for
        raise InputError(
            f"{type(model).__name__} cannot be run on an image {list(images.shape)} ({what_failed(error)}); "
            "take a model for images of this size, or another data.image_size"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": int(counter.get_total_flops()) // 2}


def input_stats(
    model: "nn.Module", name: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...], int | None] | None:
    """Mean and standard deviation per channel (of images in [0, 1]) and image size that the model's weights expect.

    They come from the metadata of loaded weights, or from the library whose pretrained weights are in use. None if
    nobody knows: then the data's own are right for weights trained on it. `name` is needed only for a pretrained
    torchvision or Hugging Face model that :func:`build_model` did not build.
    """
    metadata = getattr(model, "_pcdistill_metadata", None)
    if metadata is not None:
        if not {"mean", "std"} <= set(metadata):
            return None
        return tuple(metadata["mean"]), tuple(metadata["std"]), metadata.get("image_size")
    origin: Origin | None = getattr(model, "_pcdistill_origin", None)
    if origin is not None and not origin.request.pretrained:
        return None
    name = origin.name if origin is not None else name or ""
    mean: Sequence[float]
    std: Sequence[float]
    config = _timm_config(model, name)
    if config is not None:
        mean, std, size = config["mean"], config["std"], config["input_size"][-1]
    elif name.startswith("torchvision/"):
        preset = _torchvision_weights(name, origin).transforms()
        mean, std, size = preset.mean, preset.std, preset.crop_size[0]
    elif name.startswith("hf/"):
        with within_reach():
            processor = transformers_package(name[3:]).AutoImageProcessor.from_pretrained(place_of_hub(name[3:]))
        sizes = dict(getattr(processor, "crop_size", None) or processor.size)
        mean, std, size = processor.image_mean, processor.image_std, sizes.get("height") or sizes.get("shortest_edge")
    else:
        return None
    if origin is not None:
        size = origin.image_size or size
        mean, std = (_for_channels(values, origin.request.in_channels) for values in (mean, std))
    return tuple(mean), tuple(std), size


def _for_channels(values: Sequence[float], channels: int) -> Sequence[float]:
    """Statistics for as many channels as the adapted first layer has."""
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[i % len(values)] for i in range(channels)]


def class_names(model: "nn.Module | None", name: str | None = None, *, wnids: bool = False) -> list[str] | None:
    """Names of the outputs in order, from the metadata of loaded weights or the library; None if nobody knows.

    Args:
        model: a model whose head was replaced, or that has no weights of known classes, has no names. None asks for
            the pretrained weights called `name`.
        name: the full name of a pretrained model that :func:`build_model` did not build.
        wnids: give ImageNet's classes as WordNet ids ("n01440764"), as its folders are called, instead of in English.
    """
    metadata = getattr(model, "_pcdistill_metadata", None)
    if metadata is not None:
        return [str(c) for c in metadata["classes"]] if metadata.get("classes") else None
    origin: Origin | None = getattr(model, "_pcdistill_origin", None)
    if origin is not None and not (origin.own_head and origin.request.pretrained):
        return None
    name = origin.name if origin is not None else name or ""
    names: list[str] | None = None
    config = _timm_config(model, name)
    if config is not None:
        names = _timm_classes(config)
    elif name.startswith("torchvision/"):
        names = list(_torchvision_weights(name, origin).meta["categories"])
    elif name.startswith("hf/"):
        with within_reach():
            labels = transformers_package(name[3:]).AutoConfig.from_pretrained(place_of_hub(name[3:])).id2label
        names = [str(labels[i]) for i in range(len(labels))]
    if names is not None and model is not None and origin is None and _outputs(model) not in (None, len(names)):
        return None
    return _imagenet_wnids() if wnids and names == _imagenet_names() else names


def _outputs(model: "nn.Module") -> int | None:
    """The number of outputs as the last linear layer tells it."""
    from torch import nn

    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    return widths[-1] if widths else None


def _torchvision_weights(name: str, origin: Origin | None) -> Any:
    import torchvision

    known = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
    chosen = origin.request.kwargs.get("weights") if origin is not None else None
    return known[chosen] if chosen else known.DEFAULT


def _timm_config(model: "nn.Module | None", name: str) -> dict[str, Any] | None:
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None and name.startswith("timm/"):
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        config = config and config.to_dict()
    return config if isinstance(config, dict) and "mean" in config else None


def _timm_classes(config: dict[str, Any]) -> list[str] | None:
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    if config.get("label_names"):
        return list(config["label_names"])
    if config.get("num_classes") == 1000:
        return _imagenet_names()  # torchvision's English, so that models of both zoos agree
    subset = infer_imagenet_subset(config)
    return list(ImageNetInfo(subset).label_descriptions()) if subset else None


def _imagenet_names() -> list[str]:
    import torchvision

    return list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


def _imagenet_wnids() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    names: Any = ImageNetInfo("imagenet-1k")
    return list(names.label_names())
