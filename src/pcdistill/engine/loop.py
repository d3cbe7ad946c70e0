"""The training loop: plain PyTorch on Hugging Face Accelerate, resumable to the bit at any optimiser step."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from pcdistill.engine.average import MovingAverage
from pcdistill.engine.causes import NEVER, Watch, cause_of
from pcdistill.engine.checkpoint import (
    Part,
    Randomness,
    Scaler,
    Value,
    Weights,
    atomic_write,
    collect,
    load_checkpoint,
    restore,
    save_checkpoint,
    to_cpu,
)
from pcdistill.engine.console import Console
from pcdistill.engine.fingerprint import Contents, settle, weights_fingerprint
from pcdistill.engine.placement import Placement
from pcdistill.engine.stopping import StopRequest
from pcdistill.engine.tally import Tally
from pcdistill.errors import InputError, PcdistillError, TrainingStopped
from pcdistill.files import sealed_json, unsealed_json
from pcdistill.plain import read_text
from pcdistill.recipe import OptimConfig, TrainConfig
from pcdistill.schedules import learning_rate_factor

TIMES = ("seconds", "images_per_second")  # columns of metrics.csv that differ between equal runs
CHECK_EVERY = 50  # steps between looks at the loss, the only synchronisation within an epoch


class Interrupted(PcdistillError):
    """Ctrl-C or a polite kill; a checkpoint was written first.

    Attributes:
        signal: its number.
    """

    def __init__(self, text: str, signal: int = SIGINT) -> None:
        super().__init__(text)
        self.signal = int(signal)

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        return type(self), (str(self), self.signal)


class Batch(Protocol):
    """What a distiller takes; its length is its number of images."""

    def __len__(self) -> int: ...

    def to(self, place: Placement) -> "Batch": ...


class Batches(Protocol):
    """Batches of an epoch, as a pure function of the epoch: what exact resume needs."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Metric:
    """What a task wants to be watched.

    Attributes:
        name: of the validation metric, in percent, that picks the best epoch.
        training: an epoch's counts (the distiller's "sum/NAME") -> further columns of metrics.csv under "train/".
        stop: the rows so far -> why training must stop, or None.
    """

    name: str
    training: Callable[[dict[str, float]], dict[str, float]] = lambda counts: {}
    stop: Callable[[list[dict[str, float]]], str | None] = lambda rows: None


@dataclass(frozen=True)
class Record:
    """Where a run's progress goes.

    Attributes:
        out: folder for last.pt, best.pt and metrics.csv; None keeps nothing on disk.
        digest: stands in the checkpoint; a run with another is not resumed.
        contents: fingerprints of teacher, student and data, as the digest; see :mod:`pcdistill.engine.fingerprint`.
        console: what a person sees.
        trackers: called with (row, step) after every epoch.
    """

    out: Path | None = None
    digest: str = ""
    console: Console = field(default_factory=lambda: Console(quiet=True))
    trackers: tuple[Callable[[dict[str, float], int], None], ...] = ()
    contents: Contents = field(default_factory=dict)


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


