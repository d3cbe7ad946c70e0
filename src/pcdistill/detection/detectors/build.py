"""torchvision's detectors by name, over backbones of torchvision and timm, and small ones for small images on a CPU."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection as zoo
from torchvision.models import mobilenet, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from pcdistill.detection.detectors.hub import build_hub_detector, hub_classes, hub_kinds, is_kind
from pcdistill.detection.detectors.table import FAMILIES
from pcdistill.errors import InputError, PcdistillError, first_line, nearest

WHOLE = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
)
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
GROUPS_OF_FCOS = 32  # of the group normalisation in torchvision's FCOS heads
OWN_OPTIONS = ("fpn_channels", "anchor_scale", "head_width", "pool_size", "trainable_layers", "norm")
# What torchvision's defaults for photographs would waste on images of 100 pixels.
SMALL_TWO_STAGE = {
    "rpn_pre_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_train": 150,
    "rpn_post_nms_top_n_test": 60,
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 48,
    "box_detections_per_img": 20,
}


def list_detectors() -> list[str]:
    """Names to choose from; FAMILY/timm/NAME takes any model of timm that gives a feature pyramid."""
    backbones = ("tiny", *RESNETS, *MOBILENETS, "timm/NAME")
    built = (f"{family}/{backbone}" for family in FAMILIES for backbone in backbones)
    return [*(f"torchvision/{name}" for name in WHOLE), *built, *(f"hf/{kind}" for kind in hub_kinds()), "hf/NAME"]


def build_detector(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | None = None,
    pretrained: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a detector in torchvision's interface: images and targets in, losses or predictions out.

    Args:
        name: "torchvision/NAME" for a whole detector, "hf/NAME" for one of transformers (see
            :mod:`pcdistill.detection.detectors.hub`), or FAMILY/BACKBONE with FAMILY out of fasterrcnn, retinanet, fcos
            and ssd. BACKBONE is a ResNet or MobileNet of torchvision, "timm/NAME", or "tiny" or "tinyW" with W the
            width of its first stage (16): a ResNet of seven convolutions for images of about 100 pixels.
        num_classes: K foreground classes, labels 1..K; None takes those of the pretrained weights.
        image_size: what the shorter side of the images is scaled to; None is the family's own, 800 pixels, and for tiny
            backbones 96.
        pretrained: COCO weights for a whole detector, ImageNet weights for a backbone. With another number of classes
            than COCO's, a whole detector keeps all but its last layer.
        kwargs: arguments of the torchvision class or, for FAMILY/BACKBONE, also fpn_channels (256; tiny: twice W, for
            fcos the next multiple of 32), anchor_scale (anchor side over stride), head_width (1024; tiny: 128) and
            pool_size (7; tiny: 5) of RoI heads, trainable_layers of a pretrained ResNet (3), norm ("batch", "frozen",
            or "auto": frozen if pretrained).

    Raises:
        InputError: unknown name or argument, with the nearest known one.
    """
    options = dict(kwargs or {})
    family, _, backbone = name.partition("/")
    if family == "hf" and backbone:
        return build_hub_detector(
            backbone, num_classes=num_classes, image_size=image_size, pretrained=pretrained, options=options
        )
    if family == "torchvision":
        return _whole(backbone, num_classes, image_size, pretrained, options)
    if family not in FAMILIES or not backbone:
        known = list_detectors()
        raise InputError(
            f'unknown detector "{name}"{nearest(name, known)}; it must be torchvision/NAME or FAMILY/BACKBONE with '
            f"FAMILY out of {', '.join(FAMILIES)}"
        )
    if num_classes is None:
        raise InputError(f"{name}: only torchvision/NAME detectors have classes of their own; give num_classes")
    known = [*_arguments(FAMILIES[family].detector), *OWN_OPTIONS, "min_size", "max_size"]
    _check_options(name, options, known)
    return _assembled(family, backbone, num_classes, image_size, pretrained, options)


