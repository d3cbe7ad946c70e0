"""The training loop: plain PyTorch on Hugging Face Accelerate, resumable to the bit at any optimiser step."""

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcdistill.classification.metrics import count_correct
from pcdistill.engine.checkpoint import (
    atomic_write,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from pcdistill.engine.console import Console
from pcdistill.errors import InputError, PcdistillError, TrainingStopped
from pcdistill.recipe import OptimConfig, TrainConfig
from pcdistill.schedules import learning_rate_factor

CHECK_EVERY = 50  # steps between looks at the loss, the only synchronisation within an epoch


class Interrupted(PcdistillError):
    """Ctrl-C or a polite kill; a checkpoint was written first."""


class Batches(Protocol):
    """Batches of an epoch, as a pure function of the epoch: what exact resume needs."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


@dataclass
class Fit:
    """What training gives back.

    Attributes:
        history: one dict per epoch, the rows of metrics.csv.
        best_epoch: the epoch, from 1, with the highest validation metric (the first of equals).
        best_state: the student's weights after it, on the CPU.
        last_state: the student's weights at the end, on the CPU.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best_state: dict[str, Tensor]
    last_state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def make_accelerator(train: TrainConfig, *, unused_parameters: bool = False) -> Accelerator:
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
    return Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
    )


def make_optimizer(module: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW over everything trainable, by the fused kernels where there are any."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    fused = device.type in ("cuda", "cpu")
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def uses_channels_last(train: TrainConfig, device: torch.device, student: nn.Module | None = None) -> bool:
    """The recipe's choice, by default yes: convolutions run fastest so, and nothing else changes but rounding.

    Not for a student whose training in it would break, if one is given.

    Raises:
        InputError: the recipe asks for it with such a student.
    """
    wanted = device.type != "mps" if train.channels_last is None else train.channels_last
    broken = _broken_in_channels_last(student) if wanted and student is not None and device.type == "cpu" else None
    if broken is not None and train.channels_last:
        raise InputError(
            f"train.channels_last: {broken} is a strided 1x1 convolution of fewer than 16 channels, whose backward "
            "pass writes beyond its memory in this format on a CPU; leave it out"
        )
    return wanted and broken is None


def _broken_in_channels_last(student: nn.Module) -> str | None:
    """Name of the first strided 1x1 convolution of fewer than 16 channels.

    With torch 2.15 on a CPU with AVX-512, its backward pass in this format reads and writes beyond its memory (oneDNN's
    brgconv_strided). No other convolution was found to: benchmarks/channels_last_memory.py.
    """
    for name, module in student.named_modules():
        strided = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1)
        if strided and module.in_channels // module.groups < 16:
            return name
    return None


