"""`pcdistill export`: a run's student in the form that production reads, compared with the student on real images."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pcdistill
from pcdistill import models
from pcdistill.commands.onnx_files import (
    OnnxClassifier,
    OnnxDetector,
    need_onnx,
    write_classifier,
    write_detector,
    write_int8,
)
from pcdistill.commands.student import Student, open_student, student_data
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError, first_line
from pcdistill.files import atomic_file

FORMATS = ("onnx", "torch-export", "safetensors", "timm", "hf")
CHECKED = 1000  # images that an export is compared on at most
CHECKED_ONE_BY_ONE = 200  # for a detector
CALIBRATION = 256  # images that the ranges of int8 are taken from
Say = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What to write.

    Attributes:
        form: one of FORMATS.
        int8: also in 8-bit integers (ONNX).
        check: data to compare on; None takes the run's validation images.
        out: the file, or the folder for timm and hf; None is `export/` in the run's folder.
    """

    form: str
    int8: bool = False
    check: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Images:
    """Held-out images to compare on: the first `most` of a split, as `evaluate` reads them."""

    batches: Any
    most: int
    data: Any
    placement: Placement
    name: str

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        seen = 0
        for batch in self.batches.epoch(epoch, start):
            yield batch
            seen += len(batch)
            if seen >= self.most:
                return


def export(run: Path, plan: Export, say: Say) -> None:
    """Write a run's student in another form, and compare it on real images.

    Args:
        run: the run's folder.
        plan: what to write.
        say: told every result, line by line.

    Raises:
        InputError: what is asked does not fit the student, a package is missing, or `--check` cannot be read.
        PcdistillError: the exporter cannot.
    """
    if plan.form == "onnx":
        need_onnx()
    if plan.int8 and plan.form != "onnx":
        raise InputError(f"--int8 is for --to onnx, not for {plan.form}")
    student = open_student(run)
    _check_form(student, plan)
    images = _images(student, plan, say)
    path = plan.out or run / "export" / _file_name(plan.form)
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[plan.form](student, path)
    said = _compare(student, READERS[plan.form](student, path), images)
    _report(path, said, student, say)
    if plan.int8:
        _export_int8(student, path, plan, images, say)


def _check_form(student: Student, plan: Export) -> None:
    zoo = student.name.partition("/")[0]
    if student.detects and plan.form not in ("onnx", "safetensors"):
        raise InputError(f"a detector can be exported to onnx or safetensors, not to {plan.form}")
    if student.detects and plan.int8:
        raise InputError("--int8 is for classifiers; export the detector without it")
    if plan.form == "timm" and zoo != "timm":
        raise InputError(f"timm builds models of its own alone, not {student.name}; export it to onnx")
    if plan.form == "hf" and zoo not in ("hf", "timm"):
        raise InputError(f"transformers builds models of hf/ and timm/, not {student.name}; export it to onnx")
    if plan.form in ("timm", "hf") and "head" in student.metadata:
        raise InputError(f"the student has the teacher's head, which {plan.form} cannot build; export it to onnx")


def _file_name(form: str) -> str:
    return {"onnx": "student.onnx", "torch-export": "student.pt2", "safetensors": "student.safetensors"}.get(form, form)


def facts(student: Student) -> dict[str, Any]:
    """What stands in and beside an exported file: classes, pre-processing, and what made it."""
    prepared = {"range": [0, 1], "color": "RGB", "longest_side": student.bound}
    if student.preprocess is not None:
        prepared = student.preprocess.metadata()
    return {
        "task": student.recipe.task,
        "model": student.name,
        "classes": student.classes,
        **({"category_ids": student.categories} if student.detects else {}),
        "preprocess": prepared,
        "made_by": f"pcdistill {pcdistill.__version__}",
    }


# Writing


def _shape(student: Student) -> tuple[int, int, int]:
    """C, H, W of a classifier's images."""
    assert student.preprocess is not None
    return student.channels, student.preprocess.size, student.preprocess.size


def _write_onnx(student: Student, path: Path) -> None:
    if student.detects:
        side = student.bound or 640
        write_detector(student.model, path, torch.rand(3, side, side), facts(student))
    else:
        write_classifier(student.model, path, _shape(student), facts(student))


