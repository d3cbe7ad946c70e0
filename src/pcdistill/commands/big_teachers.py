"""What is done for big teachers before they are used: checks of precision and processes, and splitting the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from pcdistill.distillation.sharding import check_processes, held, mesh_of, shard_model
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.engine.placement import emulates_bfloat16
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe


def warn_of_precision(accelerator: Accelerator, console: Console) -> None:
    """Say it where bfloat16 was asked for and costs time instead of saving it."""
    if accelerator.mixed_precision == "bf16":
        _warn_of("train.precision bfloat16", accelerator, console, "--precision float32")


def check_big_teachers(recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
    """Say what a teacher in fewer bits costs here; refuse what cannot be.

    Raises:
        InputError: the device has no such precision, or one process is to share the weights with others.
    """
    device = accelerator.device.type
    for number, teacher in enumerate(recipe.all_teachers if recipe.distils else ()):
        key = f"teachers.{number}" if recipe.teachers else "teacher"
        if teacher.shard:
            check_processes(accelerator.num_processes)
            if device == "mps":
                raise InputError(f"{key}.shard: Apple's GPUs exchange nothing; leave it out")
        precision = teacher.precision
        if precision == "float32":
            continue
        if precision == "float8" and device == "mps":
            raise InputError(f"{key}.precision: Apple's GPUs have no float8; take bfloat16")
        if precision != "float16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{key}.precision {precision}: this card does not compute in bfloat16; take float16")
        if precision == "float16" and device == "cpu":
            console.warn_once(f"{key}.precision float16: a processor computes in it slowly; take bfloat16 or float32")
        elif precision != "float16":
            _warn_of(f"{key}.precision {precision}", accelerator, console, f"{key}.precision float32")


def _warn_of(asked: str, accelerator: Accelerator, console: Console, instead: str) -> None:
    if accelerator.device.type == "cpu" and emulates_bfloat16() and accelerator.is_main_process:
        console.warn_once(
            f"{asked}: this processor has no bfloat16 instructions and emulates them, which can take "
            f"many times as long as float32; use {instead}"
        )


@contextmanager
def in_turns(accelerator: Accelerator) -> Iterator[None]:
    """The processes of a machine do the block one after another, and leave it together; machines do not wait.

    So a machine holds one whole model at a time, and the parts of those before. All processes must come here.
    """
    mesh_of(accelerator.device.type)
    mine = accelerator.local_process_index
    turns = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max().item()) + 1
    for _ in range(mine):
        accelerator.wait_for_everyone()
    try:
        yield
    finally:  # also after an error: the others find it too, and must not wait for this process
        for _ in range(mine, turns):
            accelerator.wait_for_everyone()


def split_teacher(teacher: Teacher, accelerator: Accelerator, example: tuple[int, int], console: Console) -> None:
    """Split a teacher's weights over the processes, and say what each holds.

    Args:
        teacher: the same in every process, on the CPU.
        accelerator: of all processes.
        example: channels and side of an image as the student gets it.
        console: progress.
    """
    channels, size = example
    device = accelerator.device
    for name, buffer in list(teacher.named_buffers(recurse=False)):
        setattr(teacher, name, buffer.to(device))
    images = teacher.prepare(torch.zeros(1, channels, size, size, device=device))
    teacher.rounds = shard_model(teacher.model, images, device)
    own, whole, block = (f"{n / 1e6:,.1f}" for n in held(teacher.model))
    console.say(
        f"teacher split over {accelerator.num_processes} processes: {own} MB of {whole} MB in each, "
        f"and {block} MB of its largest block in a pass"
    )
