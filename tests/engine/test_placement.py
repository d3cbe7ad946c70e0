"""Two processes (gloo, on the CPU) give the loss curve of one, at an equal global batch."""

import csv
import platform
import sys
from pathlib import Path

import pytest
import torch

from pcdistill import cli
from pcdistill.engine import placement
from pcdistill.engine.placement import emulates_bfloat16
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
        finished(program(*arguments, processes=processes))
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
