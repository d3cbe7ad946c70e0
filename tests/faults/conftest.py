"""Finished runs that the fault injection starts from, made once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import COMMON, command, essence, write_data
from tests.faults.system import Points, injected


@dataclass
class World:
    """Tiny commands by name, and what each leaves when nothing happens.

    Attributes:
        root: where the inputs lie.
        commands: name -> folder of the run -> arguments.
        whole: name -> the essence of a run that nothing disturbed.
        points: name -> its calls that change the folder, in order.
        folders: name -> the folder of that run.
    """

    root: Path
    commands: dict[str, Callable[[Path], list[str]]]
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def made(self, name: str) -> "World":
        """This world, with the undisturbed run of a command in it."""
        if name not in self.whole:
            out = self.root / name
            with injected(Points(out)) as points:
                answer = command(*self.commands[name](out))
            assert answer.code == 0, answer.told
            self.whole[name], self.points[name], self.folders[name] = essence(out), points.seen, out
        return self

    def places(self, name: str) -> list[int]:
        """Numbers of calls, from 1: of equal ones in a row the first, and one in their middle."""
        seen = self.made(name).points[name]
        starts = [i for i, call in enumerate(seen) if i == 0 or call != seen[i - 1]]
        ends = [*starts[1:], len(seen)]
        return sorted(
            {place + 1 for start, end in zip(starts, ends, strict=True) for place in (start, (start + end) // 2)}
        )


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The world of all fault injections. Plots, half of a tiny run's time, are empty: their drawing writes nothing."""
    root, patch = tmp_path_factory.mktemp("world"), pytest.MonkeyPatch()
    patch.setattr("pcdistill.report.plots._svg", lambda *args, **named: "<svg></svg>")
    torch.set_num_threads(1)
    data, weights = str(write_data(root / "data.npz")), str(root / "train" / "student.safetensors")
    own = ["--data", data, "--epochs", "2", *COMMON]
    teacher = ["--teacher", "cifar/resnet8", "--teacher-weights", weights]
    student = ["--student", "cifar/resnet8"]
    made = World(
        root,
        {
            "train": lambda out: ["train", "--model", "cifar/resnet8", *own, "--out", str(out)],
            "distill": lambda out: [
                *("distill", "--teacher", "cifar/resnet8", "--teacher-epochs", "1", *student, *own),
                *("--out", str(out)),
            ],
            "cache": lambda out: ["cache", *teacher, *own, "--out", str(out)],
            "replay": lambda out: [
                *("distill", "--method", "kd", *teacher, *student, *own, "--teacher-cache", str(root / "cache")),
                *("--out", str(out)),
            ],
            "compare": lambda out: [
                *("compare", "--methods", "none,kd", "--seeds", "1", "--jobs", "1", *teacher, *student, *own),
                *("--out", str(out)),
            ],
        },
    )
    for name in ("train", "cache"):
        made.made(name)
    yield made
    patch.undo()
