"""Runs on a Ray cluster: each is a task with a share of a node, and what a dead node leaves goes on elsewhere.

The nodes have pcdistill of one version and see the run's folder under one path; both are checked before anything is
trained. A run is the same function in the same folder as with `--jobs`, so its result is the same.
"""

import asyncio
import io
import logging
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pcdistill import __version__
from pcdistill.commands.claim import wait_until_free
from pcdistill.commands.jobs import (
    At,
    Job,
    JobConsole,
    Judge,
    Outcome,
    Progress,
    Terminated,
    carry_out_job,
    check_numbers,
    sigterm_as_interrupt,
)
from pcdistill.engine.console import LOG, Console
from pcdistill.engine.loop import Interrupted
from pcdistill.errors import InputError, PcdistillError
from pcdistill.plain import one_line

DEATHS = 3  # of a run's process, one after the other without progress, after which it has failed
LEAST_GPU = 0.001  # that one run may get; Ray counts in steps of a tenth of it
LOOK_SECONDS = 0.25  # between two looks at what the runs tell
PROBE_SECONDS = 180.0  # in which a node must answer: it starts a process first
LOCK_SECONDS = 120.0  # for which a shared disk may keep the lock of a dead node; NFS's lease is 90 s
END_SECONDS = 120.0  # in which runs that were asked to end write their checkpoints


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        address: "auto", or HOST:PORT of the cluster's head.
        threads: CPUs of each run; None: a GPU's part of its node's, or 1.
        gpus: of each run, at most 1; None: 1 where there are any.
    """

    address: str
    threads: int | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Place:
    """What each run gets, and what must hold where it goes.

    Attributes:
        threads: CPUs.
        gpus: part of a GPU.
        version: of pcdistill.
        folder: where the command was started; relative paths begin there.
        root: a folder that holds the runs', and is there already.
    """

    threads: int
    gpus: float
    version: str
    folder: Path
    root: Path

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many runs a node with these resources takes at a time."""
        by_cpu = int(resources.get("CPU", 0)) // self.threads
        if self.gpus == 0:
            return by_cpu
        return min(by_cpu, int(resources.get("GPU", 0)) * math.floor(1 / self.gpus + 1e-9))


