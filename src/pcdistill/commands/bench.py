"""`pcdistill bench`: latency and throughput of teacher and student, by every program that can run them here."""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcdistill import report
from pcdistill.commands.onnx_files import (
    OnnxClassifier,
    OnnxDetector,
    need_onnx,
    write_classifier,
    write_detector,
    write_int8,
)
from pcdistill.commands.student import open_student
from pcdistill.commands.tasks import task_of
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.errors import InputError, PcdistillError, first_line
from pcdistill.recipe import Recipe, StudentConfig, make_recipe

PROGRAMS = ("eager", "compiled", "onnx", "int8")
WARM_UP, FEWEST, MOST = 3, 10, 1000  # calls
Call = Callable[[Tensor], object]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        batch_size: images of a batch, for the throughput.
        image_size: side in pixels; None is the run's, and 224 for a model.
        programs: some of PROGRAMS.
        seconds: how long each figure is measured.
        device: of eager and compiled.
    """

    batch_size: int = 64
    image_size: int | None = None
    programs: tuple[str, ...] = PROGRAMS
    seconds: float = 2.0
    device: str = "auto"


@dataclass(frozen=True)
class Subject:
    """A model to measure: student or teacher, in eval mode, and the shape C, H, W of its images."""

    who: str
    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    detects: bool


def bench(what: str, plan: Bench, say: Say) -> str:
    """Measure a run's student and teachers, or a model by name.

    Args:
        what: a run's folder, whose bench.json, page and card are written too; or a model's name.
        plan: what to measure.
        say: told what is measured now, and what was left out and why.

    Returns:
        The table.

    Raises:
        InputError: there is neither such a run nor such a model, or a value does not fit.
    """
    _check(plan)
    run = Path(what) if (Path(what) / "recipe.yaml").is_file() else None
    left_out: list[str] = []
    subjects = [_named(what, plan)] if run is None else _of_run(run, plan, left_out)
    device = _device(plan)
    rows = []
    for subject in subjects:
        for program in plan.programs:
            try:
                rows.append(_measured(subject, program, plan, device, say))
            except PcdistillError as error:
                left_out.append(f"{subject.who} {subject.name}, {program}: not measured: {error}.")
                say(left_out[-1])
    size = subjects[0].shape[-1]
    found = {
        "batch_size": plan.batch_size,
        "image_size": size,
        "machine": _machine(device, plan),
        "rows": rows,
        "left_out": left_out,
    }
    if run is not None:
        _keep(run, found)
    return "\n".join([*report.aligned(report.speed_cells(found)), "", *report.speed_notes(found)])


def _check(plan: Bench) -> None:
    for name in plan.programs:
        if name not in PROGRAMS:
            raise InputError(f'--programs: unknown "{name}"; known: {", ".join(PROGRAMS)}')
    if plan.image_size is not None and plan.image_size < 1:
        raise InputError(f"--image-size must be 1 or more, got {plan.image_size}")
    if plan.batch_size < 1 or not 0 < plan.seconds < float("inf"):
        raise InputError(
            f"--batch-size must be 1 or more and --seconds above 0, got {plan.batch_size}, {plan.seconds:g}"
        )


def _device(plan: Bench) -> torch.device:
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device")
    return torch.device("cuda" if plan.device != "cpu" and torch.cuda.is_available() else "cpu")


def _named(name: str, plan: Bench) -> Subject:
    """A model by its name, with as many classes as its zoo gives it, on three channels."""
    if not name or Path(name).is_dir():
        raise InputError(f"{name} is not a run's folder: it has no recipe.yaml")
    recipe = make_recipe({"student": {"name": name}, "method": "none"})
    size = plan.image_size or (32 if name.startswith("cifar/") else 224)
    return _subject("model", recipe, recipe.student, [str(i) for i in range(1000)], size, 3)


def _of_run(run: Path, plan: Bench, left_out: list[str]) -> list[Subject]:
    """The student with its weights; teachers as their names say, for weights decide nothing here."""
    student = open_student(run)
    size = plan.image_size or student.metadata.get("image_size") or 640
    subjects = [Subject("student", student.name, student.model, (student.channels, size, size), student.detects)]
    recipe = student.recipe
    for config in recipe.all_teachers if recipe.distils else ():
        if config.outside:
            left_out.append(f"teacher {config.name}: not measured: it is asked for its logits, and is not here.")
            continue
        bare = StudentConfig(config.name, kwargs=dict(config.kwargs))
        side = plan.image_size or config.image_size or size
        try:
            subjects.insert(-1, _subject("teacher", recipe, bare, student.classes, side, student.channels))
        except PcdistillError as error:
            left_out.append(f"teacher {config.name}: not measured: {error}.")
    return subjects


def _subject(who: str, recipe: Recipe, config: StudentConfig, classes: list[str], size: int, channels: int) -> Subject:
    data = SimpleNamespace(classes=classes, image_size=size, in_channels=channels)
    model = task_of(recipe).student(replace(recipe, student=config), data)
    return Subject(who, config.name, model.eval(), (channels, size, size), recipe.task == "detection")


def _measured(subject: Subject, program: str, plan: Bench, device: torch.device, say: Say) -> dict[str, Any]:
    """One row."""
    say(f"measuring {subject.who} {subject.name}, {program}")
    with tempfile.TemporaryDirectory() as folder:
        call, where = CALLS[program](subject, device, Path(folder))
        one = _times(call, torch.rand(1, *subject.shape).to(where), plan.seconds)
        many = _times(call, torch.rand(plan.batch_size, *subject.shape).to(where), plan.seconds)
    return {
        "who": subject.who,
        "model": subject.name,
        "program": program,
        "device": str(where),
        "p50_ms": 1000 * float(np.percentile(one, 50)),
        "p95_ms": 1000 * float(np.percentile(one, 95)),
        "images_per_second": plan.batch_size / float(np.percentile(many, 50)),
    }


@torch.inference_mode()
def _times(call: Call, images: Tensor, seconds: float) -> list[float]:
    """Seconds of calls, after some that warm up."""

    def once() -> float:
        started = time.perf_counter()
        call(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        once()
    found: list[float] = []
    while len(found) < FEWEST or (sum(found) < seconds and len(found) < MOST):
        found.append(once())
    return found


# The programs


def _eager(subject: Subject, device: torch.device, folder: Path) -> tuple[Call, torch.device]:
    model = subject.model.to(device)
    if subject.detects:
        return lambda images: model(list(images)), device
    return model, device


def _compiled(subject: Subject, device: torch.device, folder: Path) -> tuple[Call, torch.device]:
    if subject.detects:
        raise PcdistillError("detectors branch on what they find, which torch.compile does not follow")
    model = torch.compile(subject.model.to(device), dynamic=False)
    try:
        with torch.inference_mode():
            model(torch.rand(1, *subject.shape, device=device))
    except Exception as error:  # without a compiler for C++, or Triton
        raise PcdistillError(f"torch.compile cannot: {first_line(error)}") from error
    return model, device


def _onnx(subject: Subject, device: torch.device, folder: Path) -> tuple[Call, torch.device]:
    path = _onnx_file(subject, folder)
    session: nn.Module = OnnxDetector(path) if subject.detects else OnnxClassifier(path)
    return (lambda images: session(list(images)) if subject.detects else session(images)), torch.device("cpu")


def _int8(subject: Subject, device: torch.device, folder: Path) -> tuple[Call, torch.device]:
    if subject.detects:
        raise PcdistillError("only classifiers are quantised")
    source = _onnx_file(subject, folder)
    path = folder / "int8.onnx"
    write_int8(source, path, _noise(subject))
    return OnnxClassifier(path), torch.device("cpu")


def _onnx_file(subject: Subject, folder: Path) -> Path:
    need_onnx()
    path = folder / "model.onnx"
    model = subject.model.cpu()
    if subject.detects:
        write_detector(model, path, torch.rand(subject.shape), {})
    else:
        write_classifier(model, path, subject.shape, {})
    return path


def _noise(subject: Subject) -> Iterator[Tensor]:
    """The ranges of int8 decide nothing about its speed."""
    yield torch.randn(8, *subject.shape)


CALLS: dict[str, Callable[[Subject, torch.device, Path], tuple[Call, torch.device]]] = {
    "eager": _eager,
    "compiled": _compiled,
    "onnx": _onnx,
    "int8": _int8,
}


def _machine(device: torch.device, plan: Bench) -> dict[str, Any]:
    found = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    if {"onnx", "int8"} & set(plan.programs):
        try:
            import onnxruntime

            found["onnxruntime"] = f"{onnxruntime.__version__} (CPU)"
        except ImportError:
            pass
    return found


def cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _keep(run: Path, found: dict[str, Any]) -> None:
    """bench.json, and the page and card anew; a card that somebody edited stays as it is."""
    card = run / "README.md"
    own = card.is_file() and card.read_text(encoding="utf-8") == report.write_model_card(run)
    atomic_write(run / report.SPEED_FILE, json.dumps(found, indent=2) + "\n")
    report.write_run_report(run)
    if own or not card.exists():
        atomic_write(card, report.write_model_card(run))
