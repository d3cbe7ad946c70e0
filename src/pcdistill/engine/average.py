"""The moving average of a model's weights, whatever else it holds."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcdistill.errors import InputError

Tensors = tuple[Tensor, ...] | list[Tensor]


class MovingAverage(AveragedModel):
    """An exponential moving average of parameters and buffers (batch statistics, as is customary).

    What cannot be averaged is copied at each update: integer and boolean buffers (an index table, a counter), and
    buffers that hold an infinite value (a mask): the mean of two infinities, taken by their difference, is no number.

    Args:
        model: it is copied.
        decay: the average's share of itself at each update, in (0, 1).

    Raises:
        InputError: a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        lerp = get_ema_multi_avg_fn(decay)

        def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
            if averaged[0].is_floating_point() or averaged[0].is_complex():
                lerp(averaged, current, count)
            else:
                torch._foreach_copy_(averaged, current)

        try:
            super().__init__(model, multi_avg_fn=average, use_buffers=True)
            self.requires_grad_(False)  # a scripted module's copy refuses
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(
                f"train.ema averages a copy of the student, and this {type(model).__name__} cannot be copied "
                f"({str(error).splitlines()[0]}); set train.ema to 0, or make copy.deepcopy work on it"
            ) from error
        self._fixed = [i for i, buffer in enumerate(model.buffers()) if _holds_infinity(buffer)]

    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        super().update_parameters(model)
        if self._fixed:
            own, current = list(self.module.buffers()), list(model.buffers())
            for i in self._fixed:
                own[i].copy_(current[i])


def _holds_infinity(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and bool(torch.isinf(buffer).any())
