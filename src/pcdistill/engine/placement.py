"""Where a run computes and how its tensors lie: device, precision and memory format, decided once."""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from pcdistill.errors import InputError
from pcdistill.recipe import GRAPHS, TrainConfig

Module = TypeVar("Module", bound=nn.Module)
BFLOAT16 = {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"}  # instructions, by any of their names
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # Accelerate's names, and the recipe's


@dataclass(frozen=True)
class Placement:
    """Puts modules and images where a run computes.

    Attributes:
        accelerator: devices, processes and precision.
        memory_format: of the module that is trained, and of its images.
        frozen_format: of modules that run without a backward pass, and of images in evaluation.
        cuda_graphs: compiled modules are replayed as CUDA graphs. Then what they return holds until `begin_step`.
    """

    accelerator: Accelerator
    memory_format: torch.memory_format = torch.contiguous_format
    frozen_format: torch.memory_format = torch.contiguous_format
    cuda_graphs: bool = False

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def frozen(self) -> "Placement":
        """The placement of what has no backward pass: the teacher, and every model in evaluation."""
        return replace(self, memory_format=self.frozen_format)

    def module(self, module: Module) -> Module:
        """The module itself, on the device and in the memory format."""
        module.to(self.device).to(memory_format=self.memory_format)
        return module

    def compile(self, module: nn.Module) -> None:
        """Have torch.compile run the module, in place."""
        module.compile(mode=GRAPHS if self.cuda_graphs else None)

    def begin_step(self) -> None:
        """Nothing of the last step is read any more: its graphs' memory is free for this one's."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def outside_steps(self) -> AbstractContextManager[Any]:
        """For passes that are no step of training: without graphs, which only pay for many passes of one shape."""
        return torch.compiler.set_stance("force_eager") if self.cuda_graphs else nullcontext()

    def images(self, images: Tensor) -> Tensor:
        """Images on the device; a batch [N, C, H, W] also in the memory format."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=self.memory_format) if images.ndim == 4 else images


def make_placement(train: TrainConfig, accelerator: Accelerator, student: nn.Module | None = None) -> Placement:
    """The recipe's choice of memory format, by default channels last: convolutions run fastest so.

    Nothing but rounding depends on it. A student whose training in it would break is trained without.

    Args:
        train: `channels_last`, None for the default.
        accelerator: where to compute.
        student: the module to train; None where nothing is trained.

    Raises:
        InputError: the recipe asks for channels last with a student that breaks in it, or for CUDA graphs with
            several processes.
    """
    device = accelerator.device
    wanted = device.type != "mps" if train.channels_last is None else train.channels_last
    broken = _broken_in_channels_last(student) if wanted and student is not None and device.type == "cpu" else None
    if broken is not None and train.channels_last:
        raise InputError(
            f"train.channels_last: {broken} is a strided 1x1 convolution of fewer than 16 channels, whose backward "
            "pass writes beyond its memory in this format on a CPU; leave it out"
        )
    chosen = torch.channels_last if wanted else torch.contiguous_format
    graphs = train.compile == GRAPHS and device.type == "cuda"
    if graphs and accelerator.num_processes > 1:
        raise InputError(f"train.compile {GRAPHS} is for one process so far; several take true")
    return Placement(accelerator, torch.contiguous_format if broken is not None else chosen, chosen, graphs)


def _broken_in_channels_last(student: nn.Module) -> str | None:
    """Name of the first strided 1x1 convolution of fewer than 16 channels.

    With torch 2.15 on a CPU with AVX-512, its backward pass in this format reads and writes beyond its memory (oneDNN's
    brgconv_strided). No other convolution was found to: benchmarks/channels_last_memory.py.
    """
    for name, module in student.named_modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or module.stride == (1, 1):
            continue
        if module.in_channels // module.groups < 16:
            return str(name)
    return None


def emulates_bfloat16() -> bool:
    """Whether this processor computes in bfloat16 without instructions for it; False where nobody tells."""
    told = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.10 on
    if told is not None:
        found: set[str] = {name for name, there in told().items() if there}
    else:
        file = Path("/proc/cpuinfo")  # as Linux has it: "flags" on x86, "Features" on ARM
        text = file.read_text(errors="replace") if file.is_file() else ""
        lines = [line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
        found = set(" ".join(lines).split())
    known = platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64") and bool(found)
    return known and not found & BFLOAT16


def launched_alone(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` was asked for several processes and started this one alone, as it does on CPUs.

    It then says where they would meet, and nothing of ranks.
    """
    started = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return accelerator.num_processes == 1 and started and "WORLD_SIZE" not in os.environ


def tell_unused(accelerator: Accelerator, unused: bool) -> None:
    """Say whether any parameter gets no gradient; distributed training asks when its module is prepared."""
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Devices, processes and precision, from the recipe and from `accelerate launch` or `torchrun`.

    "auto" precision is bfloat16 on CUDA devices that have it and float32 elsewhere.
    """
    cpu = train.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if train.device not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f'train.device must be "auto", "cpu", "cuda" or "mps", got "{train.device}"')
    if train.device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, but PyTorch sees no CUDA device; use --device cpu")
    chosen = train.precision
    if chosen == "auto":
        chosen = "bfloat16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[chosen]
    if mixed == "fp16" and cpu:
        raise InputError("train.precision float16 needs a GPU (its loss scaling does); use bfloat16 on a CPU")
    # Accelerate keeps the first run's precision and device for the process's life; a second run may want others.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=mixed, cpu=cpu)
