"""Two processes (gloo, on the CPU) give the loss curve of one; what CUDA graphs ask of a run."""

import csv
import platform
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pcdistill
from pcdistill import cli
from pcdistill.engine import placement
from pcdistill.engine.placement import emulates_bfloat16, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.recipe import TrainConfig, make_recipe
from tests.processes import finished, program

# Without BatchNorm: its statistics are each process's own on a CPU, where PyTorch has no synchronised form.
MODELS = """
from torch import nn

def big(num_classes):
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(576, num_classes))

def small(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""


def curve(tmp_path: Path, processes: int, *extra: str) -> list[dict[str, float]]:
    out = tmp_path / f"on-{processes}"
    arguments = [
        *("distill", "--data", "digits", "--limit", "512"),
        *("--teacher", f"{tmp_path / 'mine.py'}:big", "--student", f"{tmp_path / 'mine.py'}:small"),
        *("--teacher-epochs", "3", "--epochs", "3", "--batch-size", "64", "--device", "cpu", "--out", str(out)),
        *("--set", "data.mixup=0", "--quiet", *extra),
    ]
    if processes == 1:
        cli.main(arguments)
    else:
        assert finished(program(*arguments, processes=processes)).stdout.count("(last epoch, ") == 1
    with open(out / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--unlabelled", "rest", "--set", "data.unlabelled_batch=32")], ids=str)
def test_two_processes_give_the_curve_of_one(extra, tmp_path):
    (tmp_path / "mine.py").write_text(MODELS)
    # DIST, the default, compares within each process's share of a batch.
    one, two = (curve(tmp_path, n, "--method", "pcd", *extra) for n in (1, 2))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in ("train/loss", "train/ce", "train/pcd", "val/loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4), (a["epoch"], key)
        assert b["val/top1"] == pytest.approx(a["val/top1"], abs=0.6)  # one of 180 images may sit on the boundary


@pytest.mark.slow
def test_accelerate_launch_without_gpus_says_that_it_started_one_process(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("with GPUs it starts as many as it is asked for")
    argv = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "pcdistill.cli"),
        *("train", "--data", "digits", "--limit", "64", "--epochs", "1", "--device", "cpu", "--quiet"),
        *("--out", str(tmp_path / "run")),
    ]
    done = finished(argv)
    text = " ".join((done.stdout + done.stderr).split())
    assert "accelerate launch was given several processes and started one" in text
    assert "torchrun --nproc_per_node N -m pcdistill" in text


@pytest.mark.parametrize(
    ("told", "emulated"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, False),
        ({}, False),
    ],
)
def test_an_emulated_bfloat16_is_known_by_the_processors_instructions(told, emulated, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert emulates_bfloat16() == emulated


@pytest.mark.parametrize(("flags", "emulated"), [("fpu sse2 avx2", True), ("avx512f avx512_bf16", False), ("", False)])
def test_an_older_torch_leaves_the_question_to_linux(flags, emulated, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(placement, "Path", lambda _: tmp_path / "cpuinfo")
    assert emulates_bfloat16() == emulated


# CUDA graphs


class Loader:
    """Batches of noise, the same in every epoch."""

    def __init__(self, count: int = 3, batch: int = 8) -> None:
        generator = torch.Generator().manual_seed(count)
        self.batches = [
            (torch.randn(batch, 3, 16, 16, generator=generator), torch.arange(batch) % 4) for _ in range(count)
        ]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def small_net(seed):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 4))


def train(compile_it, **options):
    return pcdistill.distill(
        teacher=small_net(0),
        student=small_net(1),
        train=Loader(),
        val=Loader(2),
        losses=[{"method": "ce"}, {"method": "pcd", "strength": 4}],
        epochs=2,
        train_options={"compile": compile_it, "precision": "float32", **options},
        allow=["weak-teacher"],
        verbose=False,
    )


@pytest.fixture
def events(monkeypatch):
    """What is compiled, each step's beginning, and where compiled modules run as they are; nothing is compiled."""
    found = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: found.append(options["mode"]))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: found.append("step"))
    stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda name: (found.append(name), stance(name))[1])
    return found


def with_graphs(monkeypatch):
    """A CPU's placement as a card's would be."""
    from pcdistill.commands import session

    make = session.make_placement

    def changed(*args):
        placed = make(*args)
        object.__setattr__(placed, "cuda_graphs", True)
        return placed

    monkeypatch.setattr(session, "make_placement", changed)


def test_each_step_is_marked_and_passes_that_are_no_step_run_as_they_are(events, monkeypatch):
    with_graphs(monkeypatch)
    train("reduce-overhead", device="cpu")
    assert events.count("reduce-overhead") == 2  # teacher and student
    assert events.count("step") == 6  # three batches in two epochs
    steps = [i for i, event in enumerate(events) if event == "step"]
    # The teacher is compiled; a few samples are tried, and the teacher is evaluated; the student is compiled.
    assert events[: steps[0]] == ["reduce-overhead", "force_eager", "force_eager", "reduce-overhead"]
    assert events[steps[2] + 1 : steps[3]] == ["force_eager"]  # the evaluation after an epoch
    assert "force_eager" not in events[steps[0] : steps[2]]


def test_on_a_cpu_it_is_compiled_without_graphs(events):
    train("reduce-overhead", device="cpu")
    assert events == [None, None]


def test_training_is_the_same_with_graphs_prepared_and_without(events, monkeypatch):
    plain = train(False, device="cpu")
    with_graphs(monkeypatch)
    marked = train("reduce-overhead", device="cpu")
    for a, b in zip(plain.history, marked.history, strict=True):
        assert a["train/loss"] == b["train/loss"]
        assert a["val/loss"] == b["val/loss"]


def test_gradients_of_several_batches_are_refused_before_any_training():
    with pytest.raises(InputError, match="train.accumulate: must be 1 with train.compile reduce-overhead"):
        make_recipe({"train": {"compile": "reduce-overhead", "accumulate": 2}}, "here")


def test_another_word_is_named():
    with pytest.raises(InputError, match="train.compile: input should be true, false or reduce-overhead, got 'max-aut"):
        make_recipe({"train": {"compile": "max-autotune"}}, "here")


def test_several_processes_with_graphs_are_refused(monkeypatch):
    config = TrainConfig(compile="reduce-overhead", device="cpu")
    accelerator = make_accelerator(config)

    class Two:
        device, num_processes = torch.device("cuda"), 2

    assert not make_placement(config, accelerator).cuda_graphs
    with pytest.raises(InputError, match="train.compile reduce-overhead is for one process so far; several take true"):
        make_placement(config, Two())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_it_trains_as_without_graphs():
    compiled, graphs = train(True), train("reduce-overhead")
    for a, b in zip(compiled.history, graphs.history, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)