def _write_torch_export(student: Student, path: Path) -> None:
    example = torch.zeros(2, *_shape(student))
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(student.model, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export's errors have no common base
        raise PcdistillError(f"the student cannot be exported by torch.export: {first_line(error)}") from error
    with atomic_file(path) as file:
        torch.export.save(program, file, extra_files={"pcdistill.json": json.dumps(facts(student))})


def _write_safetensors(student: Student, path: Path) -> None:
    models.save_weights(student.model, path, student.metadata)


def _write_folder(student: Student, path: Path) -> None:
    models.save_pretrained(student.model, path, student.metadata)


WRITERS: dict[str, Callable[[Student, Path], None]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
    "safetensors": _write_safetensors,
    "timm": _write_folder,
    "hf": _write_folder,
}


# Reading back


def _read_onnx(student: Student, path: Path) -> nn.Module:
    return OnnxDetector(path) if student.detects else OnnxClassifier(path)


class _Program(nn.Module):
    """A program of torch.export in the classifier's place; it has no modes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = [torch.export.load(path).module()]  # in a list: not a submodule, whose mode would be set

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.run[0](images)
        return logits


def _read_torch_export(student: Student, path: Path) -> nn.Module:
    return _Program(path)


def _read_safetensors(student: Student, path: Path) -> nn.Module:
    """The student anew, with the file's weights alone."""
    fresh = open_student(student.folder)
    with torch.no_grad():
        for tensor in fresh.model.state_dict().values():
            tensor.zero_()
    models.load_weights(fresh.model, path)
    return fresh.model


def _read_timm(student: Student, path: Path) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return model


def _read_hf(student: Student, path: Path) -> nn.Module:
    return models.read_transformers(path)


READERS: dict[str, Callable[[Student, Path], nn.Module]] = {
    "onnx": _read_onnx,
    "torch-export": _read_torch_export,
    "safetensors": _read_safetensors,
    "timm": _read_timm,
    "hf": _read_hf,
}


# Comparing


def _images(student: Student, plan: Export, say: Say) -> Images | None:
    """Held-out images; None, with a line that says why, where the run's own cannot be read."""
    try:
        # One by one for a detector: padding to a batch's largest image changes what it finds.
        size, most = (1, CHECKED_ONE_BY_ONE) if student.detects else (50, CHECKED)
        data, placement = student_data(student, plan.check, workers=0, eval_batch_size=size)
    except PcdistillError as error:
        if plan.check is not None:
            raise
        say(f"not compared: {error}; name other data of these classes with --check")
        return None
    split = "validation"
    batches = data.val
    if plan.check is not None and data.test is not None:
        split, batches = "test", data.test
    return Images(batches, most, data, placement, f"{split} images of {plan.check or student.recipe.data.name}")


class _Beside(nn.Module):
    """Gives the exported model's outputs, and keeps how far the student's are from them."""

    finds_boxes = True  # no adapter need know it

    def __init__(self, exported: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.exported, self.student = exported, student
        self.largest: dict[str, float] = {}
        self.counts = [0, 0]

    def forward(self, images: Any) -> Any:
        theirs, ours = self.exported(images), self.student(images)
        if isinstance(theirs, Tensor):
            self._note("logits", theirs, ours)
            return theirs
        for one, other in zip(theirs, ours, strict=True):
            self.counts[0] += len(one["scores"])
            self.counts[1] += len(other["scores"])
            if len(one["scores"]) == len(other["scores"]):
                self._note("scores", one["scores"], other["scores"])
        return theirs

    def _note(self, name: str, one: Tensor, other: Tensor) -> None:
        found = float((one - other).abs().max()) if one.numel() else 0.0
        self.largest[name] = max(self.largest.get(name, 0.0), found)


def _compare(student: Student, exported: nn.Module, images: Images | None) -> dict[str, Any] | None:
    """Metric of both, and the largest difference of their outputs, on the same images."""
    if images is None:
        return None
    task, beside = student.task, _Beside(exported, student.model)
    values = [task.evaluate(m, images, images.data, images.placement) for m in (student.model, beside)]
    found = {
        "images": int(values[0]["samples"]),
        "of": images.name,
        "metric": task.metric,
        "student": values[0][task.metric],
        "exported": values[1][task.metric],
        "largest_difference": beside.largest,
    }
    return {
        **found,
        **({"boxes": {"student": beside.counts[1], "exported": beside.counts[0]}} if student.detects else {}),
    }


def _report(path: Path, said: dict[str, Any] | None, student: Student, say: Say) -> None:
    """The sidecar, and a line for the user."""
    if path.is_dir():
        say(f"written: {path}/")
    else:
        beside = path.with_name(path.name + ".json")
        written = {**facts(student), **({"compared": said} if said else {})}
        atomic_write(beside, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        say(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB), {beside.name}")
    if said is None:
        return
    label = student.task.label
    difference = ", ".join(f"{name} {value:.2g}" for name, value in said["largest_difference"].items())
    boxes = f"; boxes {said['boxes']['student']} and {said['boxes']['exported']}" if student.detects else ""
    say(
        f"on {said['images']} {said['of']}: {label} {said['student']:.2f} % (student), {said['exported']:.2f} % "
        f"(exported); largest difference: {difference}{boxes}"
    )


def _export_int8(student: Student, source: Path, plan: Export, images: Images | None, say: Say) -> None:
    """The int8 file beside the float one, and what it costs."""
    path = source.with_suffix(".int8.onnx")
    try:
        data, _ = student_data(student, plan.check, augment="none", mixup=0.0, cutmix=0.0, workers=0, batch_size=32)
    except PcdistillError as error:
        raise InputError(f"--int8 needs training images to calibrate on: {error}") from error
    batches = (batch.images[:32] for batch in islice(data.train.epoch(0), CALIBRATION // 32))
    write_int8(source, path, batches)
    said = _compare(student, OnnxClassifier(path), images)
    _report(path, said, student, say)
    if said is not None:
        cost, smaller = said["student"] - said["exported"], source.stat().st_size / path.stat().st_size
        say(f"int8 costs {cost:.2f} points of {student.task.label}; the file is {smaller:.1f} times smaller")
