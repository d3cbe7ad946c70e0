"""Feature maps of image models: what a module gives as a map, and models whose logits come from one of their maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pcdistill.errors import InputError, nearest


class Headed(nn.Module):
    """A model whose logits come from another head, which reads one of its feature maps: what SimKD trains.

    Args:
        model: images -> anything; what it returns is not used.
        name: the module whose output the head reads (`taps.names[-1]`).
        head: maps [N, D, H, W] -> logits [N, K] (`loss.student_head()`).
    """

    def __init__(self, model: nn.Module, name: str, head: nn.Module) -> None:
        super().__init__()
        inner = unwrap(model)
        check_names(inner, [name])
        self.model = model
        self.head = head
        self.name = name
        self._layout = Layout(prefix_tokens(inner), getattr(inner, "output_fmt", None) == "NHWC")

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(tensor_of(output))

        handle = dict(unwrap(self.model).named_modules())[self.name].register_forward_hook(keep)
        try:
            self.model(images)
        finally:
            handle.remove()
        out: Tensor = self.head(self._layout.as_map(seen[-1], self.name, images))
        return out


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise unless all names are modules of the model, none twice."""
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(names, str) or not names:
        raise InputError(f"features must be a list of one module name or more, got {names!r}")
    for name in names:
        if name not in modules:
            children = ", ".join(child for child, _ in model.named_children())
            hint = nearest(name, modules) or f"; its parts are {children}"
            raise InputError(f'features: the model {type(model).__name__} has no module "{name}"{hint}')
    if len(set(names)) < len(names):
        raise InputError(f"features: a module is named twice in {', '.join(names)}")


@dataclass(frozen=True)
class Layout:
    """How outputs become maps: tokens that are no places (None: find out), and whether 4-D outputs end in channels."""

    prefix_tokens: int | None
    channels_last: bool

    def as_map(self, x: Tensor, name: str, images: Tensor) -> Tensor:
        """[N, D, H, W] from [N, D, H, W], [N, H, W, D] or tokens [N, L, D] of a square grid."""
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if self.channels_last or ends_in_channels(x, images) else x
        if x.ndim == 3:
            prefixes = (0, 1) if self.prefix_tokens is None else (self.prefix_tokens,)
            for prefix in prefixes:
                side = math.isqrt(max(x.shape[1] - prefix, 0))
                if side > 0 and side * side == x.shape[1] - prefix:
                    return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
            raise InputError(
                f'features: "{name}" gives {list(x.shape)}, and {x.shape[1]} tokens, with or without a class token, '
                "are no square grid; name modules whose output is [N, D, H, W]"
            )
        raise InputError(
            f'features: "{name}" gives {list(x.shape)}; name modules whose output is [N, D, H, W] or tokens [N, L, D]'
        )


def prefix_tokens(model: nn.Module) -> int | None:
    """How many tokens of a timm transformer are no places."""
    count = getattr(model, "num_prefix_tokens", None)
    return count if isinstance(count, int) else None


def ends_in_channels(x: Tensor, images: Tensor) -> bool:
    """Whether x is [N, H, W, D] of square images: H = W != D. Of others it cannot be seen, and is not assumed."""
    return images.shape[-2] == images.shape[-1] and x.shape[1] == x.shape[2] != x.shape[3]


def tensor_of(output: Any) -> Any:
    """The tensor in what a module returned: itself, or the first of a tuple."""
    if isinstance(output, tuple | list) and output:
        return output[0]
    return output
