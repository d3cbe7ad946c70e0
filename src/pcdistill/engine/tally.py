"""What an epoch adds up, on the device and over processes, so that nothing is read back within it."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

COUNTED = "sum/"  # prefix of a distiller's values that are added as they are; losses are weighted with the batch


class Tally:
    """Sums of one epoch, this process's share: "loss" and "loss/NAME" times the batch's images, "samples", and counts.

    A part of the checkpoint: the sums of all processes are stored together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        self.sums = {}

    def add(self, result: dict[str, Tensor], n: int) -> None:
        """Add a batch of n images.

        Args:
            result: a distiller's: "loss" and "loss/NAME" are means over the batch, "sum/NAME" sums.
            n: number of images.
        """
        parts = {key: value.detach().float() * n for key, value in result.items() if key.startswith("loss")}
        for key, value in result.items():
            if key.startswith(COUNTED):
                parts[key.removeprefix(COUNTED)] = value.detach()
        parts["samples"] = torch.full((), float(n), device=self.accelerator.device)
        for key, value in parts.items():
            old = self.sums.get(key)
            self.sums[key] = value if old is None else old + value

    def total(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Over all processes: mean of every loss, sum of every count, number of images (1 at least)."""
        names = sorted(self.sums)
        packed = torch.stack([self.sums[name].to(self.accelerator.device).float() for name in names])
        if self.accelerator.num_processes > 1:
            packed = self.accelerator.reduce(packed, reduction="sum")
        sums = dict(zip(names, packed.tolist(), strict=True))
        samples = max(sums.pop("samples"), 1.0)
        losses = {key: value / samples for key, value in sums.items() if key.startswith("loss")}
        return losses, {key: value for key, value in sums.items() if key not in losses}, samples

    def means(self) -> dict[str, float]:
        """Mean of every loss so far, in this process; reads the sums back."""
        samples = max(float(self.sums["samples"]), 1.0) if self.sums else 1.0
        return {key: float(value) / samples for key, value in self.sums.items() if key.startswith("loss")}

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of all processes; every process must call it."""
        sums = self.sums
        if self.accelerator.num_processes > 1:
            sums = {key: self.accelerator.reduce(value.clone(), reduction="sum") for key, value in sums.items()}
        return {key: value.detach().to("cpu", copy=True) for key, value in sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The first process carries the sums on, the others start from zero."""
        share = 1.0 if self.accelerator.is_main_process else 0.0
        self.sums = {key: value.to(self.accelerator.device) * share for key, value in state.items()}
