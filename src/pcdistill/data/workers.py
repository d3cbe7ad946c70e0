"""Worker processes that read ahead: started once for a data set, kept over its epochs and passes."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pcdistill.errors import InputError, PcdistillError

FEW = 1000  # images: starting processes takes longer than reading so many
MOST = 8
Task = Callable[[Any], Any]


class Workers:
    """Runs jobs in order, in processes beside this one. A task holds no state: a job's result depends on it alone.

    Passes may overlap: each has processes of its own as long as it runs; then they wait for the next pass.

    Args:
        count: processes of a pass; 0 runs jobs in this process.
        pin: results are put into page-locked memory, for the copy to a GPU.
    """

    def __init__(self, count: int = 0, *, pin: bool = False) -> None:
        self.count = count
        self.pin = pin
        self._tasks: list[Task] = []
        self._idle: list[_Pool] = []

    def add(self, task: Task) -> int:
        """Makes a task known; gives its number. An InputError in it is raised in this process."""
        self._tasks.append(task)
        self._idle.clear()  # processes that run know the earlier tasks alone
        return len(self._tasks) - 1

    def run(self, number: int, jobs: Iterable[Any]) -> Iterator[Any]:
        """Results of a task for each job, in order."""
        pool = self._idle.pop() if self._idle else self._start()
        pool.jobs.waiting = ((number, job) for job in jobs)
        well = False
        try:
            for found in pool.loader:
                if isinstance(found, _Refusal):
                    raise InputError(found.sentence)
                yield found
            well = True
        except GeneratorExit:  # left in the middle: what was read ahead is thrown away at the next start
            well = True
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "Traceback" in str(error):
                raise
            raise PcdistillError(
                f"a process that reads images has ended ({' '.join(str(error).split())}); with less memory at hand set "
                "data.workers lower"
            ) from None
        finally:
            pool.jobs.waiting = ()
            if well and pool.tasks == len(self._tasks):
                self._idle.append(pool)

    def _start(self) -> "_Pool":
        jobs = _Jobs()
        loader = DataLoader(
            _Tasks(tuple(self._tasks)),
            batch_size=None,  # a job is a whole batch
            sampler=jobs,
            num_workers=self.count,
            persistent_workers=self.count > 0,
            pin_memory=self.pin,
            worker_init_fn=_settle,
            generator=torch.Generator(),  # the default one would take a number from the global generator
        )
        return _Pool(loader, jobs, len(self._tasks))


class _Jobs:
    """A DataLoader's sampler: the jobs of the pass at hand."""

    waiting: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.waiting)


class _Pool(NamedTuple):
    """The processes of a pass, the jobs that they are given, and how many tasks they know."""

    loader: DataLoader[Any]
    jobs: _Jobs
    tasks: int


class _Tasks(Dataset[Any]):
    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self.tasks = tasks

    def __getitem__(self, job: tuple[int, Any]) -> Any:
        number, what = job
        try:
            return self.tasks[number](what)
        except InputError as error:  # errors lose their form between processes
            return _Refusal(str(error))


class _Refusal:
    def __init__(self, sentence: str) -> None:
        self.sentence = sentence


def _settle(_: int) -> None:
    """Keeps a new process's memory small, and what it decodes into."""
    gc.freeze()  # what came from the parent stays shared: a collection writes to every object that it looks at
    # Pillow gives memory back after every picture; a third of the decoding time was page faults.
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]  # of 16 MiB; Pillow's C part has no types


def choose_workers(asked: int | None, num_images: int, world_size: int) -> int:
    """Worker processes of each of `world_size` processes; None chooses by the cores and the number of images.

    Raises:
        InputError: a negative number.
    """
    if asked is not None:
        if asked < 0:
            raise InputError(f"data.workers must be 0 or more, got {asked}")
        return asked
    if num_images < FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores // world_size)
