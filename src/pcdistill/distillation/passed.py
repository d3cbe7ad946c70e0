"""Modules that a user passes in, of either task: what cannot be trained is said before the first step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pcdistill.distillation.unused import as_it_is
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError, what_failed
from pcdistill.models.feature_maps import unwrap


def check_modules(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise unless the student can be trained beside the teacher, as far as can be seen without running them.

    Raises:
        InputError: no module, parameters without values, one module in both roles or parameters that both have, a
            wrapper for several processes, weights that are NaN or, of a student, in half precision, nothing to train.
    """
    for name, module in (("student", student), ("teacher", teacher)):
        if module is not None:
            _check_module(module, name)
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError("the student has no parameter that requires a gradient, so there is nothing to train")
    for name, p in student.named_parameters():
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"the student's {name} is {str(p.dtype).removeprefix('torch.')}, too coarse to be trained; take "
                "student.float(), and train.precision for speed"
            )
    if teacher is None:
        return
    if unwrap(student) is unwrap(teacher):
        raise InputError("teacher and student are one module; give the student a copy: copy.deepcopy(teacher)")
    own = {_storage(p) for p in teacher.parameters() if not is_lazy(p)}
    common = [name for name, p in student.named_parameters() if not is_lazy(p) and p.numel() and _storage(p) in own]
    if common:
        raise InputError(
            f"teacher and student share {len(common)} parameters ({common[0]}), which cannot be frozen and trained at "
            "once; give the student its own: copy.deepcopy"
        )


def _check_module(module: nn.Module, name: str) -> None:
    if not isinstance(module, nn.Module):
        raise InputError(f"the {name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise InputError(f"the {name} is in DistributedDataParallel already; pass {name}.module, training wraps it")
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            if name == "teacher":
                raise InputError(f"the teacher's {key} has no values yet; run it on one batch, and load its weights")
        elif tensor.device.type == "meta":
            raise InputError(
                f"the {name}'s {key} is on the meta device, where it has no values; make the module on a real device, "
                "or call to_empty and load its weights"
            )
        elif isinstance(tensor, nn.Parameter) and _has_nan(tensor):
            raise InputError(f"the {name}'s {key} holds NaN before training; load its weights anew")


def _has_nan(p: Tensor) -> bool:
    return bool((p if p.is_complex() else p.float()).isnan().any())


def _storage(p: Tensor) -> tuple[str, int]:
    return str(p.device), p.untyped_storage().data_ptr() or id(p)


@contextmanager
def first_pass(name: str, inputs: Any, hint: str = "") -> Iterator[None]:
    """Whatever a user's module raises on its first images, as one sentence.

    Args:
        name: "student" or "teacher".
        inputs: images [N, ...], or what models take by name.
        hint: what to add: "; use ...".

    Raises:
        InputError: naming the module, the shapes, and what it raised.
    """
    try:
        yield
    except PcdistillError:
        raise
    except Exception as error:  # a user's module may raise anything
        given = inputs.items() if isinstance(inputs, Mapping) else [("images", inputs)]
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in given if isinstance(value, Tensor))
        raise InputError(f"the {name} cannot run on {shapes} ({what_failed(error)}){hint}") from error


def try_step(distiller: nn.Module, few: Any, placement: Placement, hint: str = "") -> None:
    """One pass over a few samples of a training batch, forward and backward, without a trace.

    Args:
        distiller: batch -> {"loss": scalar with a graph, ...}.
        few: a small batch, on its device.
        placement: where and in which precision to compute.
        hint: what to add to an error: "; use ...".

    Raises:
        InputError: what a module or a loss raised.
    """
    try:
        with as_it_is(distiller), placement.outside_steps(), torch.enable_grad(), placement.accelerator.autocast():
            distiller.train()
            loss = distiller(few)["loss"]
            wanted = [p for p in distiller.parameters() if p.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)
    except PcdistillError:
        raise
    except Exception as error:  # a user's module may raise anything
        images, labels = few.images, getattr(few, "target", None)
        shapes = list(images.shape) if isinstance(images, Tensor) else [list(image.shape) for image in images]
        target = "" if labels is None else f" and labels {list(labels.shape)}"
        raise InputError(
            f"student, teacher and losses cannot be run on images {shapes}{target} of the first training batch "
            f"({what_failed(error)}){hint}"
        ) from error
