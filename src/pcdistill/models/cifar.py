"""The small networks of the CIFAR-100 distillation literature, written from their papers.

Every network is a `stem`, stages `layer1`, `layer2`, ... (its `FEATURES` lists them), sometimes a `head`, then
`pool` and `fc`. A stage is a Sequential whose last child owns `relu_out`, the module that makes the stage's output: a
hook before it sees the features before the activation. Where a paper's block ends without one (MobileNetV2), `relu_out`
is the identity. Nothing works in place, so a hook may keep what it sees. Any image of 8 pixels or more works.

Sources: ResNet arXiv 1512.03385 section 4.2 (with projection shortcuts; these, the widths of "x4" and the strides below
are those of the distillation literature since CRD, arXiv 1910.10699); Wide ResNet arXiv 1605.07146; VGG arXiv 1409.1556
with batch normalisation; MobileNetV2 arXiv 1801.04381; ShuffleNet arXiv 1707.01083; ShuffleNetV2 arXiv 1807.11164.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn


class CifarNet(nn.Module):
    """Stem, stages, optional head, global average pool and linear classifier: images [N, in_channels, H, W] to [N, C].

    Args:
        stem: the layers before the first stage.
        stages: `layer1`, `layer2`, ... in order; `FEATURES` lists their names.
        head: the layers after the last stage, if any.
        width: channels that reach the classifier.
        num_classes: C.
    """

    FEATURES: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Sequential],
        *,
        width: int,
        num_classes: int,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.FEATURES = tuple(f"layer{i}" for i in range(1, len(stages) + 1))
        for name, stage in zip(self.FEATURES, stages, strict=True):
            self.add_module(name, stage)
        self.head = nn.Identity() if head is None else head
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.num_classes = num_classes
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for name in self.FEATURES:
            x = getattr(self, name)(x)
        out: Tensor = self.fc(self.pool(self.head(x)).flatten(1))
        return out


def _init(module: nn.Module) -> None:
    if isinstance(
        module, nn.Conv2d
    ):  # He's fan-out rule per group: a depthwise filter has a fan of its own nine weights
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


def _conv_bn(in_width: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_width, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width)]


class ConvUnit(nn.Module):
    """Convolution, batch normalisation, ReLU; optionally after a 2x2 max pool."""

    def __init__(
        self, in_width: int, width: int, *, kernel: int = 3, stride: int = 1, bias: bool = False, pool: bool = False
    ) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.conv = nn.Conv2d(in_width, width, kernel, stride, padding=kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_out(self.bn(self.conv(self.pool(x))))
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet, arXiv 1512.03385, figure 2."""

    expansion = 1

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_bn(in_width, width, 3, stride), nn.ReLU(), *_conv_bn(width, width, 3))
        self.shortcut = _projection(in_width, width, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_out(self.body(x) + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride), 1x1 to four times the width, and a shortcut: arXiv 1512.03385, figure 5."""

    expansion = 4

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        out_width = width * self.expansion
        self.body = nn.Sequential(
            *_conv_bn(in_width, width, 1), nn.ReLU(), *_conv_bn(width, width, 3, stride), nn.ReLU(),
            *_conv_bn(width, out_width, 1),
        )  # fmt: skip
        self.shortcut = _projection(in_width, out_width, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_out(self.body(x) + self.shortcut(x))
        return out


def _projection(in_width: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and in_width == width:
        return nn.Identity()
    return nn.Sequential(*_conv_bn(in_width, width, 1, stride))


def resnet(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = (16, 16, 32, 64),
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    num_classes: int = 100,
    in_channels: int = 3,
) -> CifarNet:
    """A CIFAR residual network.

    Args:
        depths: blocks in each stage; every stage after the first halves the resolution.
        widths: channels of the stem, then of each stage.
        block: `BasicBlock` or `Bottleneck`.
        num_classes: C.
        in_channels: channels of the images.
    """
    if len(widths) != len(depths) + 1:
        raise ValueError(f"widths must be {len(depths) + 1} numbers, the stem's and each stage's, got {list(widths)}")
    current, stages = widths[0], []
    for i, (depth, width) in enumerate(zip(depths, widths[1:], strict=True)):
        blocks = []
        for j in range(depth):
            blocks.append(block(current, width, stride=2 if i > 0 and j == 0 else 1))
            current = width * block.expansion
        stages.append(nn.Sequential(*blocks))
    return CifarNet(ConvUnit(in_channels, widths[0]), stages, width=current, num_classes=num_classes)


class WideBlock(nn.Module):
    """Activation before convolution, twice, and a shortcut; `activate` is False where the input comes activated."""

    def __init__(self, in_width: int, width: int, *, stride: int, activate: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width) if activate else nn.Identity()
        self.relu1 = nn.ReLU() if activate else nn.Identity()
        self.body = nn.Sequential(
            *_conv_bn(in_width, width, 3, stride), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        )
        same = stride == 1 and in_width == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_width, width, 1, stride, bias=False)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out: Tensor = self.body(activated) + (x if self.same else self.shortcut(activated))
        return out


class Activation(nn.Module):
    """Batch normalisation and ReLU at the end of a stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_out(self.bn(x))
        return out


def wide_resnet(depth: int, factor: int, *, num_classes: int = 100, in_channels: int = 3) -> CifarNet:
    """WRN-depth-factor.

    Where the width changes, both branches of a stage's first block read the same activated input, so that activation is
    counted to the end of the stage before: the same function and parameters, and every stage ends in its `relu_out`.

    Args:
        depth: 6 n + 4, with n blocks in each of three stages.
        factor: widens the stages 16, 32, 64.
        num_classes: C.
        in_channels: channels of the images.
    """
    current, stages = 16, []
    for i, width in enumerate((16 * factor, 32 * factor, 64 * factor)):
        layers: list[nn.Module] = []
        for j in range((depth - 4) // 6):
            layers.append(WideBlock(current, width, stride=2 if i > 0 and j == 0 else 1, activate=i == 0 or j > 0))
            current = width
        stages.append(nn.Sequential(*layers, Activation(width)))
    return CifarNet(nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), stages, width=current, num_classes=num_classes)


def vgg(depths: Sequence[int], *, num_classes: int = 100, in_channels: int = 3) -> CifarNet:
    """VGG with batch normalisation; five groups, of which `stem` is the first; the last two share one resolution.

    Args:
        depths: convolutions in each group of width 64, 128, 256, 512, 512.
        num_classes: C.
        in_channels: channels of the images.
    """
    current, groups = in_channels, []
    for i, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        units = []
        for j in range(depth):
            units.append(ConvUnit(current, width, bias=True, pool=j == 0 and 1 <= i <= 3))
            current = width
        groups.append(nn.Sequential(*units))
    return CifarNet(groups[0], groups[1:], width=current, num_classes=num_classes)


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project linearly: arXiv 1801.04381, table 1."""

    def __init__(self, in_width: int, width: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_width * expansion
        self.body = nn.Sequential(
            *_conv_bn(in_width, hidden, 1), nn.ReLU(), *_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU(),
            *_conv_bn(hidden, width, 1),
        )  # fmt: skip
        self.residual = stride == 1 and in_width == width
        self.relu_out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_out(x + self.body(x) if self.residual else self.body(x))
        return out


def mobilenetv2(*, factor: float = 0.5, num_classes: int = 100, in_channels: int = 3) -> CifarNet:
    """MobileNetV2 as CIFAR-100 distillation uses it: half width, stem stride 2, stages at 1/2, 1/4, 1/8 and 1/16.

    Args:
        factor: scales all widths but the head's 1280.
        num_classes: C.
        in_channels: channels of the images.
    """
    plan = [  # per stage: (expansion, width, blocks, stride)
        [(1, 16, 1, 1), (6, 24, 2, 1)],
        [(6, 32, 3, 2)],
        [(6, 64, 4, 2), (6, 96, 3, 1)],
        [(6, 160, 3, 2), (6, 320, 1, 1)],
    ]
    current = stem_width = int(32 * factor)
    stages = []
    for stage in plan:
        blocks = []
        for expansion, width, depth, stride in stage:
            for j in range(depth):
                blocks.append(
                    InvertedResidual(current, int(width * factor), stride=stride if j == 0 else 1, expansion=expansion)
                )
                current = int(width * factor)
        stages.append(nn.Sequential(*blocks))
    stem, head = ConvUnit(in_channels, stem_width, stride=2), ConvUnit(current, 1280, kernel=1)
    return CifarNet(stem, stages, width=1280, num_classes=num_classes, head=head)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    n, channels, height, width = x.shape
    return x.reshape(n, groups, channels // groups, height, width).transpose(1, 2).reshape(n, channels, height, width)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1: arXiv 1707.01083, figure 2.

    A block with stride 2 appends its average-pooled input to its output. As in the distillation literature, and unlike
    the paper, a ReLU follows the depthwise convolution.
    """

    def __init__(self, in_width: int, width: int, *, stride: int, first_groups: int, groups: int = 3) -> None:
        super().__init__()
        branch = width - in_width if stride == 2 else width
        hidden = branch // 4
        self.groups = first_groups
        self.reduce = nn.Sequential(*_conv_bn(in_width, hidden, 1, groups=first_groups), nn.ReLU())
        self.expand = nn.Sequential(
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU(), *_conv_bn(hidden, branch, 1, groups=groups)
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.expand(shuffle_channels(self.reduce(x), self.groups))
        out: Tensor = self.relu_out(branch + x if self.pool is None else torch.cat([branch, self.pool(x)], dim=1))
        return out


def shufflenetv1(*, num_classes: int = 100, in_channels: int = 3) -> CifarNet:
    """ShuffleNet with 3 groups and a 1x1 stem, stages at 1/2, 1/4 and 1/8.

    Args:
        num_classes: C.
        in_channels: channels of the images.
    """
    current, stages = 24, []
    for i, (width, depth) in enumerate(((240, 4), (480, 8), (960, 4))):
        blocks = []
        for j in range(depth):
            blocks.append(ShuffleBlock(current, width, stride=2 if j == 0 else 1, first_groups=1 if i == j == 0 else 3))
            current = width
        stages.append(nn.Sequential(*blocks))
    return CifarNet(ConvUnit(in_channels, 24, kernel=1), stages, width=current, num_classes=num_classes)


class ShuffleV2Block(nn.Module):
    """Half of the channels pass, half are convolved, then both are shuffled: arXiv 1807.11164, figure 3 (c) and (d).

    One ReLU stands at the end for both halves. What passes is an earlier ReLU's output and unchanged by it, so the
    function is the paper's.
    """

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        half = width // 2
        self.split = stride == 1
        branch_in = half if self.split else in_width
        self.branch = nn.Sequential(
            *_conv_bn(branch_in, half, 1),
            nn.ReLU(),
            *_conv_bn(half, half, 3, stride, groups=half),
            *_conv_bn(half, half, 1),
        )
        down = [*_conv_bn(in_width, in_width, 3, stride, groups=in_width), *_conv_bn(in_width, half, 1)]
        self.shortcut = nn.Identity() if self.split else nn.Sequential(*down)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, convolved = x.chunk(2, dim=1) if self.split else (x, x)
        out: Tensor = self.relu_out(
            shuffle_channels(torch.cat([self.shortcut(kept), self.branch(convolved)], dim=1), 2)
        )
        return out


def shufflenetv2(*, num_classes: int = 100, in_channels: int = 3) -> CifarNet:
    """ShuffleNetV2 1x with a 1x1 stem, stages at 1/2, 1/4 and 1/8.

    Args:
        num_classes: C.
        in_channels: channels of the images.
    """
    stages = [
        nn.Sequential(
            ShuffleV2Block(before, width, stride=2), *(ShuffleV2Block(width, width, stride=1) for _ in range(depth))
        )
        for (before, width), depth in zip(pairwise((24, 116, 232, 464)), (3, 7, 3), strict=True)
    ]
    head = ConvUnit(464, 1024, kernel=1)
    return CifarNet(ConvUnit(in_channels, 24, kernel=1), stages, width=1024, num_classes=num_classes, head=head)


X4 = (32, 64, 128, 256)
MODELS: dict[str, Callable[..., CifarNet]] = {
    **{f"resnet{6 * n + 2}": partial(resnet, (n, n, n)) for n in (1, 2, 3, 5, 7, 9, 18)},
    "resnet8x4": partial(resnet, (1, 1, 1), widths=X4),
    "resnet32x4": partial(resnet, (5, 5, 5), widths=X4),
    "resnet50": partial(resnet, (3, 4, 6, 3), widths=(64, 64, 128, 256, 512), block=Bottleneck),
    **{f"wrn_{d}_{k}": partial(wide_resnet, d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)),
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}