@contextmanager
def connected(wanted: Wanted, device: str, out: Path) -> Iterator["Cluster"]:
    """A cluster whose nodes were checked, while the block lasts.

    Args:
        wanted: which, and what each run gets.
        device: the recipe's train.device.
        out: the command's folder; it need not be there.

    Raises:
        InputError: no cluster answers, no node has room for a run, or one cannot carry it out, and why.
    """
    check_numbers("auto", wanted.threads)
    _check_gpus(wanted.gpus)
    with _joined(wanted.address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        place = _place(wanted, device, [node["Resources"] for node in nodes], out)
        fitting = [node for node in nodes if place.fits(node["Resources"])]
        if not fitting:
            raise InputError(
                f"no node of the Ray cluster has {place.threads} CPUs and {place.gpus:g} GPUs for a run; lower "
                "--threads or --gpus-per-run"
            )
        _check_nodes(fitting, place)
        yield Cluster(place)


class Cluster:
    """The cluster that this process is connected to, as a pool of runs.

    Args:
        place: what each run gets.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    def described(self) -> str:
        """How many runs go at a time, in words."""
        rooms = [room for room in self._rooms() if room]
        threads, gpus = self.place.threads, self.place.gpus
        each = f"{threads} thread{'s' if threads > 1 else ''}" + (f" and {gpus:g} GPU" if gpus else "")
        return f"{sum(rooms)} at a time on {len(rooms)} node{'s' if len(rooms) > 1 else ''} of Ray, {each} each"

    def run(
        self, jobs: Iterable[Job], *, console: Console, total: int | None = None, judge: Judge | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """As :func:`pcdistill.commands.jobs.run_jobs`. A run whose node dies goes on from its last checkpoint.

        Raises:
            Interrupted: stopped by a signal; the same call continues.
            PcdistillError: the cluster is gone.
        """
        shown = Progress(console, len(jobs) if isinstance(jobs, Sequence) else total or 1)
        waiting: Iterator[Job] | None = iter(jobs)
        tasks = _Tasks(self.place, shown, judge)
        try:
            with sigterm_as_interrupt():
                while waiting or tasks.going:
                    if waiting and len(tasks.going) < sum(self._rooms()):
                        job = next(waiting, None)
                        if job is None:
                            waiting = None
                        else:
                            tasks.begin(_Run(job))
                        continue
                    yield from tasks.ended()
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise Interrupted(
                "interrupted; the runs under way have checkpoints: the same command continues", number
            ) from None
        except RayError as error:
            raise PcdistillError(
                f"the Ray cluster does not answer any more ({_first_line(error)}); when it does, the same command "
                "continues"
            ) from error
        finally:
            tasks.end()
            console.close()

    def _rooms(self) -> list[int]:
        """How many runs each living node takes; nodes come and go."""
        return [self.place.fits(node["Resources"]) for node in ray.nodes() if node["Alive"]]


@dataclass
class _Run:
    """A job under way.

    Attributes:
        job: what is to be done.
        number: of the processes that it had before; what those still tell is not heard.
        deaths: the last of these that made no progress.
        reached: the fraction of its length that any of them told of.
        before: as far as it was when the last one died.
        node: where it trains, once it has told.
    """

    job: Job
    number: int = 0
    deaths: int = 0
    reached: float = 0.0
    before: float = 0.0
    node: str = ""


class _Tasks:
    """The tasks under way, what they tell, and how they end."""

    def __init__(self, place: Place, shown: Progress, judge: Judge | None) -> None:
        self.place, self.shown, self.judge = place, shown, judge
        self.going: dict[Any, _Run] = {}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
        options: dict[str, Any] = {"num_cpus": place.threads, "num_gpus": place.gpus}
        # A run that dies is begun again here, where it can be told, and counted.
        self.task = ray.remote(_there).options(max_retries=0, scheduling_strategy="SPREAD", **options)

    def begin(self, run: _Run) -> None:
        """Give a run to the cluster, which begins it when a node has room."""
        self.going[self.task.remote(run.job, run.number, self.place, self.board)] = run

    def ended(self) -> Iterator[tuple[Job, Outcome]]:
        """Wait a little; hear what was told; the runs that have ended."""
        ended: list[Any] = []
        if self.going:
            ended, _ = ray.wait(list(self.going), timeout=LOOK_SECONDS)
        else:
            self.shown.console.warn_once("no node of the Ray cluster has room for a run; waiting for one")
            time.sleep(LOOK_SECONDS)
        for message in ray.get(self.board.take.remote()):
            self._hear(*message)
        for task in ended:
            run = self.going.pop(task)
            outcome = self._outcome(task, run)
            if outcome is None:
                self.begin(run)
                continue
            self.shown.draw(run.job, 1.0)
            yield run.job, outcome

    def end(self) -> None:
        """Ask all that are under way for a checkpoint and an end; a second Ctrl-C while waiting ends them at once.

        One that trains finds the board closed. Others are cancelled, which raises KeyboardInterrupt in them: they
        wait for a node, or have trained nothing yet.
        """
        if not self.going:
            return
        with suppress(RayError):
            self.board.close.remote()
            try:
                for task, run in self.going.items():
                    if not run.node:
                        ray.cancel(task)
                ray.wait(list(self.going), num_returns=len(self.going), timeout=END_SECONDS)
            except KeyboardInterrupt:
                for task in self.going:
                    ray.cancel(task, force=True)

    def _hear(self, name: str, number: int, message: At | str | dict[str, float]) -> None:
        run = next((run for run in self.going.values() if (run.job.name, run.number) == (name, number)), None)
        if run is None:
            return
        if isinstance(message, At):
            run.reached = max(run.reached, message.fraction)
            run.node = message.node
            self.shown.draw(run.job, message.fraction, f"{message.text}, {message.node}")
        elif isinstance(message, str):
            self.shown.console.warn(f"{name}: {message}")
        else:
            go_on = self.judge is None or self.judge(run.job, message)
            self.board.answer.remote(name, number, go_on)

    def _outcome(self, task: Any, run: _Run) -> Outcome | None:
        """How a task ended; None if its process died, and it is to be begun again."""
        why = "its process was asked to end"
        try:
            found: Outcome | None = ray.get(task)
            if found is not None:
                return found
        except RayTaskError as error:
            return Outcome("failed", one_line(str(error.cause if error.cause is not None else error)))
        except NodeDiedError:
            why = "its node died"
        except OutOfMemoryError:
            why = "its node was out of memory"
        except WorkerCrashedError:
            why = "its process died"
        run.deaths = 1 if run.reached > run.before else run.deaths + 1
        run.before = run.reached
        run.number += 1
        where = f" ({run.node})" if run.node else ""
        if run.deaths > DEATHS:
            return Outcome("failed", f"{why}{where}, {run.deaths} times without progress")
        self.shown.console.warn(f"{run.job.name}: {why}{where}; it goes on from its last checkpoint")
        return None


class _Board:
    """An actor beside the command: what runs tell it, and what it answers."""

    def __init__(self) -> None:
        self._told: list[tuple[str, int, Any]] = []
        self._asked: dict[tuple[str, int], asyncio.Future[bool]] = {}
        self._closed = False

    async def tell(self, name: str, number: int, message: Any) -> bool:
        """Keep a message; whether the run is to end."""
        self._told.append((name, number, message))
        return self._closed

    async def ask(self, name: str, number: int, row: dict[str, float]) -> bool:
        """Whether to go on after an epoch with this row."""
        if self._closed:
            return False
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked[name, number] = future
        self._told.append((name, number, row))
        return await future

    async def take(self) -> list[tuple[str, int, Any]]:
        """What was told since the last time."""
        told, self._told = self._told, []
        return told

    async def answer(self, name: str, number: int, go_on: bool) -> None:
        future = self._asked.pop((name, number), None)
        if future is not None:
            future.set_result(go_on)

    async def close(self) -> None:
        """Nothing goes on any more."""
        self._closed = True
        for name, number in list(self._asked):
            await self.answer(name, number, False)


def _there(job: Job, number: int, place: Place, board: Any) -> Outcome | None:
    """In a process of a node: the run, from its checkpoint if it has one; None if it was asked to end."""
    node = ray.util.get_node_ip_address()
    fault = _fault(node, {"version": __version__, "folder": place.folder.is_dir(), "root": place.root.is_dir()}, place)
    if fault is not None:  # the node came after the others were checked
        return Outcome("failed", fault)
    os.chdir(place.folder)
    torch.set_num_threads(place.threads)
    if number:
        wait_until_free(job.out, LOCK_SECONDS)

    last: list[Any] = []  # the answer to what was told last

    def tell(at: At) -> None:
        """Only training tells, so the signal finds its loop, which writes a checkpoint and ends."""
        if last and ray.wait(last, timeout=0)[0] and ray.get(last.pop()):
            signal.raise_signal(signal.SIGTERM)
        last[:] = [board.tell.remote(job.name, number, at._replace(node=node))]

    def warn(text: str) -> None:
        ray.get(board.tell.remote(job.name, number, text))  # heard before the run ends

    def go_on(row: dict[str, float]) -> bool:
        answer: bool = ray.get(board.ask.remote(job.name, number, row))
        return answer

    try:
        return carry_out_job(job, JobConsole(tell, warn), go_on)
    except Interrupted:
        return None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Connected to the cluster; signals are afterwards as they were, and what Ray prints goes to the log.

    Raises:
        InputError: none answers.
    """
    _check_address(address)
    main = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(_ToLog()):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, namespace="pcdistill")
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise InputError(
                f"--cluster {address}: no Ray cluster answers ({_first_line(error)}); start one with `ray start "
                "--head`, and run the command on one of its machines"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
            if main:
                signal.signal(signal.SIGTERM, old)


class _ToLog(io.TextIOBase):
    """Takes what Ray prints of dying nodes, between the lines of a result, to the log."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            LOG.debug(text.rstrip())
        return len(text)


def _check_address(address: str) -> None:
    """Raise InputError unless it is auto, or something listens there: Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise InputError(f"--cluster must be auto or HOST:PORT of the cluster's head, got {address}")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"--cluster {address}: nothing answers there ({error}); `ray status` names the head") from None


