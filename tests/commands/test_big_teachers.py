"""Big teachers in a run: warnings and refusals before anything is built, and a teacher in parts under torchrun."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pcdistill.commands.big_teachers import check_big_teachers
from pcdistill.commands.cache import make_cache
from pcdistill.commands.session import Session
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.plain import parse_yaml
from pcdistill.recipe import load_recipe
from tests.processes import finished, program

MODEL = """
import torch
from torch import nn

def big(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))
"""
# Validation has 19 images, so that of two processes one has two batches of nine or fewer, the other one.
COMMON = {
    "data.name": "digits",
    "data.limit": 190,
    "data.batch_size": 32,
    "data.eval_batch_size": 9,
    "teacher.pretrained": True,
    "student.name": "cifar/resnet8",
    "method": "kd",
    "train.epochs": 1,
    "train.device": "cpu",
    "allow": ["weak-teacher"],
}
PROGRAM = """
import sys, warnings
from pathlib import Path

import torch
from pcdistill.commands.cache import make_cache
from pcdistill.commands.session import run
from pcdistill.recipe import load_recipe

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in ("split", "whole"):
    recipe = load_recipe(folder / f"{name}.yaml")
    make_cache(recipe, folder / f"cache-{name}", epochs=2)
    run(recipe, folder / f"run-{name}")
"""
TURNS = """
import json, sys, time
from pathlib import Path

from accelerate import Accelerator
from pcdistill.commands.big_teachers import in_turns

accelerator, spans = Accelerator(cpu=True), []
for fails in (False, True, False):
    try:
        with in_turns(accelerator):
            begin = time.monotonic()
            time.sleep(0.1)
            spans.append((begin, time.monotonic()))
            if fails:
                raise ValueError
    except ValueError:
        pass
(Path(sys.argv[1]) / f"{accelerator.process_index}.json").write_text(json.dumps(spans))
"""


def recipe(folder: Path, **values):
    (folder / "mine.py").write_text(MODEL)
    given = {key.replace("__", "."): value for key, value in values.items()}
    return load_recipe(None, values={**COMMON, "teacher.name": f"{folder / 'mine.py'}:big", **given})


def accelerator(device: str, processes: int = 1):
    return SimpleNamespace(device=torch.device(device), num_processes=processes, is_main_process=True)


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_what_a_processor_emulates_is_told(precision, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pcdistill.commands.big_teachers.emulates_bfloat16", lambda: True)
    monkeypatch.setattr("pcdistill.engine.console.TOLD", set())
    check_big_teachers(recipe(tmp_path, teacher__precision=precision), accelerator("cpu"), Console())
    assert f"teacher.precision {precision}: this processor has no bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "device", "says"),
    [
        ("float8", "mps", "Apple's GPUs have no float8"),
        ("bfloat16", "cuda", "this card does not compute in bfloat16; take float16"),
        ("float8", "cuda", "this card does not compute in bfloat16; take float16"),
    ],
)
def test_what_a_device_has_not_is_refused(precision, device, says, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(InputError, match=says):
        check_big_teachers(recipe(tmp_path, teacher__precision=precision), accelerator(device), Console(quiet=True))


def test_one_process_has_nobody_to_share_with(tmp_path):
    split = recipe(tmp_path, teacher__shard=True)
    with pytest.raises(InputError, match=r"there is one; start with torchrun --nproc_per_node N"):
        Session(split, tmp_path / "run").prepare()
    with pytest.raises(InputError, match=r"there is one; start with torchrun --nproc_per_node N"):
        make_cache(split, tmp_path / "cache", epochs=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"there is one; start with torchrun --nproc_per_node N"):
        check_big_teachers(split, accelerator("cpu"), Console(quiet=True))  # before a teacher is built
    with pytest.raises(InputError, match=r"teacher.shard: Apple's GPUs exchange nothing"):
        check_big_teachers(split, accelerator("mps", processes=2), Console(quiet=True))


def test_a_cache_is_of_one_precision_and_of_any_batch_size(tmp_path):
    make_cache(recipe(tmp_path, teacher__batch_size=5), tmp_path / "cache", epochs=1)
    make_cache(recipe(tmp_path, teacher__batch_size=7), tmp_path / "cache", epochs=1)
    with pytest.raises(InputError, match=r"holds another cache \(.*teacher.precision"):
        make_cache(recipe(tmp_path, teacher__precision="bfloat16"), tmp_path / "cache", epochs=1)


@pytest.mark.slow
def test_a_teacher_in_parts_teaches_and_fills_a_cache_as_the_whole_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    for name in ("split", "whole"):
        (tmp_path / f"{name}.yaml").write_text(recipe(tmp_path, teacher__shard=name == "split").to_yaml())
    finished(program(tmp_path, processes=2, run=(str(tmp_path / "program.py"),)))
    caches = [tmp_path / f"cache-{name}" for name in ("split", "whole")]
    split, whole = ({file.name: file.read_bytes() for file in cache.glob("*.bin")} for cache in caches)
    assert len(split) == 2
    assert split == whole
    results = [parse_yaml((tmp_path / f"run-{name}" / "result.json").read_text(), name) for name in ("split", "whole")]
    for key in ("teacher", "best", "last", "contents"):
        assert results[0][key] == results[1][key]
    # A run that is done is read by one process too.
    stored = Session(recipe(tmp_path, teacher__shard=True), tmp_path / "run-split").run()
    assert stored.summary["best"] == results[0]["best"]


@pytest.mark.slow
def test_processes_of_a_machine_take_turns_also_when_one_fails(tmp_path):
    (tmp_path / "turns.py").write_text(TURNS)
    finished(program(tmp_path, processes=3, run=(str(tmp_path / "turns.py"),)))
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(3)]
    for first, second, third in zip(*found, strict=True):
        assert first[0] < first[1] <= second[0] < second[1] <= third[0] < third[1]
