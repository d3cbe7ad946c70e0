"""Runs on a Ray cluster: each is a task with a share of a node, and what a dead node leaves goes on elsewhere.

The nodes have pcdistill of one version and see the run's folder under one path; both are checked before anything is
trained. A run is the same function in the same folder as with `--jobs`, so its result is the same.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pcdistill.commands.claim import wait_until_free
from pcdistill.commands.cluster_head import joined
from pcdistill.commands.cluster_nodes import (
    LOOK_SECONDS,
    LOST_SECONDS,
    Nodes,
    Place,
    Wanted,
    check_gpus,
    checked,
    fault_of,
    looker,
    place_of,
)
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
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Interrupted
from pcdistill.errors import PcdistillError
from pcdistill.plain import one_line

DEATHS = 3  # of a run's process, one after the other without progress, after which it has failed
LOCK_SECONDS = 120.0  # for which a shared disk may keep the lock of a dead node; NFS's lease is 90 s
END_SECONDS = 120.0  # in which runs that were asked to end write their checkpoints
LOST_END_SECONDS = 15.0  # the same where the head is gone, and Ray soon ends everything


@contextmanager
def connected(wanted: Wanted, device: str, out: Path) -> Iterator["Cluster"]:
    """A cluster whose nodes were checked, while the block lasts.

    Args:
        wanted: which, and what each run gets.
        device: the recipe's train.device.
        out: the command's folder; it need not be there.

    Raises:
        InputError: no cluster answers, no node has room for a run, or one cannot carry it out, and why.
        PcdistillError: in the middle the head is gone.
        Interrupted: by SIGTERM.
    """
    check_numbers("auto", wanted.threads)
    check_gpus(wanted.gpus)
    with joined(wanted.address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        place = place_of(wanted, device, [node["Resources"] for node in nodes], out)
        living = Nodes(place)
        try:
            with (
                sigterm_as_interrupt(),
                living.watched(),
                checked([node for node in nodes if place.fits(node["Resources"])], place),
            ):
                yield Cluster(place, living)
        except (KeyboardInterrupt, Interrupted) as stop:
            if living.lost:
                raise PcdistillError(
                    f"the Ray cluster does not answer any more (its head, for {LOST_SECONDS} s); the same command "
                    "continues, on another cluster too"
                ) from None
            if isinstance(stop, Terminated):
                raise Interrupted("interrupted; the same command continues", signal.SIGTERM) from None
            raise


class Cluster:
    """The cluster that this process is connected to, as a pool of runs.

    Args:
        place: what each run gets.
        nodes: those that live.
    """

    def __init__(self, place: Place, nodes: Nodes) -> None:
        self.place, self.nodes = place, nodes

    @property
    def described(self) -> str:
        """How many runs go at a time, in words."""
        rooms = self.nodes.rooms
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
        gone = False
        try:
            with sigterm_as_interrupt():
                while waiting or tasks.going:
                    if waiting and len(tasks.going) < sum(self.nodes.rooms):
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
            gone = True
            raise PcdistillError(
                f"the Ray cluster does not answer any more ({type(error).__name__}); the same command continues, "
                "on another cluster too"
            ) from error
        finally:
            tasks.end(LOST_END_SECONDS if gone or self.nodes.lost else END_SECONDS)
            console.close()


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

    def end(self, seconds: float) -> None:
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
                ray.wait(list(self.going), num_returns=len(self.going), timeout=seconds)
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
    fault = fault_of(node, looker()(str(place.token), str(place.folder)), place)
    if fault is not None:  # the node came after the others were checked
        return Outcome("failed", fault)
    os.chdir(place.folder)
    torch.set_num_threads(place.threads)
    if place.gpus == 0:  # which Ray leaves open, and then all runs would meet on the first
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
