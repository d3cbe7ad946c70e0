"""A teacher whose weights two processes share (gloo, on the CPU): the same logits, and nobody waits for ever."""

import json

import pytest
import torch
from torch import nn

from pcdistill.distillation.sharding import blocks, check_processes, processes, shard_model
from pcdistill.errors import InputError
from tests.processes import finished, program

PROGRAM = """
import json, sys
from pathlib import Path

import timm, torch
import torch.distributed as dist

from pcdistill.distillation.sharding import held, shard_model
from pcdistill.distillation.teacher import Teacher
from pcdistill.models import build_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
MODELS = {
    "cnn": lambda: build_model("cifar/resnet8", num_classes=10, in_channels=3),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10),
}
for name, precisions in {"cnn": ("float32", "float8"), "vit": ("bfloat16",)}.items():
    for precision in precisions:
        teachers = []
        for _ in range(2):
            torch.manual_seed(0)
            teachers.append(Teacher(MODELS[name](), precision=precision, batch_size=4))
        whole, split = teachers
        images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        wanted = whole(images)
        example = split.prepare(torch.zeros(1, 3, 32, 32))
        split.rounds = shard_model(split.model, example, torch.device("cpu"))
        same = True
        for phase in range(2):  # one process has more batches, then the other; one has none at all
            for part in images.split(3 + rank) if rank == phase else ():
                same = same and bool(torch.equal(split(part), whole(part)))
            split.finish()
        same = same and bool(torch.equal(split(images), wanted))  # in step again
        found[f"{name} {precision}"] = {"same": same, "held": held(split.model)}
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_same_logits_each_with_half_of_the_weights(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    finished(program(tmp_path, processes=2, run=(str(tmp_path / "program.py"),)))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 3
        for name, one in found.items():
            own, whole, block = one["held"]
            assert one["same"], name
            assert 0.48 < own / whole < 0.52, name
            assert block < 0.6 * whole
            print(f"{name}: {own:,} of {whole:,} bytes, largest block {block:,}")


def test_blocks_are_the_members_of_lists_and_never_bare_lists():
    model = nn.Sequential(
        nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Linear(4, 4),
    )
    first, second = model[0]["a"]
    assert blocks(model) == [first, second, model[1][0], model[2]]


def test_small_blocks_go_with_those_around_them():
    model = nn.Sequential(nn.Sequential(*(nn.Linear(2, 2) for _ in range(200))), nn.Linear(50, 50))
    assert blocks(model) == [model[0], model[1]]


def test_one_process_is_told_how_to_start_several():
    assert processes() == 1
    with pytest.raises(InputError, match=r"there is one; start with torchrun --nproc_per_node N -m pcdistill"):
        shard_model(nn.Linear(2, 2), torch.zeros(1, 2), torch.device("cpu"))
    check_processes(2)
