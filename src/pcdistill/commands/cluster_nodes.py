"""The nodes of a Ray cluster: what a run gets there, whether they can carry one out, and which of them live.

Every run is of one version of pcdistill and of PyTorch, and lies where all nodes see it.
"""

import math
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pcdistill import __version__
from pcdistill.errors import InputError, first_line
from pcdistill.plain import one_line

LEAST_GPU = 0.001  # that one run may get; Ray counts in steps of a tenth of it
PROBE_SECONDS = 180.0  # in which a node must answer: it starts a process first
LOOK_SECONDS = 0.25  # between two looks at the nodes
LOST_SECONDS = 30  # without an answer, after which the head is gone; after 60 s Ray ends this process without a word

Resources = Mapping[str, float]


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
        folder: where the command was started; relative paths begin there.
        token: a file that holds its own name, in a folder that holds the runs'. A node that reads it sees that disk.
        version: of pcdistill.
        torch: version of PyTorch, without what it was built for.
    """

    threads: int
    gpus: float
    folder: Path
    token: Path
    version: str = __version__
    torch: str = version_of("torch").split("+")[0]

    def fits(self, resources: Resources) -> int:
        """How many runs a node with these resources takes at a time."""
        by_cpu = int(resources.get("CPU", 0)) // self.threads
        if self.gpus == 0:
            return by_cpu
        return min(by_cpu, int(resources.get("GPU", 0)) * math.floor(1 / self.gpus + 1e-9))


def check_gpus(gpus: float | None) -> None:
    """Raise InputError unless a run, which is one process, can use so many GPUs, and Ray can count them."""
    if gpus is not None and gpus != 0 and not LEAST_GPU <= gpus <= 1:
        raise InputError(f"--gpus-per-run must be 0, or from {LEAST_GPU:g} to 1 such as 0.5, got {gpus:g}")


def place_of(wanted: Wanted, device: str, resources: Sequence[Resources], out: Path) -> Place:
    """What each run gets on nodes with these resources.

    Args:
        wanted: by the user.
        device: the recipe's train.device.
        resources: of each node.
        out: the command's folder; it need not be there.

    Raises:
        InputError: no node has room for a run.
    """
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
    # By this name the next command in the folder clears it away if this one is killed (`clear_parts`).
    place = Place(threads, gpus, Path.cwd(), root / f".{uuid.uuid4().hex}.{os.getpid()}.tmp")
    if not any(map(place.fits, resources)):
        each = sorted({(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in resources})
        have = ", ".join(_amount(*one) for one in each)
        raise InputError(
            f"no node of the Ray cluster has {_amount(threads, gpus)} for a run (they have {have}); lower --threads "
            "or --gpus-per-run"
        )
    return place


def _amount(cpus: int, gpus: float) -> str:
    """ "2 CPUs and 0.5 GPUs"."""
    named = [f"{number:g} {name}{'' if number == 1 else 's'}" for number, name in ((cpus, "CPU"), (gpus, "GPU"))]
    return " and ".join(named if gpus else named[:1])


@contextmanager
def checked(nodes: Sequence[Mapping[str, Any]], place: Place) -> Iterator[None]:
    """Every node was asked for its versions, the folder, and the file that lies there while the block lasts.

    Args:
        nodes: as ray.nodes() describes them.
        place: what must hold there.

    Raises:
        InputError: naming the first that cannot carry out a run, and why.
    """
    place.token.write_text(place.token.name, encoding="utf-8")
    try:
        look = ray.remote(looker())
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked.append((str(node["NodeManagerAddress"]), task.remote(str(place.token), str(place.folder))))
        for name, answer in asked:
            try:
                found: dict[str, Any] = ray.get(answer, timeout=PROBE_SECONDS)
                fault = fault_of(name, found, place)
            except GetTimeoutError:
                fault = f"node {name} did not answer within {PROBE_SECONDS:g} s; `ray status` says what it does"
            except RayError as error:
                fault = f"node {name} could not be asked: {one_line(first_line(error))}"
            if fault is not None:
                raise InputError(f"--cluster: {fault}")
        yield
    finally:
        place.token.unlink(missing_ok=True)


def looker() -> Callable[[str, str], dict[str, Any]]:
    """What a node carries out to be checked. Made here, it goes there whole: pcdistill may not be there."""

    def look(token: str, folder: str) -> dict[str, Any]:
        import os
        from contextlib import suppress
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, Any] = {"version": None, "torch": None, "folder": os.path.isdir(folder), "token": False}
        with suppress(ImportError):
            from pcdistill import __version__

            found["version"] = __version__
        with suppress(PackageNotFoundError):
            found["torch"] = version("torch").split("+")[0]
        with suppress(OSError), open(token, encoding="utf-8") as file:
            found["token"] = file.read() == os.path.basename(token)
        return found

    return look


def fault_of(node: str, answer: Mapping[str, Any], place: Place) -> str | None:
    """Why a node that answered so cannot carry out a run; None if it can."""
    for name, there, here in (
        ("pcdistill", answer["version"], place.version),
        ("torch", answer["torch"], place.torch),
    ):
        if there is None:
            return f"node {node} has no {name}; install version {here} for the Python that Ray runs with"
        if there != here:
            return f"node {node} has {name} {there}, this machine {here}; install the same version everywhere"
    if not answer["token"]:
        return f"node {node} does not see {place.token.parent}; name an --out on a disk that all nodes share"
    if not answer["folder"]:
        return f"node {node} does not see {place.folder}; start the command in a folder that all nodes share"
    return None


class Nodes:
    """The nodes that live, asked for in a thread, for Ray's call stands still when the head is gone.

    Attributes:
        rooms: how many runs each living node takes.
        lost: whether the head has not answered for so long that it is gone.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.lost = place, False
        self.rooms = self._ask()
        self._over = threading.Event()
        self._unheard = 0  # seconds that this process ran, not those for which it was stopped
        main = threading.current_thread() is threading.main_thread()
        self._main = threading.main_thread().ident if main else None
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._look, self._guard)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep `rooms` and `lost` as they are while the block lasts; of a loss, SIGTERM tells the main thread."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            if not self.lost:
                for thread in self._threads:  # Ray would begin a cluster of its own if it was asked after the end
                    thread.join(5.0)

    def _ask(self) -> list[int]:
        return [room for node in ray.nodes() if node["Alive"] and (room := self.place.fits(node["Resources"]))]

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                self.rooms = self._ask()
            except RayError:  # as good as no answer
                continue
            self._unheard = 0

    def _guard(self) -> None:
        while not self._over.wait(1.0):
            self._unheard += 1
            if self._unheard > LOST_SECONDS:
                self.lost = True
                if self._main is not None:
                    signal.pthread_kill(self._main, signal.SIGTERM)
                return
