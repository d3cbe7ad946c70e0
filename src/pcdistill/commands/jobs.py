"""Runs side by side on one machine: one process for each run at a time, a GPU or a fixed share of the cores for each.

A run's result does not depend on what goes beside it: each has a process, a number of threads and random generators of
its own. On a CPU it does depend, in rounding, on the number of threads, which result.json records.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TextIO

import torch

from pcdistill.commands.claim import claimed, several
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Interrupted
from pcdistill.errors import InputError, PcdistillError, TrainingStopped, os_sentence
from pcdistill.recipe import Recipe

TELL_SECONDS = 0.5  # between two looks into a run
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One run to carry out.

    Attributes:
        name: for progress lines, unique among the jobs.
        recipe: what to do.
        out: the run's folder.
        command: what the user typed, for the record.
        trial: only to be trained, and judged after every epoch; what it did is told by its history alone.
        role: what the trained model is to be, as :class:`pcdistill.commands.session.Session` takes it.
        threads: of this run, in the place of its share's.
    """

    name: str
    recipe: Recipe
    out: Path
    command: str | None = None
    trial: bool = False
    role: Literal["student", "teacher"] = "student"
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: "done"; "stopped" by itself, as when it diverges; "failed" by wrong input or a fault; "refused" by the
            operating system, as when the disk is full; "abandoned", a trial that was judged not worth going on with.
        text: why, where it is not done.
        summary: what result.json holds, where it was written; of a trial, its rows as "history".
    """

    status: Literal["done", "stopped", "failed", "refused", "abandoned"]
    text: str = ""
    summary: dict[str, Any] | None = None


@dataclass(frozen=True)
class Share:
    """What one process gets: threads, and a GPU by its position among the visible ones (None: as the parent sees)."""

    threads: int
    gpu: int | None = None


def check_numbers(jobs: int | Literal["auto"], threads: int | None) -> None:
    """Raise InputError unless there are runs at a time, as this process can have, and threads of each run."""
    if jobs != "auto" and jobs < 1:
        raise InputError(f"--jobs must be auto or at least 1, got {jobs}")
    if jobs not in ("auto", 1) and several() > 1:
        raise InputError(
            f"--jobs {jobs} is several runs at a time, and each run takes all {several()} processes that were started; "
            "leave --jobs out, or start one process"
        )
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")


def shares(jobs: int | Literal["auto"], runs: int, *, threads: int | None = None, device: str = "auto") -> list[Share]:
    """How the machine is divided. Several processes of one run are one share: each run takes all of them.

    Args:
        jobs: runs at a time; "auto" is one for each GPU, else as many as there are cores for `threads`.
        runs: how many there are; no more shares are made.
        threads: of each run; None divides the cores among the runs.
        device: the recipe's train.device; GPUs are used unless it is "cpu".

    Raises:
        InputError: numbers below 1, or several runs at a time by several processes.
    """
    check_numbers(jobs, threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if several() > 1:
        return [Share(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))]
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    wanted = (gpus or max(1, cores // (threads or 1))) if jobs == "auto" else jobs
    count = max(1, min(wanted, runs))
    each = threads or max(1, cores // count)
    return [Share(each, i % gpus if gpus > 1 else None) for i in range(count)]


Judge = Callable[[Job, dict[str, float]], bool]


class Pool(Protocol):
    """Where the runs of a command are carried out."""

    @property
    def described(self) -> str:
        """How many go at a time, in words."""
        ...

    def run(
        self, jobs: Iterable[Job], *, console: Console, total: int | None = None, judge: Judge | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """As :func:`run_jobs`."""
        ...


@dataclass(frozen=True)
class Machine:
    """This machine, divided by :func:`shares`."""

    places: Sequence[Share]

    @property
    def described(self) -> str:
        """How many runs go at a time, in words."""
        threads = self.places[0].threads
        return f"{len(self.places)} at a time, {threads} thread{'s' if threads > 1 else ''} each"

    def run(
        self, jobs: Iterable[Job | None], *, console: Console, total: int | None = None, judge: Judge | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """As :func:`run_jobs`."""
        return run_jobs(jobs, self.places, console=console, total=total, judge=judge)


class SideBySide(Protocol):
    """What a plan says of how its runs are carried out."""

    @property
    def jobs(self) -> int | Literal["auto"]: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def pool(self) -> Pool | None: ...


def pool_of(plan: SideBySide, runs: int, device: str) -> Pool:
    """The plan's own pool, else this machine, divided for so many runs: with the done ones, all get equal threads."""
    return plan.pool or Machine(shares(plan.jobs, runs, threads=plan.threads, device=device))