class Trainer:
    """One run of training; `fit` is the loop, everything else serves it.

    Args:
        distiller: `distiller(*inputs)` -> dict with "loss", "loss/NAME" and, for classifiers, "logits"; it has
            `.student` and `.objective`.
        train_batches: this process's share of every global batch.
        validate: evaluates a student module -> metrics, of which `metric` decides which epoch was best.
        optim: optimiser, schedule, clipping.
        train: length, precision, bookkeeping.
        accelerator: devices and processes.
        out: folder for last.pt, best.pt and metrics.csv; None keeps nothing on disk.
        digest: stands in the checkpoint; a run with another is not resumed.
        metric: name of the metric that picks the best epoch, in percent.
        chance: what guessing gives in that metric; training stops when accuracy has collapsed to it.
        unpack: batch -> the distiller's inputs on the device, and the number of samples.
        trackers: called with (row, step) after every epoch.
    """

    def __init__(
        self,
        distiller: nn.Module,
        train_batches: Batches,
        validate: Callable[[nn.Module], dict[str, float]],
        *,
        optim: OptimConfig,
        train: TrainConfig,
        accelerator: Accelerator,
        out: Path | None = None,
        digest: str = "",
        metric: str = "top1",
        chance: float = 0.0,
        unpack: Callable[[Any, torch.device], tuple[tuple[Any, ...], int]] | None = None,
        console: Console | None = None,
        trackers: tuple[Callable[[dict[str, float], int], None], ...] = (),
    ) -> None:
        self.batches = train_batches
        self.validate = validate
        self.optim, self.config = optim, train
        self.accelerator = accelerator
        self.out, self.digest = out, digest
        self.metric, self.chance = metric, chance
        self.console = console or Console(quiet=True)
        self.trackers = trackers
        self.unpack = unpack or self._unpack_images
        self.wants_index = bool(getattr(distiller, "wants_index", False))
        if len(train_batches) == 0:
            raise InputError("the training data gives no batch; lower data.batch_size")

        device = accelerator.device
        distiller.to(device)
        self.student: nn.Module = distiller.student  # type: ignore[assignment]
        self.objective: nn.Module = distiller.objective  # type: ignore[assignment]
        self.channels_last = uses_channels_last(train, device, self.student)
        if self.channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if train.sync_batchnorm and accelerator.num_processes > 1 and device.type == "cuda":
            distiller.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
            self.student = distiller.student  # type: ignore[assignment]
        self.ema = None
        if train.ema > 0:
            self.ema = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(train.ema), use_buffers=True)
            self.ema.requires_grad_(False)
        if train.compile:
            self.student.compile()
        self.optimizer = make_optimizer(distiller, optim, device)
        self.distiller, self.optimizer = accelerator.prepare(distiller, self.optimizer)

        self.steps_per_epoch = math.ceil(len(train_batches) / train.accumulate)
        self.epoch = self.batch = self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {"epoch": 0, "value": -math.inf}
        self.best_state: dict[str, Tensor] = {}
        self.epoch_seconds = 0.0
        self._stop = threading.Event()
        self._last_saved = time.monotonic()

    @property
    def kept(self) -> nn.Module:
        """The module whose weights are evaluated and kept: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.student

    def fit(self) -> Fit:
        """Train to the end, from the start or from where :meth:`resume` left off.

        Raises:
            TrainingStopped: the loss is not finite, or accuracy has collapsed to chance.
            Interrupted: by SIGINT or SIGTERM, after a checkpoint was written.
        """
        epochs = self.config.epochs
        self.console.start((self.epoch + self.batch / len(self.batches)) / epochs)
        with self._signals():
            while self.epoch < epochs:
                self._train_epoch()
                self._end_epoch()
        if not self.best_state:
            raise TrainingStopped("no epoch was evaluated")
        return Fit(self.history, int(self.best["epoch"]), self.best_state, to_cpu(self.kept.state_dict()))

    def _train_epoch(self) -> None:
        config, total = self.config, self.config.epochs * self.steps_per_epoch
        n_batches = len(self.batches)
        self.distiller.train()
        started = time.monotonic()
        base_seconds = self.epoch_seconds
        for batch in self.batches.epoch(self.epoch, start=self.batch):
            group = self.batch // config.accumulate
            size = min(config.accumulate, n_batches - group * config.accumulate)
            closes = (self.batch + 1) % config.accumulate == 0 or self.batch + 1 == n_batches
            if self.batch % config.accumulate == 0:
                self._set_schedules(total)
            inputs, n = self.unpack(batch, self.accelerator.device)
            with nullcontext() if closes else self.accelerator.no_sync(self.distiller):
                result = self.distiller(*inputs)
                self.accelerator.backward(result["loss"] / size)
            self._count(result, inputs, n)
            self.batch += 1
            if closes:
                if self.optim.clip_norm is not None:
                    self.accelerator.clip_grad_norm_(self._parameters(), self.optim.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.ema is not None:
                    self.ema.update_parameters(self.student)
                self.step += 1
                self.epoch_seconds = base_seconds + time.monotonic() - started
                if self.step % CHECK_EVERY == 0:
                    self._check_finite()
                if self.batch < n_batches:
                    self._maybe_save()
            self.console.step(self.epoch, config.epochs, self.batch, n_batches)
        self.epoch_seconds = base_seconds + time.monotonic() - started

    def _end_epoch(self) -> None:
        self._check_finite()
        metrics = self.validate(self.kept)
        row = self._row(metrics)
        self.history.append(row)
        epoch = self.epoch + 1
        self._check_collapse(metrics[self.metric])
        if metrics[self.metric] > self.best["value"]:
            self.best = {"epoch": epoch, "value": metrics[self.metric]}
            self.best_state = to_cpu(self.kept.state_dict())
            if self.out is not None and self.accelerator.is_main_process:
                save_checkpoint(
                    self.out / "best.pt",
                    {"format": "pcdistill-1", "student": self.best_state, "epoch": epoch, "digest": self.digest},
                )
        self.epoch, self.batch, self.sums, self.epoch_seconds = epoch, 0, {}, 0.0
        if self.out is not None:
            self.save()
            if self.accelerator.is_main_process:
                write_history(self.out / "metrics.csv", self.history)
        for tracker in self.trackers:
            tracker(row, self.step)
        train_part = f"train {row['train/' + self.metric]:.2f}  " if f"train/{self.metric}" in row else ""
        self.console.epoch(
            epoch - 1,
            self.config.epochs,
            f"loss {row['train/loss']:.4f}  {self.metric}: {train_part}val {metrics[self.metric]:.2f}",
        )
        if self._agree(self._stop.is_set()) and epoch < self.config.epochs:
            raise Interrupted(f"interrupted after epoch {epoch}")

    def _set_schedules(self, total: int) -> None:
        factor = learning_rate_factor(
            self.step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.config.epochs,
            schedule=self.optim.schedule,
            warmup_epochs=self.optim.warmup_epochs,
            milestones=self.optim.milestones,
            gamma=self.optim.gamma,
        )
        self.lr = self.optim.lr * factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.objective.set_progress(  # type: ignore[operator]
            progress=self.step / total, epoch=self.epoch + self.batch / len(self.batches)
        )

    def _count(self, result: dict[str, Tensor], inputs: tuple[Any, ...], n: int) -> None:
        """Add a batch to the epoch's sums, on the device."""
        parts = {key: value.detach().float() * n for key, value in result.items() if key.startswith("loss")}
        if "logits" in result and isinstance(inputs[1], Tensor):
            counts = count_correct(result["logits"].float(), inputs[1])
            parts["correct"], parts["counted"] = counts[0], counts[3]
        parts["samples"] = torch.full((), float(n), device=self.accelerator.device)
        for key, value in parts.items():
            old = self.sums.get(key)
            self.sums[key] = value if old is None else old + value

    def _row(self, metrics: dict[str, float]) -> dict[str, float]:
        names = sorted(self.sums)
        packed = torch.stack([self.sums[name].to(self.accelerator.device).float() for name in names])
        if self.accelerator.num_processes > 1:
            packed = self.accelerator.reduce(packed, reduction="sum")
        sums = dict(zip(names, packed.tolist(), strict=True))
        samples = max(sums.pop("samples"), 1.0)
        row: dict[str, float] = {"epoch": self.epoch + 1, "lr": self.lr}
        correct, counted = sums.pop("correct", None), sums.pop("counted", 1.0)
        for key, value in sums.items():
            row["train/" + ("loss" if key == "loss" else key.removeprefix("loss/"))] = value / samples
        if correct is not None:
            row["train/top1"] = 100 * correct / max(counted, 1.0)
        row.update({f"val/{key}": value for key, value in metrics.items() if key not in ("samples", "finite")})
        row["seconds"] = self.epoch_seconds
        row["images_per_second"] = samples / max(self.epoch_seconds, 1e-9)
        return row

    def _check_finite(self) -> None:
        values = {key: float(value) for key, value in self.sums.items() if key.startswith("loss")}
        bad = not all(math.isfinite(value) for value in values.values())
        if self._agree(bad):
            samples = max(float(self.sums["samples"]), 1.0)
            shown = ", ".join(f"{key.removeprefix('loss/')} {value / samples:.4g}" for key, value in values.items())
            raise TrainingStopped(
                f"the loss is not finite in epoch {self.epoch + 1} (by step {self.step}; means so far: {shown}); lower "
                f"optim.lr (now {self.optim.lr:g}), the distillation weight, or optim.clip_norm"
            )

    def _check_collapse(self, value: float) -> None:
        """Stop when accuracy, once well above chance, is back at it for two epochs."""
        if self.chance <= 0 or len(self.history) < 2:
            return
        recent = [row[f"val/{self.metric}"] for row in self.history[-2:]]
        if self.best["value"] > 3 * self.chance and max(recent) < 1.5 * self.chance:
            raise TrainingStopped(
                f"{self.metric} has collapsed to {value:.1f} % (chance is {self.chance:.1f} %) after a best of "
                f"{self.best['value']:.1f} % in epoch {int(self.best['epoch'])}: the steps are too large; lower "
                f"optim.lr (now {self.optim.lr:g}) or the distillation weight, or use normalize: groups with PCD"
            )

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _unpack_images(self, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], int]:
        images = batch[0].to(device, non_blocking=True)
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        target = batch[1].to(device, non_blocking=True)
        cached = getattr(batch, "teacher_logits", None)
        index = getattr(batch, "index", None)
        if index is None or not self.wants_index:
            return (images, target) if cached is None else (images, target, cached), len(images)
        return (images, target, cached, index.to(device, non_blocking=True)), len(images)

    # Checkpoints

    def save(self) -> None:
        """Write last.pt: everything that the rest of the run depends on."""
        if self.out is None:
            return
        randoms = gather_object([random_state()])
        sums = self.sums
        if self.accelerator.num_processes > 1:
            sums = {key: self.accelerator.reduce(value.clone(), reduction="sum") for key, value in sums.items()}
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.out / "last.pt",
                {
                    "format": "pcdistill-1",
                    "digest": self.digest,
                    "processes": self.accelerator.num_processes,
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "step": self.step,
                    "epoch_seconds": self.epoch_seconds,
                    "student": to_cpu(self.student.state_dict()),
                    "objective": to_cpu(self.objective.state_dict()),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": None if self.ema is None else to_cpu(self.ema.state_dict()),
                    "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                    "sums": to_cpu(sums),
                    "history": self.history,
                    "best": self.best,
                    "random": randoms,
                },
            )
        self._last_saved = time.monotonic()

    def resume(self) -> bool:
        """Continue from last.pt if there is one; False if not.

        Raises:
            InputError: the checkpoint belongs to another recipe or another number of processes.
        """
        if self.out is None or not (self.out / "last.pt").exists():
            return False
        path = self.out / "last.pt"
        state = load_checkpoint(path)
        if state["digest"] != self.digest:
            raise InputError(f"{path} was written by another recipe; use another --out, or delete the folder")
        if state["processes"] != self.accelerator.num_processes:
            raise InputError(
                f"{path} was written by {state['processes']} processes, this run has {self.accelerator.num_processes}; "
                "resume with the same number"
            )
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.epoch_seconds = state["epoch_seconds"]
        # The sums of all processes are stored together: the first carries them on, the others start from zero.
        share = 1.0 if self.accelerator.is_main_process else 0.0
        self.sums = {key: value.to(self.accelerator.device) * share for key, value in state["sums"].items()}
        self.history, self.best = state["history"], state["best"]
        if (self.out / "best.pt").exists() and self.best["epoch"] > 0:
            best = load_checkpoint(self.out / "best.pt")
            # A kill between the two files leaves a newer best.pt; its epoch is run again and writes it again.
            self.best_state = best["student"]
        restore_random_state(state["random"][self.accelerator.process_index])
        return True

    def _maybe_save(self) -> None:
        """At a step's end: save when it is time, or when asked to stop. Processes decide together, and seldom."""
        if self.accelerator.num_processes > 1 and self.step % CHECK_EVERY != 0:
            return
        stop = self._agree(self._stop.is_set())
        due = self.out is not None and time.monotonic() - self._last_saved > self.config.checkpoint_seconds
        if self.out is not None and (stop or self._agree(due)):
            self.save()
        if stop:
            raise Interrupted(
                f"interrupted in epoch {self.epoch + 1}, after {self.batch} of {len(self.batches)} batches"
            )

    def _agree(self, flag: bool) -> bool:
        """True in every process if it is true in any."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item() > 0)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop at the next step; a second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop.set()

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict on the CPU, free of the wrappers' prefixes."""
    return {
        key.replace("_orig_mod.", ""): value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv, whole and atomically: one row per epoch, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in history)
    atomic_write(path, text.getvalue())
