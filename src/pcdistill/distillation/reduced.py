"""A frozen teacher's weights in fewer bits: bfloat16 and float16 throughout, or float8 for its large weights."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

COMPUTED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
STORED = torch.float8_e4m3fn
LARGEST = torch.finfo(STORED).max


class FromFloat8(nn.Module):
    """Gives a weight back that is stored in float8 (e4m3), with one scale for each output channel.

    Args:
        weight: [D, ...], in the precision to compute in.
    """

    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        self.register_buffer("scale", (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny))

    def forward(self, stored: Tensor) -> Tensor:
        """The weight [D, ...] that the model computes with."""
        return stored.view(STORED).to(self.scale.dtype) * self.scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """What is stored, [D, ...], in a tuple: float8 as bytes, which no cast changes and every backend exchanges."""
        return ((weight.float() / self.scale.float()).clamp(-LARGEST, LARGEST).to(STORED).view(torch.uint8),)


@torch.no_grad()
def reduce_weights(model: nn.Module, precision: str) -> None:
    """Change a frozen model in place, its normalisations and buffers too.

    With "float8" the weights of linear layers and convolutions are stored in 8 bits and computed with in bfloat16; all
    else is bfloat16. So it saves memory on every device, and no time: nothing is multiplied in float8.

    Args:
        model: without gradients.
        precision: "bfloat16", "float16" or "float8"; "float32" leaves the model as it is.
    """
    if precision == "float32":
        return
    model.to(COMPUTED[precision])
    if precision != "float8":
        return
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | _ConvNd) and not parametrize.is_parametrized(module):
            parametrize.register_parametrization(module, "weight", FromFloat8(module.weight), unsafe=True)