def run_jobs(
    jobs: Iterable[Job | None],
    places: Sequence[Share],
    *,
    console: Console,
    total: int | None = None,
    judge: Judge | None = None,
) -> Iterator[tuple[Job, Outcome]]:
    """Carry out jobs, as many at a time as there are places; each is yielded when it ends, in order of ending.

    A job that fails does not end the others. Ctrl-C and SIGTERM end all of them after their next checkpoint.

    Args:
        jobs: in the order in which they are begun. Each is asked for when a place is free, after what was yielded
            before was dealt with: a job may depend on the outcomes so far. None in a job's place says that none can
            begin before one that is under way has ended.
        places: from :func:`shares`.
        console: progress of all.
        total: how many jobs there are, for the progress; by default the length of `jobs`.
        judge: of a trial, takes the job and every epoch's row, and says whether to go on.

    Raises:
        Interrupted: stopped by a signal; the same call continues.
    """
    whole = len(jobs) if isinstance(jobs, Sequence) else total or 1
    places = places[: max(1, whole)]
    shown = Progress(console, whole)
    if len(places) == 1 and places[0].gpu is None:
        yield from _one_by_one(jobs, places[0], shown, judge)
        return
    waiting = iter(jobs)
    workers: list[_Worker] = []
    try:
        with sigterm_as_interrupt():
            for place in places:
                workers.append(_Worker(place))
            _hand_out(workers, waiting)
            while any(worker.job for worker in workers):
                for worker in _ready(workers):
                    job, message = worker.job, worker.receive()
                    if isinstance(message, At):
                        shown.draw(job, message.fraction, message.text)
                    elif isinstance(message, str):
                        console.warn(f"{job.name}: {message}")
                    elif isinstance(message, dict):
                        worker.answer(judge is None or judge(job, message))
                    else:
                        shown.draw(job, 1.0)
                        if not worker.process.is_alive():
                            worker.start()
                        worker.job = None
                        yield job, message
                        _hand_out(workers, waiting)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise Interrupted(
            "interrupted; the runs under way have checkpoints: the same command continues", number
        ) from None
    finally:
        for worker in workers:
            worker.end()
        console.close()


class Terminated(KeyboardInterrupt):
    """SIGTERM, in the place of Ctrl-C."""


class Abandoned(Exception):
    """A trial that its judge gave up."""


def _hand_out(workers: "Sequence[_Worker]", waiting: Iterator[Job | None]) -> None:
    """The next jobs to all who have none, and an end where there are no more."""
    for worker in workers:
        if worker.job is None:
            try:
                job = next(waiting)
            except StopIteration:
                worker.give(None)
                continue
            if job is None:
                return
            worker.give(job)


@contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """So many within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_by_one(
    jobs: Iterable[Job | None], share: Share, shown: "Progress", judge: Judge | None
) -> Iterator[tuple[Job, Outcome]]:
    """In this process: another would only cost its start."""
    try:
        for job in jobs:
            assert job is not None  # nothing is under way that could be waited for
            go_on: Callable[[dict[str, float]], bool] = partial(judge, job) if judge else lambda row: True
            with threads_of_torch(job.threads or share.threads):
                outcome = carry_out_job(job, _here_console(shown, job), go_on)
            shown.draw(job, 1.0)
            yield job, outcome
    finally:
        shown.console.close()


def carry_out_job(job: Job, console: Console, go_on: Callable[[dict[str, float]], bool]) -> Outcome:
    """A run, and how it ended; `go_on` is asked after every epoch of a trial.

    Raises:
        Interrupted: stopped by a signal.
    """
    from pcdistill.commands.run import run_with_report

    try:
        if job.trial:
            return Outcome("done", summary={"history": _train_only(job, console, go_on)})
        found = run_with_report(job.recipe, job.out, console=console, command=job.command, role=job.role)
        return Outcome("done", summary=found.summary)
    except Abandoned:
        return Outcome("abandoned")
    except TrainingStopped as stop:
        return Outcome("stopped", str(stop))
    except (Interrupted, BrokenPipeError, ConnectionResetError, EOFError):
        raise
    except PcdistillError as error:
        return Outcome("failed", str(error))
    except OSError as error:
        return Outcome("refused", os_sentence(error))
    except Exception as error:  # a fault of one run must not end the others
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")


def _train_only(job: Job, console: Console, go_on: Callable[[dict[str, float]], bool]) -> list[dict[str, float]]:
    """A trial's rows. It is never concluded, and only that step looks at the test set.

    Raises:
        Abandoned: an epoch's answer was not to go on; its checkpoint is there.
    """
    from pcdistill.commands.session import Session

    def track(row: dict[str, float], step: int) -> None:
        if not go_on(row):
            raise Abandoned

    session = Session(job.recipe, job.out, console=console, command=job.command, trackers=(track,))
    with claimed(job.out, "run", job.recipe):
        session.prepare()
        session.train()
    return session.fit.history


class Progress:
    """The bar of all jobs; its console is the command's."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.done: dict[str, tuple[float, str]] = {}

    def draw(self, job: Job, fraction: float, text: str = "") -> None:
        """A job is at this fraction of its length, 1 when it has ended."""
        self.done[job.name] = fraction, text
        going = {name: at for name, at in self.done.items() if at[0] < 1}
        ended = len(self.done) - len(going)
        whole = sum(fraction for fraction, _ in self.done.values()) / self.total
        self.console.overall(whole, f"{ended} of {self.total} runs", going)


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
        with environment_of(self.share):
            self.process = context.Process(target=_work, args=(other, self.share.threads), daemon=True)
            self.process.start()
        other.close()

    def give(self, job: Job | None) -> None:
        self.job = job
        with suppress(BrokenPipeError, ConnectionResetError):  # one that has died is found when it is read
            self.pipe.send(job)

    def answer(self, go_on: bool) -> None:
        """To the row of an epoch, for which a trial waits."""
        with suppress(BrokenPipeError):
            self.pipe.send(go_on)

    def receive(self) -> "At | str | dict[str, float] | Outcome":
        """The process's next message; its death is an outcome too."""
        try:
            message: At | str | dict[str, float] | Outcome = self.pipe.recv()
            return message
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            return Outcome("failed", f"its process ended with {how}")

    def end(self) -> None:
        """Ask for a checkpoint and an end; a second Ctrl-C while waiting ends it at once."""
        try:
            if self.process.is_alive() and self.job:
                self.process.terminate()
            self.pipe.close()  # a trial that waits for an answer gets none
            self.process.join()
        except KeyboardInterrupt:
            self.process.kill()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    found = wait([worker.pipe for worker in workers if worker.job])
    return [worker for worker in workers if worker.job and worker.pipe in found]


def _work(pipe: Connection, threads: int) -> None:
    """The process: jobs come through the pipe, progress and outcomes go back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    # A parent that is gone wants no result, and the run's checkpoint is kept.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, Interrupted):
        while (job := pipe.recv()) is not None:
            torch.set_num_threads(job.threads or threads)
            pipe.send(carry_out_job(job, JobConsole(pipe.send, pipe.send), partial(_ask, pipe)))


def _ask(pipe: Connection, row: dict[str, float]) -> bool:
    pipe.send(row)
    answer: bool = pipe.recv()
    return answer


class At(NamedTuple):
    """Where a run is: fraction of its length, in words, and the node that it is on, where there are several."""

    fraction: float
    text: str
    node: str = ""


class JobConsole(Console):
    """Tells where the run is, as one of many, and its warnings; shows nothing itself."""

    def __init__(self, tell: Callable[[At], None], warn: Callable[[str], None], stream: TextIO | None = None) -> None:
        super().__init__(quiet=True, stream=stream)
        self._tell, self._warn = tell, warn
        self._told = 0.0

    def labelled(self, label: str) -> Console:
        return Console(quiet=True, stream=self.stream)

    def step(self, epoch: int, epochs: int, batch: int, batches: int) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            fraction = (epoch + batch / max(batches, 1)) / epochs
            self._tell(At(min(fraction, 0.999), f"epoch {epoch + 1}/{epochs}, {batch}/{batches}"))

    def epoch(self, epoch: int, epochs: int, text: str) -> None:
        self._tell(At(min((epoch + 1) / epochs, 0.999), f"epoch {epoch + 1}/{epochs}"))

    def warn(self, text: str) -> None:
        self._warn(text)


def _here_console(shown: Progress, job: Job) -> Console:
    """Of a run in this process."""
    return JobConsole(lambda at: shown.draw(job, at.fraction, at.text), shown.console.warn, shown.console.stream)


@contextmanager
def environment_of(share: Share) -> Iterator[None]:
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
def sigterm_as_interrupt() -> Iterator[None]:
    def ask(number: int, frame: Any) -> None:
        raise Terminated

    try:
        old = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