def _check_gpus(gpus: float | None) -> None:
    """Raise InputError unless a run, which is one process, can use so many GPUs, and Ray can count them."""
    if gpus is not None and gpus != 0 and not LEAST_GPU <= gpus <= 1:
        raise InputError(f"--gpus-per-run must be 0, or from {LEAST_GPU:g} to 1 such as 0.5, got {gpus:g}")


def _place(wanted: Wanted, device: str, resources: Sequence[Mapping[str, float]], out: Path) -> Place:
    """What each run gets on nodes with these resources."""
    with_gpus = [one for one in resources if one.get("GPU", 0) > 0]
    gpus = wanted.gpus
    if gpus is None:
        gpus = 1.0 if device == "cuda" or (device == "auto" and with_gpus) else 0.0
    threads = wanted.threads
    if threads is None:
        shares = [one.get("CPU", 0) / one["GPU"] * gpus for one in with_gpus if gpus]
        threads = max(1, math.floor(min(shares, default=1) + 1e-9))
    there = out.absolute()
    root = next(path for path in (there, *there.parents) if path.is_dir())
    return Place(threads, gpus, __version__, Path.cwd(), root)


def _check_nodes(nodes: Sequence[Mapping[str, Any]], place: Place) -> None:
    """Ask every node whether it has this pcdistill, the folder, and in it a file that is written now.

    Raises:
        InputError: naming the first that has not.
    """
    token = place.root / f".{uuid.uuid4().hex}.tmp"
    token.write_text(token.name, encoding="utf-8")
    look = ray.remote(_look())
    try:
        asked: dict[str, Any] = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[str(node["NodeManagerAddress"])] = task.remote(str(token), str(place.folder))
        for name, answer in asked.items():
            try:
                found: dict[str, Any] = ray.get(answer, timeout=PROBE_SECONDS)
                fault = _fault(name, found, place)
            except GetTimeoutError:
                fault = f"node {name} did not answer within {PROBE_SECONDS:g} s; `ray status` says what it does"
            except RayError as error:
                fault = f"node {name} could not be asked: {_first_line(error)}"
            if fault is not None:
                raise InputError(f"--cluster: {fault}")
    finally:
        token.unlink(missing_ok=True)


