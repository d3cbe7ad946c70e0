"""Two processes (gloo, on the CPU) with passed modules and loaders: nothing twice, no hang, one sentence."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import PATIENCE, environment, program

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys, warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import pcdistill
from accelerate import PartialState
from pcdistill.errors import PcdistillError

warnings.simplefilter("ignore")
torch.set_num_threads(1)
CASES, OUT = sys.argv[1].split(","), Path(sys.argv[2])
CASE = ""
rank = PartialState(cpu=True).process_index


class Images(Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.target = torch.arange(n) % 4
        self.pixels = torch.randn(n, 1, 4, 4, generator=g)
        self.pixels[torch.arange(n), 0, self.target] += 3.0
        self.seen = []

    def __len__(self):
        return len(self.target)

    def __getitem__(self, i):
        if CASE == "loader raises" and rank == 1 and len(self.seen) == 150:
            raise OSError("the disk of this process has gone")
        self.seen.append(i)
        return self.pixels[i], self.target[i]


class Net(nn.Module):
    def __init__(self, width, spare=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
        if spare:
            self.spare = nn.Linear(3, 3)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if CASE == "student raises" and rank == 1 and self.steps > 9:
            raise RuntimeError("the student of this process fails")
        return self.layers(x)


def run(case):
    train, val = Images(200, 0), Images(64, 1)
    torch.manual_seed(0)
    teacher = Net(32)
    for _ in range(150):
        loss = nn.functional.cross_entropy(teacher(train.pixels), train.target)
        gradients = torch.autograd.grad(loss, list(teacher.parameters()))
        with torch.no_grad():
            for p, g in zip(teacher.parameters(), gradients):
                p -= 0.3 * g
    teacher.steps = 0
    torch.manual_seed(1)
    student = Net(8, spare=CASE.startswith("unused"))
    loader = DataLoader(train, 10, shuffle=True)
    options = {"method": "kd", "epochs": 2, "lr": 0.02}
    if CASE.startswith("unused"):
        options["method"] = CASE.split()[1]
        if options["method"] == "pcd":
            options["losses"] = [{"method": "ce"}, {"method": "pcd", "stages": 2}]
    if CASE == "uneven":
        loader = DataLoader(TensorDataset(train.pixels[: 100 - 50 * rank], train.target[: 100 - 50 * rank]), 10)
        loader.is_split = True
    if CASE == "label":
        train.target += 4 * rank
    if CASE == "list":
        loader = list(loader)
    if CASE == "sampler":
        loader = DataLoader(train, 10, sampler=DistributedSampler(train, 2, rank))
    if CASE == "few":
        loader = DataLoader(train, 200)
    try:
        data = {"train": loader, "val": DataLoader(val, 10)}
        found = pcdistill.distill(teacher=teacher, student=student, **data, verbose=False, **options)
        weights = [p.detach().flatten()[:3].tolist() for p in student.parameters()]
        result = {"rows": found.history, "seen": train.seen, "val": val.seen, "weights": weights}
    except PcdistillError as error:
        result = {"error": str(error)}
    (OUT / f"{case}-{rank}.json").write_text(json.dumps(result))
    return "error" not in result


for CASE in CASES:
    went_well = run(CASE)
sys.exit(0 if went_well else 3)
"""


def launch(cases: list[str], folder: Path) -> tuple[dict[str, list], str, float]:
    """Run the cases one after the other in two processes.

    Returns:
        What both processes left of each case (None: nothing), what was printed, and how long it took.
    """
    (folder / "program.py").write_text(PROGRAM)
    argv = program(",".join(cases), folder, processes=2, run=(str(folder / "program.py"),))
    started = time.monotonic()
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    found = {}
    for case in cases:
        files = [folder / f"{case}-{rank}.json" for rank in (0, 1)]
        found[case] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return found, done.stderr, time.monotonic() - started


METHODS = ("none", "kd", "pcd", "dkd")
REFUSED = {
    "uneven": "the processes have 10, 5 batches an epoch and must have equally many",
    "list": "the training loader gives the same batches to each of the 2 processes",
    "few": "the training loader has 1 batches for 2 processes; make the batches smaller",
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All cases that both processes outlive, in one launch."""
    cases = [*(f"unused {method}" for method in METHODS), "split", "sampler", *REFUSED]
    found, printed, _ = launch(cases, tmp_path_factory.mktemp("together"))
    assert found["few"][0] is not None, printed[-2000:]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_an_unused_parameter_is_found_and_both_train_alike(method, together):
    first, second = together[f"unused {method}"]
    assert first["rows"][-1]["val/top1"] == second["rows"][-1]["val/top1"]
    assert first["weights"] == second["weights"]


def test_a_loader_is_split_so_that_no_image_comes_twice(together):
    found = together["split"]
    last = [one["seen"][-100:] for one in found]  # of the last epoch
    assert sorted(last[0] + last[1]) == list(range(200))
    assert found[0]["rows"][0]["train/loss"] == found[1]["rows"][0]["train/loss"]
    assert set(found[0]["val"]).isdisjoint(found[1]["val"])
    assert set(found[0]["val"]) | set(found[1]["val"]) == set(range(64))


def test_a_loader_with_its_own_sampler_is_left_as_it_is(together):
    last = [one["seen"][-100:] for one in together["sampler"]]
    assert sorted(last[0] + last[1]) == list(range(200))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused_by_both(case, together):
    for one in together[case]:
        assert REFUSED[case] in one["error"]