def pretrained_classes(name: str) -> tuple[str, ...]:
    """Names of the foreground classes 1..K of a whole detector's weights; unused ids are called "N/A <id>"."""
    if name.startswith("hf/"):
        return hub_classes(name.removeprefix("hf/"))
    categories = coco_weights(name.removeprefix("torchvision/")).meta["categories"]
    return tuple(c if c != "N/A" else f"N/A {i}" for i, c in enumerate(categories) if i > 0)


def comes_whole(name: str) -> bool:
    """Whether a name's pretrained weights are of a whole detector, and so have classes of their own."""
    zoo, _, rest = name.partition("/")
    return zoo == "torchvision" or (zoo == "hf" and not is_kind(rest))


def _whole(
    name: str, num_classes: int | None, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    if name not in WHOLE:
        raise InputError(f'unknown detector "torchvision/{name}"{nearest(name, WHOLE)}; known: {", ".join(WHOLE)}')
    if num_classes is None and not pretrained:
        raise InputError(f"torchvision/{name}: num_classes must be given unless pretrained")
    builder = getattr(zoo, name)
    family = next(one.detector for key, one in FAMILIES.items() if name.startswith(key))
    known = [*_arguments(family), *_arguments(builder), "min_size", "max_size"]
    _check_options(f"torchvision/{name}", options, known)
    if family is FAMILIES["ssd"].detector:  # whose images have one size, whatever the data's
        options = {key: value for key, value in options.items() if key not in ("min_size", "max_size")}
    else:
        options = {**_sizes(image_size), **options}
    own = len(pretrained_classes(name)) if pretrained else num_classes
    classes = num_classes if num_classes is not None else own
    assert classes is not None
    model: nn.Module = builder(weights=None, weights_backbone=None, num_classes=classes + 1, **options)
    if pretrained:
        with _fetching(f"torchvision/{name}"):
            state = coco_weights(name).get_state_dict(check_hash=True)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        model.load_state_dict(
            {key: value for key, value in state.items() if value.shape == shapes.get(key, value.shape)},
            strict=classes == own,
        )
    return model


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """What the libraries raise when weights cannot be had, as one sentence."""
    try:
        yield
    except OSError as error:  # a URLError, and what the hub raises, are such
        raise PcdistillError(
            f"the pretrained weights of {name} could not be fetched: {first_line(error)}; without a network, bring "
            "them into the cache from elsewhere, give a weights file, or set pretrained to false"
        ) from error


def coco_weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT


def _assembled(
    family: str, name: str, num_classes: int, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    tiny = re.fullmatch(r"tiny(\d*)", name)
    anchor_scale = options.pop("anchor_scale", 8 if family == "fasterrcnn" and not tiny else 4)
    head_width = options.pop("head_width", 128 if tiny else 1024)
    pool_size = options.pop("pool_size", 5 if tiny else 7)
    backbone = _backbone(family, name, pretrained, options)
    strides = backbone.strides
    if family == "ssd":
        return _ssd(backbone, num_classes, image_size or (96 if tiny else 320), options)
    if tiny:
        image_size = image_size or 96
        options = {"min_size": image_size, "max_size": image_size, **options}
        if family == "fasterrcnn":
            options = {**SMALL_TWO_STAGE, **options}
    else:
        options = {**_sizes(image_size), **options}
    if family == "fasterrcnn":
        levels = [str(i) for i in range(len(strides) - 1)]
        pool = MultiScaleRoIAlign(
            levels, pool_size, 2, canonical_scale=28 * anchor_scale
        )  # 224 for anchors of 8 strides
        sizes = tuple((round(anchor_scale * stride),) for stride in strides)
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            "box_roi_pool": pool,
            "box_head": TwoMLPHead(backbone.out_channels * pool_size**2, head_width),
            "box_predictor": FastRCNNPredictor(head_width, num_classes + 1),
            **options,
        }
        return FAMILIES[family].detector(backbone, **options)
    if family == "retinanet":
        octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
        sizes = tuple(tuple(round(anchor_scale * stride * o) for o in octaves) for stride in strides)
        generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    else:  # a point of FCOS is an anchor of its level's stride
        generator = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    built: nn.Module = FAMILIES[family].detector(
        backbone, num_classes + 1, **{"anchor_generator": generator, **options}
    )
    return built


def _ssd(backbone: Any, num_classes: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    """An SSD over the pyramid: images are stretched to a square, boxes grow evenly from 15 % to 90 % of its side."""
    side = options.pop("min_size", image_size)
    options.pop("max_size", None)
    boxes = DefaultBoxGenerator([[2]] * len(backbone.strides), steps=list(backbone.strides))
    widths = [backbone.out_channels] * len(backbone.strides)
    head = SSDHead(widths, boxes.num_anchors_per_location(), num_classes + 1)
    known = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "head": head, **options}
    built: nn.Module = FAMILIES["ssd"].detector(backbone, boxes, (side, side), num_classes + 1, **known)
    return built


def _backbone(family: str, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """The feature pyramid, with `out_channels` and `strides`; takes its options out of `options`."""
    two_stage = family == "fasterrcnn"
    tiny = re.fullmatch(r"tiny(\d*)", name)
    trainable = options.pop("trainable_layers", 3)
    norm = options.pop("norm", "auto")
    if norm not in ("auto", "batch", "frozen"):
        raise InputError(f'norm must be "auto", "batch" or "frozen", got "{norm}"')
    frozen = norm == "frozen" or (norm == "auto" and pretrained)
    wanted = (4, 8, 16, 32) if two_stage else (8, 16, 32)
    body: nn.Module
    if tiny:
        width = int(tiny.group(1) or 16)
        if pretrained or width < 1:
            raise InputError(f"{family}/{name}: tiny backbones have a width of at least 1 and no pretrained weights")
        body, channels, strides = TinyBody(width, frozen=frozen), [width, 2 * width, 4 * width], [4, 8, 16]
    elif name.startswith("timm/"):
        body, channels, strides = _timm_body(name.removeprefix("timm/"), wanted, pretrained, frozen)
    elif name in RESNETS or name in MOBILENETS:
        return _torchvision_backbone(name, family, wanted, pretrained, frozen, trainable, options)
    else:
        known = ["tiny", *RESNETS, *MOBILENETS]
        raise InputError(
            f'unknown backbone "{name}"{nearest(name, known)}; known: {", ".join(known)}, timm/NAME for others'
        )
    groups = GROUPS_OF_FCOS if family == "fcos" else 1
    out = options.pop("fpn_channels", -(-channels[1] // groups) * groups if tiny else 256)
    _check_width(family, out)
    p6p7 = not two_stage and not tiny
    return PyramidBackbone(body, channels, strides, out, LastLevelP6P7(out, out) if p6p7 else LastLevelMaxPool())


def _torchvision_backbone(
    name: str,
    family: str,
    wanted: tuple[int, ...],
    pretrained: bool,
    frozen: bool,
    trainable: int,
    options: dict[str, Any],
) -> Any:
    from torchvision.models import get_model

    two_stage = family == "fasterrcnn"
    norm_layer = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    with _fetching(f"the backbone {name}"):
        net: Any = get_model(name, weights="DEFAULT" if pretrained else None, norm_layer=norm_layer)
    out = options.pop("fpn_channels", 256)
    _check_width(family, out)
    extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(out, out)
    if isinstance(net, resnet.ResNet):
        if pretrained:
            learning = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable]
            for key, parameter in net.named_parameters():
                parameter.requires_grad_(trainable >= 5 or key.split(".")[0] in learning)
        last = {4 * 2**i: f"layer{i + 1}" for i in range(4)}
        channels = {4 * 2**i: net.inplanes // 8 * 2**i for i in range(4)}
        body: nn.Module = net
    else:
        assert isinstance(net, mobilenet.MobileNetV2 | mobilenet.MobileNetV3)
        body = net.features
        last, channels = _last_of_stride(net.features)
    layers = {last[stride]: str(i) for i, stride in enumerate(wanted)}
    backbone: Any = BackboneWithFPN(body, layers, [channels[stride] for stride in wanted], out, extra_blocks=extra)
    backbone.strides = [*wanted, *_extra_strides(wanted[-1], extra)]
    return backbone


@torch.no_grad()
def _last_of_stride(layers: nn.Sequential) -> tuple[dict[int, str], dict[int, int]]:
    """Per stride the name and the width of the last layer that gives it, found with one small image."""
    names, widths = {}, {}
    training = layers.training
    layers.eval()
    x = torch.zeros(1, 3, 64, 64)
    for name, layer in layers.named_children():
        x = layer(x)
        stride = 64 // x.shape[-1]
        names[stride], widths[stride] = name, x.shape[1]
    layers.train(training)
    return names, widths


def _timm_body(
    name: str, wanted: tuple[int, ...], pretrained: bool, frozen: bool
) -> tuple[nn.Module, list[int], list[int]]:
    import timm
    from timm.layers.norm_act import freeze_batch_norm_2d

    if not timm.is_model(name):
        raise InputError(f'timm has no model "{name}"{nearest(name, timm.list_models())}')
    try:
        with _fetching(f"the backbone timm/{name}"):
            body: Any = timm.create_model(name, features_only=True, pretrained=pretrained)
        reductions, widths = body.feature_info.reduction(), body.feature_info.channels()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise InputError(f"timm/{name} gives no feature pyramid: {error}") from error
    at = {stride: i for i, stride in enumerate(reductions)}
    strides = [stride for stride in wanted if stride in at]
    if len(strides) < 2:
        raise InputError(f"timm/{name} gives features at strides {reductions}; a detector needs {list(wanted)}")
    body = timm.create_model(name, features_only=True, pretrained=pretrained, out_indices=[at[s] for s in strides])
    return (freeze_batch_norm_2d(body) if frozen else body), [widths[at[s]] for s in strides], strides


def _extra_strides(last: int, extra: nn.Module) -> list[int]:
    return [2 * last, 4 * last] if isinstance(extra, LastLevelP6P7) else [2 * last]


class PyramidBackbone(nn.Module):
    """A body that gives a list of feature maps, and an FPN over them.

    Args:
        body: images [N, 3, H, W] -> features, finest first.
        channels: their widths.
        strides: their strides.
        out_channels: width of the pyramid.
        extra: what adds coarser levels to the pyramid.
    """

    def __init__(
        self, body: nn.Module, channels: list[int], strides: list[int], out_channels: int, extra: ExtraFPNBlock
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=extra)
        self.out_channels = out_channels
        self.strides = [*strides, *_extra_strides(strides[-1], extra)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.fpn({str(i): f for i, f in enumerate(self.body(images))})
        return features


class TinyBody(nn.Module):
    """A ResNet of seven convolutions: a stem of stride 2 and one basic block at each of the strides 4, 8 and 16."""

    def __init__(self, width: int, *, frozen: bool = False) -> None:
        super().__init__()
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.norm = norm(width)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(_Block(a, b, norm) for a, b in pairwise(widths))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.norm(self.stem(images)))
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class _Block(nn.Module):
    """A basic residual block of stride 2."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


def _check_width(family: str, channels: int) -> None:
    if family == "fcos" and channels % GROUPS_OF_FCOS != 0:
        raise InputError(
            f"fpn_channels must be a multiple of {GROUPS_OF_FCOS} for fcos, whose heads normalise in groups, got "
            f"{channels}"
        )


def _sizes(image_size: int | None) -> dict[str, Any]:
    """Shorter and longest side in torchvision's proportion, 800 to 1333."""
    return {} if image_size is None else {"min_size": image_size, "max_size": round(image_size * 1333 / 800)}


def _arguments(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    skip = ("self", "backbone", "num_classes", "weights", "weights_backbone", "progress")
    return [n for n, p in inspect.signature(function).parameters.items() if p.kind not in kinds and n not in skip]


def _check_options(name: str, options: Mapping[str, Any], known: list[str]) -> None:
    """torchvision's classes swallow unknown arguments; these must not be silent."""
    for option in options:
        if option not in known:
            hint = nearest(option, known) or f"; known: {', '.join(dict.fromkeys(known))}"
            raise InputError(f'{name} has no option "{option}"{hint}')