def _look() -> Callable[[str, str], dict[str, Any]]:
    """What a node carries out to be checked. Made here, it goes there whole: pcdistill may not be there."""

    def look(token: str, folder: str) -> dict[str, Any]:
        import os
        from contextlib import suppress

        version: str | None = None
        with suppress(ImportError):
            from pcdistill import __version__ as version
        try:
            with open(token, encoding="utf-8") as file:
                root = file.read() == os.path.basename(token)
        except OSError:
            root = False
        return {"version": version, "folder": os.path.isdir(folder), "root": root}

    return look


def _fault(node: str, answer: Mapping[str, Any], place: Place) -> str | None:
    """Why a node that answered so cannot carry out a run; None if it can."""
    if answer["version"] is None:
        return f"node {node} has no pcdistill; install version {place.version} for the Python that Ray runs with"
    if answer["version"] != place.version:
        return (
            f"node {node} has pcdistill {answer['version']}, this machine {place.version}; install the same version "
            "everywhere"
        )
    if not answer["root"]:
        return f"node {node} does not see {place.root}; name an --out on a disk that all nodes share"
    if not answer["folder"]:
        return f"node {node} does not see {place.folder}; start the command in a folder that all nodes share"
    return None


def _first_line(error: BaseException) -> str:
    return one_line(str(error).strip().split("\n", 1)[0]) or type(error).__name__