def make_optimizer(module: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW over everything trainable, by the fused kernels where there are any: complex numbers have none.

    Raises:
        InputError: there is nothing to train.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the student has no parameter that requires a gradient, so there is nothing to train")
    fused = device.type in ("cuda", "cpu") and all(p.is_floating_point() for p in parameters)
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


class Trainer:
    """One run of training; `fit` is the loop, everything else serves it.

    Args:
        distiller: `distiller(batch)` -> dict with "loss", "loss/NAME" (means over the batch) and "sum/NAME" (counts);
            it has `.student` and `.objective`. Its `.watched`, where it has one, holds "watch/NAME": a scalar
            that is not finite if an output of that model is not.
        batches: this process's share of every global batch.
        validate: evaluates a student module -> metrics, among them the watched one.
        optim: optimiser, schedule, clipping.
        train: length, averaging, bookkeeping.
        placement: devices, processes, memory format.
        metric: what picks the best epoch, and what is watched.
        record: the run's folder, console and trackers.
    """

    def __init__(
        self,
        distiller: nn.Module,
        batches: Batches,
        validate: Callable[[nn.Module], dict[str, float]],
        *,
        optim: OptimConfig,
        train: TrainConfig,
        placement: Placement,
        metric: Metric,
        record: Record | None = None,
    ) -> None:
        if len(batches) == 0:
            raise InputError("the training data gives no batch; lower data.batch_size")
        self.batches, self.validate = batches, validate
        lengths = gather_object([len(batches)]) if placement.accelerator.num_processes > 1 else []
        if len(set(lengths)) > 1:
            raise InputError(
                f"the processes have {', '.join(map(str, lengths))} batches an epoch and must have equally many; give "
                "a sampler that shares the images equally (DistributedSampler), or leave the rest out (drop_last)"
            )
        self.optim, self.config = optim, train
        self.placement, self.accelerator = placement, placement.accelerator
        self.metric, self.record = metric, record or Record()
        self.out, self.console = self.record.out, self.record.console
        self._place(distiller)

        self.steps_per_epoch = math.ceil(len(batches) / train.accumulate)
        self.epoch = self.batch = self.step = 0
        self.tally, self.watch = Tally(self.accelerator), Watch()
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": 0, "value": -math.inf}
        self.best_state: dict[str, Tensor] = {}
        self.epoch_seconds = 0.0
        self._log = _Log(self)
        self._stop = StopRequest()
        self._last_saved = time.monotonic()

    def _place(self, distiller: nn.Module) -> None:
        """The modules on their device, the optimiser over them, and what averages, compiles or distributes them."""
        train, device = self.config, self.placement.device
        self._plain = distiller.to(device)
        self.student: nn.Module = self.placement.module(distiller.get_submodule("student"))
        self.objective: Any = distiller.get_submodule("objective")
        if train.sync_batchnorm and self.accelerator.num_processes > 1 and device.type == "cuda":
            self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
            distiller.student = self.student
        plain: nn.Module = getattr(self.student, "_orig_mod", self.student)  # of one that came compiled
        self.ema = MovingAverage(plain, train.ema) if train.ema > 0 else None
        if train.compile and plain is self.student:
            self.placement.compile(self.student)
        optimizer = make_optimizer(distiller, self.optim, device)
        self.distiller, self.optimizer = self.accelerator.prepare(distiller, optimizer)

    @property
    def kept(self) -> nn.Module:
        """The module whose weights are evaluated and kept: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.student

    def fit(self) -> Fit:
        """Train to the end, from the start or from where :meth:`resume` left off.

        Raises:
            TrainingStopped: the loss is not finite, or the metric gave a reason.
            Interrupted: by SIGINT or SIGTERM, after a checkpoint was written.
        """
        epochs = self.config.epochs
        self.console.start((self.epoch + self.batch / len(self.batches)) / epochs)
        with self._stop.listening():
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
            self.placement.begin_step()
            batch = batch.to(self.placement)
            with nullcontext() if closes else self.accelerator.no_sync(self.distiller):
                result = self.distiller(batch)
                self.accelerator.backward(result["loss"] / size)
            self.tally.add(result, len(batch))
            self.watch.add({**result, **getattr(self._plain, "watched", {})}, self.batch)
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
                    self.save_if_due()
            self.console.step(self.epoch, config.epochs, self.batch, n_batches)
        self.epoch_seconds = base_seconds + time.monotonic() - started

    def _end_epoch(self) -> None:
        self._check_finite()
        metrics = self.validate(self.kept)
        row = self._row(metrics)
        self.history.append(row)
        reason = self.metric.stop(self.history)
        if reason is not None:
            raise TrainingStopped(reason)
        epoch = self.epoch + 1
        self._keep_best(metrics[self.metric.name], epoch)
        self.epoch, self.batch, self.epoch_seconds = epoch, 0, 0.0
        self.tally.clear()
        self.watch.clear()
        if self.out is not None:
            self.save()
            if self.accelerator.is_main_process:
                write_history(self.out / "metrics.csv", self.history)
        for tracker in self.record.trackers:
            tracker(row, self.step)
        name = self.metric.name
        train_part = f"train {row['train/' + name]:.2f}  " if f"train/{name}" in row else ""
        self.console.epoch(
            epoch - 1,
            self.config.epochs,
            f"loss {row['train/loss']:.4f}  {name}: {train_part}val {metrics[name]:.2f}",
        )
        if self._agree(self._stop.asked) and epoch < self.config.epochs:
            raise Interrupted(f"interrupted after epoch {epoch}", self._stop.signal)

    def _keep_best(self, value: float, epoch: int) -> None:
        if not value > self.best["value"]:  # nor is NaN better
            return
        self.best = {"epoch": epoch, "value": value}
        self.best_state = to_cpu(self.kept.state_dict())
        if self.out is not None and self.accelerator.is_main_process:
            state = {"student": self.best_state, "epoch": epoch, "digest": self.record.digest}
            self.best["checksum"] = save_checkpoint(self.out / "best.pt", state)

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
        self.objective.set_progress(
            progress=self.step / total,
            epoch=self.epoch + self.batch / len(self.batches),
            total_epochs=self.config.epochs,
        )

    def _row(self, metrics: dict[str, float]) -> dict[str, float]:
        losses, counts, samples = self.tally.total()
        row: dict[str, float] = {"epoch": self.epoch + 1, "lr": self.lr}
        for key, value in losses.items():
            row["train/" + key.removeprefix("loss/")] = value
        row.update({f"train/{key}": value for key, value in self.metric.training(counts).items()})
        row.update({f"val/{key}": value for key, value in metrics.items() if key not in ("samples", "finite")})
        row["seconds"] = self.epoch_seconds
        row["images_per_second"] = samples / max(self.epoch_seconds, 1e-9)
        return row

    def _check_finite(self) -> None:
        means = self.tally.means()
        if self._agree(not all(math.isfinite(value) for value in means.values())):
            shown = ", ".join(f"{key.removeprefix('loss/')} {value:.4g}" for key, value in means.items())
            raise TrainingStopped(
                f"the loss is not finite in epoch {self.epoch + 1} (by step {self.step}; means so far: {shown})"
                f"{self._cause()}"
            )

    def _cause(self) -> str:
        """The first batch, of any process, that was not finite, and why."""
        lower = f"lower optim.lr (now {self.optim.lr:g}), the weight of a term, or optim.clip_norm"
        own = self.watch.first()
        found = (NEVER, f"; {lower}")
        if own is not None:
            number, names = own
            fresh = self.epoch == 0 and number < self.config.accumulate
            cause = cause_of(self._again(number), names, fresh=fresh, lower=lower)
            found = (number, f", first in batch {number + 1} of {len(self.batches)}: {cause}")
        if self.accelerator.num_processes > 1:
            found = min(gather_object([found]))
        return found[1]

    def _again(self, number: int) -> Batch | None:
        """A batch of this epoch once more; None where its loader cannot give it."""
        try:
            return next(self.batches.epoch(self.epoch, start=number)).to(self.placement)
        except Exception:  # the loss is to be explained, not a user's loader
            return None

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # Checkpoints

    def _parts(self) -> dict[str, Part]:
        """All that the rest of the run depends on, in the order in which it is loaded."""
        values = ("epoch", "batch", "step", "best")
        return {
            "student": Weights(self.student),
            "objective": Weights(self.objective),
            "optimizer": self.optimizer,
            "ema": Weights(self.ema),
            "scaler": Scaler(self.accelerator),
            "sums": self.tally,
            **{name: Value(self, name) for name in values},
            "history": self._log,
            "random": Randomness(self.accelerator),
        }

    def save(self) -> None:
        """Write last.pt."""
        if self.out is None:
            return
        state = collect(self._parts())
        if self.accelerator.is_main_process:
            self._log.write_times()
            owner = {
                "digest": self.record.digest,
                "processes": self.accelerator.num_processes,
                "contents": self.record.contents,
            }
            save_checkpoint(self.out / "last.pt", {**owner, **state})
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
        if state["digest"] != self.record.digest:
            raise InputError(f"{path} was written by another recipe; use another --out, or delete the folder")
        if state["processes"] != self.accelerator.num_processes:
            raise InputError(
                f"{path} was written by {state['processes']} processes, this run has {self.accelerator.num_processes}; "
                "resume with the same number"
            )
        best = self._read_best(state["best"])
        own = [weights_fingerprint(weights) for weights in (state["student"], best) if weights]
        settle(path, self.record.contents, state.get("contents"), own)
        self.epoch_seconds = state.get("epoch_seconds", 0.0)  # older versions kept times in last.pt
        restore(self._parts(), state)
        self.best_state = best
        if self.epoch >= self.config.epochs:  # no step will tell the losses where training ended
            self._set_last_progress()
        return True

    def _set_last_progress(self) -> None:
        """Tell the objective what the last step of the training told it."""
        epochs, batches = self.config.epochs, len(self.batches)
        last = (self.steps_per_epoch - 1) * self.config.accumulate  # where the last step's batches begin
        self.objective.set_progress(
            progress=(self.step - 1) / (epochs * self.steps_per_epoch),
            epoch=epochs - 1 + last / batches,
            total_epochs=epochs,
        )

    def _read_best(self, known: dict[str, Any]) -> dict[str, Tensor]:
        """The weights in best.pt, which must be what last.pt knows of it; {} before the first epoch's end.

        A kill between the two files leaves a newer best.pt; its epoch is run again, and is the best again.
        """
        assert self.out is not None
        path = self.out / "best.pt"
        if known["epoch"] == 0:
            return {}
        state = load_checkpoint(path)
        newer = state["epoch"] > known["epoch"]
        same = newer or known.get("checksum") in (None, state["checksum"])
        if state["digest"] != self.record.digest or state["epoch"] < known["epoch"] or not same:
            raise InputError(f"{path} is not the one that last.pt knows of; put that back, or use another --out")
        if newer:
            known["value"] = -math.inf
        weights: dict[str, Tensor] = state["student"]
        return weights

    def save_if_due(self) -> None:
        """At a step's end: save when it is time, or when asked to stop. Processes decide together, and seldom."""
        if self.accelerator.num_processes > 1 and self.step % CHECK_EVERY != 0:
            return
        stop = self._agree(self._stop.asked)
        due = self.out is not None and time.monotonic() - self._last_saved > self.config.checkpoint_seconds
        if self.out is not None and (stop or self._agree(due)):
            self.save()
        if stop:
            raise Interrupted(
                f"interrupted in epoch {self.epoch + 1}, after {self.batch} of {len(self.batches)} batches",
                self._stop.signal,
            )

    def _agree(self, flag: bool) -> bool:
        """True in every process if it is true in any."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item() > 0)


class _Log:
    """The history as last.pt keeps it: without times, so that equal runs leave equal bytes. Those are in times.json."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> list[dict[str, float]]:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in self.trainer.history]

    def load_state_dict(self, state: list[dict[str, float]]) -> None:
        """Rows, and where they have none, their times; without times.json, 0."""
        self.trainer.history, under_way = with_times(state, self.trainer.out)
        self.trainer.epoch_seconds = self.trainer.epoch_seconds or under_way.get(self.trainer.epoch + 1, 0.0)

    def write_times(self) -> None:
        """times.json: of every epoch, and of the one under way so far."""
        rows = [{key: row[key] for key in ("epoch", *TIMES)} for row in self.trainer.history]
        under_way = {"epoch": self.trainer.epoch + 1, "seconds": self.trainer.epoch_seconds}
        assert self.trainer.out is not None
        atomic_write(self.trainer.out / "times.json", sealed_json({"epochs": rows, "under_way": under_way}))


def with_times(rows: list[dict[str, float]], out: Path | None) -> tuple[list[dict[str, float]], dict[int, float]]:
    """A checkpoint's history with the times of times.json, 0 where there are none; the seconds of epochs under way.

    From a file that is not there or damaged nothing is taken, for nothing depends on times.
    """
    epochs: dict[int, dict[str, float]] = {}
    seconds: dict[int, float] = {}
    path = (out or Path()) / "times.json"
    try:
        found = unsealed_json(read_text(path), str(path))
        epochs = {int(row["epoch"]): {key: float(row[key]) for key in TIMES} for row in found["epochs"]}
        seconds = {int(found["under_way"]["epoch"]): float(found["under_way"]["seconds"])}
    except (InputError, KeyError, TypeError, ValueError, OverflowError):
        pass
    none = dict.fromkeys(TIMES, 0.0)
    return [{**row, **epochs.get(int(row["epoch"]), none), **row} for row in rows], seconds


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """metrics.csv, whole and atomically: one row per epoch, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in history)
    atomic_write(path, text.getvalue())
