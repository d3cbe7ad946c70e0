"""Runs side by side on one machine: one process for each run at a time, a GPU or a fixed share of the cores for each.

A run's result does not depend on what goes beside it: each has a process, a number of threads and random generators of
its own. On a CPU it does depend, in rounding, on the number of threads, which result.json records.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from pcdistill.engine.console import Console
from pcdistill.engine.loop import Interrupted
from pcdistill.errors import InputError, PcdistillError, TrainingStopped
from pcdistill.recipe import Recipe

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One run to carry out.

    Attributes:
        name: for progress lines, unique among the jobs.
        recipe: what to do.
        out: the run's folder.
        command: what the user typed, for the record.
    """

    name: str
    recipe: Recipe
    out: Path
    command: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: "done"; "stopped" by itself, as when it diverges; "failed" by wrong input or a fault.
        text: why, where it is not done.
        summary: what result.json holds, where it was written.
    """

    status: Literal["done", "stopped", "failed"]
    text: str = ""
    summary: dict[str, Any] | None = None


@dataclass(frozen=True)
class Share:
    """What one process gets: threads, and a GPU by its position among the visible ones (None: as the parent sees)."""

    threads: int
    gpu: int | None = None


def shares(jobs: int | Literal["auto"], runs: int, *, threads: int | None = None, device: str = "auto") -> list[Share]:
    """How the machine is divided.

    Args:
        jobs: runs at a time; "auto" is one for each GPU, else as many as there are cores for `threads`.
        runs: how many there are; no more shares are made.
        threads: of each run; None divides the cores among the runs.
        device: the recipe's train.device; GPUs are used unless it is "cpu".

    Raises:
        InputError: numbers below 1.
    """
    if jobs != "auto" and jobs < 1:
        raise InputError(f"--jobs must be auto or at least 1, got {jobs}")
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    wanted = (gpus or max(1, cores // (threads or 1))) if jobs == "auto" else jobs
    count = max(1, min(wanted, runs))
    each = threads or max(1, cores // count)
    return [Share(each, i % gpus if gpus > 1 else None) for i in range(count)]


def run_jobs(jobs: Sequence[Job], places: Sequence[Share], *, console: Console) -> Iterator[tuple[Job, Outcome]]:
    """Carry out jobs, as many at a time as there are places; each is yielded when it ends, in order of ending.

    A job that fails does not end the others. Ctrl-C and SIGTERM end all of them after their next checkpoint.

    Args:
        jobs: in the order in which they are begun.
        places: from :func:`shares`.
        console: progress of all.

    Raises:
        Interrupted: stopped by a signal; the same call continues.
    """
    if len(places) == 1 and places[0].gpu is None:
        yield from _one_by_one(jobs, places[0], console)
        return
    waiting = deque(jobs)
    workers: list[_Worker] = []
    progress: dict[str, float] = {}
    try:
        with _sigterm_as_interrupt():
            workers = [_Worker(place) for place in places]
            for worker in workers:
                worker.give(waiting.popleft() if waiting else None)
            while any(worker.job for worker in workers):
                for worker in _ready(workers):
                    job, message = worker.job, worker.receive()
                    if isinstance(message, float):
                        progress[job.name] = message
                        _draw(console, progress, len(jobs))
                    elif isinstance(message, str):
                        console.warn(f"{job.name}: {message}")
                    else:
                        progress[job.name] = 1.0
                        if not worker.process.is_alive():
                            worker.start()
                        worker.give(waiting.popleft() if waiting else None)
                        yield job, message
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the runs under way have checkpoints: the same command continues") from None
    finally:
        for worker in workers:
            worker.end()
        console.close()


def _one_by_one(jobs: Sequence[Job], share: Share, console: Console) -> Iterator[tuple[Job, Outcome]]:
    """In this process: another would only cost its start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(share.threads)
    try:
        for job in jobs:
            yield job, _carry_out(job, Console(quiet=True, stream=console.stream))
    finally:
        torch.set_num_threads(threads)


def _carry_out(job: Job, console: Console) -> Outcome:
    """A run, and how it ended.

    Raises:
        Interrupted: stopped by a signal.
    """
    from pcdistill.commands.run import run_with_report

    try:
        return Outcome(
            "done", summary=run_with_report(job.recipe, job.out, console=console, command=job.command).summary
        )
    except TrainingStopped as stop:
        return Outcome("stopped", str(stop))
    except (Interrupted, BrokenPipeError, ConnectionResetError):
        raise
    except PcdistillError as error:
        return Outcome("failed", str(error))
    except Exception as error:  # a fault of one run must not end the others
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")


def _draw(console: Console, progress: dict[str, float], total: int) -> None:
    going = [f"{name} {100 * value:.0f} %" for name, value in progress.items() if value < 1]
    console.overall(sum(progress.values()) / total, ", ".join(going))


class _Worker:
    """A process that carries out one job after the other."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.job: Any = None
        self.start()

    process: BaseProcess
    pipe: Connection

    def start(self) -> None:
        context = get_context("spawn")  # a fork of a process that has used threads or a GPU may hang
        self.pipe, other = context.Pipe()
        with _environment(self.share):
            self.process = context.Process(target=_work, args=(other, self.share.threads), daemon=True)
            self.process.start()
        other.close()

    def give(self, job: Job | None) -> None:
        self.job = job
        with suppress(BrokenPipeError):  # a process that has died is found when it is read
            self.pipe.send(job)

    def receive(self) -> float | str | Outcome:
        """The process's next message; its death is an outcome too."""
        try:
            message: float | str | Outcome = self.pipe.recv()
            return message
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            return Outcome("failed", f"its process ended with {how}")

    def end(self) -> None:
        """Ask for a checkpoint and an end; a second Ctrl-C while waiting ends it at once."""
        try:
            if self.process.is_alive():
                self.process.terminate() if self.job else self.pipe.close()
            self.process.join()
        except KeyboardInterrupt:
            self.process.kill()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    found = wait([worker.pipe for worker in workers if worker.job])
    return [worker for worker in workers if worker.job and worker.pipe in found]


def _work(pipe: Connection, threads: int) -> None:
    """The process: jobs come through the pipe, progress and outcomes go back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    torch.set_num_threads(threads)
    # A parent that is gone wants no result, and the run's checkpoint is kept.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, Interrupted):
        while (job := pipe.recv()) is not None:
            pipe.send(_carry_out(job, _PipeConsole(pipe)))


class _PipeConsole(Console):
    """Sends the run's fraction and its warnings to the parent, and shows nothing itself."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(quiet=True)
        self._pipe = pipe

    def labelled(self, label: str) -> Console:
        return Console(quiet=True)

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        self._pipe.send(min((epoch + 1) / epochs, 0.999))

    def warn(self, text: str) -> None:
        self._pipe.send(text)


@contextmanager
def _environment(share: Share) -> Iterator[None]:
    """The variables that a process must find when it starts: torch reads them on import."""
    wanted = {name: str(share.threads) for name in THREADS}
    if share.gpu is not None:
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        wanted["CUDA_VISIBLE_DEVICES"] = visible[share.gpu] if visible else str(share.gpu)
    old = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def ask(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
