"""`pcdistill predict`: a run's student on image files, as a table, as JSON, or in the formats of detection data."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcdistill.commands.drawing import draw_boxes, draw_class
from pcdistill.commands.student import Student, open_student
from pcdistill.data.files import EXTENSIONS
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.errors import InputError, PcdistillError
from pcdistill.files import home_followed

BATCH = 32
SHOWN_SCORE = 0.3  # boxes below it are not written to csv or yolo, nor drawn
CLASSIFIER_FORMATS, DETECTOR_FORMATS = ("csv", "json"), ("csv", "coco", "yolo")


@dataclass(frozen=True)
class Predict:
    """What to write.

    Attributes:
        form: csv or json for a classifier; csv, coco or yolo for a detector. None: csv.
        out: the file, for yolo a folder of one text file per image; None gives the text back.
        draw: a folder for the images with the answer drawn.
        top_k: classes per image of a classifier.
        score: boxes below it are left out; None is 0.3, and 0 for coco, whose AP counts all.
    """

    form: str | None = None
    out: Path | None = None
    draw: Path | None = None
    top_k: int = 1
    score: float | None = None


@dataclass(frozen=True)
class File:
    """An image file: where it is, and its name in what is written."""

    path: str
    name: str


@dataclass(frozen=True)
class Answer:
    """What the student says of one file.

    Attributes:
        file: the image.
        size: its height and width in pixels.
        labels: [M] int64, positions among the classes, the most certain first.
        scores: [M] probabilities or scores.
        boxes: [M, 4] xyxy in pixels of the file; None from a classifier.
    """

    file: File
    size: tuple[int, int]
    labels: list[int]
    scores: list[float]
    boxes: list[list[float]] | None = None


def predict(run: Path, images: Sequence[str], plan: Predict) -> str:
    """Run a student on image files, and write what it says.

    Args:
        run: the run's folder.
        images: files, and folders that are searched with all that is in them.
        plan: what to write.

    Returns:
        The table, or a line that says where it is.

    Raises:
        InputError: no run, no image, or a format that does not fit the task; nothing is predicted then.
        PcdistillError: some files could not be read; the others are written.
    """
    student = open_student(run)
    form = _form(student, plan)
    files = find_files(images)
    if form == "yolo" or plan.draw is not None:
        _refuse_one_name(files, whole=form != "yolo")
    unreadable: list[str] = []
    answers = list(_answers(student, files, plan, unreadable))
    text = FORMS[form](student, answers, plan) if answers else ""
    if plan.out is not None and form != "yolo":
        plan.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(plan.out, text)
        text = f"written: {plan.out}, {len(answers)} images"
    if unreadable:
        if text:
            print(text.rstrip("\n"))
        named = "".join(f"\n  {sentence}" for sentence in unreadable)
        raise PcdistillError(f"{len(unreadable)} of {len(files)} files could not be read:{named}")
    return text.rstrip("\n")


def _form(student: Student, plan: Predict) -> str:
    known = DETECTOR_FORMATS if student.detects else CLASSIFIER_FORMATS
    form = plan.form or "csv"
    if form not in known:
        what = "detector" if student.detects else "classifier"
        raise InputError(f"--format {form} is not for a {what}; take {' or '.join(known)}")
    if form == "yolo" and plan.out is None:
        raise InputError("--format yolo writes a file for each image; name their folder with --out")
    if student.channels not in (1, 3):
        raise InputError(f"image files have 1 or 3 channels, and the student reads {student.channels}")
    if plan.score is not None and not 0 <= plan.score <= 1:
        raise InputError(f"--score must be from 0 to 1, got {plan.score:g}")
    if plan.top_k < 1:
        raise InputError(f"--top-k must be 1 or more, got {plan.top_k}")
    return form


def find_files(images: Sequence[str]) -> list[File]:
    """The files that are named, and the images in the folders that are; a folder's are named from it on.

    Raises:
        InputError: there is none.
    """
    found: list[File] = []
    for given in images:
        path = home_followed(given)
        if not path.is_dir():
            found.append(File(str(path), path.name))  # if it is none, reading it says so
            continue
        inside = (Path(parent, file) for parent, _, names in os.walk(path, followlinks=True) for file in names)
        chosen = sorted(file for file in inside if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."))
        found += [File(str(file), file.relative_to(path).as_posix()) for file in chosen]
    if not found:
        raise InputError(f"no image in {', '.join(images)} ({', '.join(sorted(EXTENSIONS))})")
    return found


def _refuse_one_name(files: Sequence[File], *, whole: bool) -> None:
    """Raise InputError where the files that are made for two images would have one name."""
    seen: dict[Path, str] = {}
    for file in files:
        path = Path(file.name) if whole else Path(file.name).with_suffix("")
        if path in seen:
            raise InputError(f"{seen[path]} and {file.path} would be written under one name; predict them one by one")
        seen[path] = file.path


def _answers(student: Student, files: Sequence[File], plan: Predict, unreadable: list[str]) -> Iterator[Answer]:
    """In the order of the files; a file that cannot be read is named in `unreadable`."""
    score = plan.score if plan.score is not None else 0.0 if plan.form == "coco" else SHOWN_SCORE
    size = 1 if student.detects else BATCH  # padding to a batch's largest image changes what a detector finds
    batch: list[tuple[File, Tensor, tuple[int, int]]] = []
    for number, file in enumerate(files, start=1):
        try:
            batch.append((file, *student.read(file.path)))
        except InputError as error:
            unreadable.append(str(error))
        if batch and (len(batch) == size or number == len(files)):
            answers = _found(student, batch, score) if student.detects else _classified(student, batch, plan.top_k)
            for answer in answers:
                if plan.draw is not None:
                    _draw(student, answer, plan.draw)
                yield answer
            batch = []


@torch.no_grad()
def _classified(student: Student, batch: Sequence[tuple[File, Tensor, tuple[int, int]]], top_k: int) -> list[Answer]:
    probabilities = student.model(torch.stack([image for _, image, _ in batch])).float().softmax(dim=1)
    best, labels = probabilities.topk(min(top_k, len(student.classes)), dim=1)
    rows = zip(batch, labels.tolist(), best.tolist(), strict=True)
    return [Answer(file, size, label, values) for (file, _, size), label, values in rows]


@torch.no_grad()
def _found(student: Student, batch: Sequence[tuple[File, Tensor, tuple[int, int]]], score: float) -> list[Answer]:
    answers = []
    for file, image, size in batch:
        found = student.boxes_in(image, size)
        kept = found["scores"] >= score
        boxes = found["boxes"][kept].tolist()
        answers.append(Answer(file, size, (found["labels"][kept] - 1).tolist(), found["scores"][kept].tolist(), boxes))
    return answers


def _draw(student: Student, answer: Answer, folder: Path) -> None:
    """The file's image with the answer, under the same name; as PNG where the name is not one of PNG or JPEG."""
    names = [student.classes[label] for label in answer.labels]
    captions = [f"{name} {score:.2f}" for name, score in zip(names, answer.scores, strict=True)]
    pixels = student.pixels(answer.file.path)
    if answer.boxes is None:
        picture = draw_class(pixels, captions)
    else:
        shown = [i for i, score in enumerate(answer.scores) if score >= SHOWN_SCORE]
        boxes = [(answer.boxes[i], answer.labels[i], captions[i]) for i in shown]
        picture = draw_boxes(pixels, boxes)
    path = folder / answer.file.name
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        path = path.with_name(path.name + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


# The forms


def _csv(student: Student, answers: Sequence[Answer], plan: Predict) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if student.detects:
        writer.writerow(["file", "class", "category_id", "score", "x0", "y0", "x1", "y1"])
        for answer in answers:
            for label, score, box in _boxes(answer):
                corners = [f"{value:.2f}" for value in box]
                row = [answer.file.name, student.classes[label], student.categories[label], f"{score:.4f}", *corners]
                writer.writerow(row)
        return text.getvalue()
    more = range(2, min(plan.top_k, len(student.classes)) + 1)
    writer.writerow(["file", "class", "probability", *(f"{key}_{n}" for n in more for key in ("class", "probability"))])
    for answer in answers:
        pairs = zip(answer.labels, answer.scores, strict=True)
        cells = [cell for label, score in pairs for cell in (student.classes[label], f"{score:.4f}")]
        writer.writerow([answer.file.name, *cells])
    return text.getvalue()


def _json(student: Student, answers: Sequence[Answer], plan: Predict) -> str:
    found = [
        {
            "file": answer.file.name,
            "predictions": [
                {"class": student.classes[label], "probability": score}
                for label, score in zip(answer.labels, answer.scores, strict=True)
            ],
        }
        for answer in answers
    ]
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _coco(student: Student, answers: Sequence[Answer], plan: Predict) -> str:
    """COCO's list of results; images' ids are the numbers that their names are, or else their positions from 1."""
    found: list[dict[str, Any]] = []
    stems = [Path(answer.file.name).stem for answer in answers]
    numbered = all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(s) for s in stems}) == len(stems)
    for position, answer in enumerate(answers, start=1):
        image_id = int(stems[position - 1]) if numbered else position
        for label, score, (x0, y0, x1, y1) in _boxes(answer):
            found.append(
                {
                    "image_id": image_id,
                    "file_name": answer.file.name,
                    "category_id": student.categories[label],
                    "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "score": round(score, 6),
                }
            )
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _yolo(student: Student, answers: Sequence[Answer], plan: Predict) -> str:
    """A text file per image: class from 0, centre and size in parts of the image, score; classes.txt names them."""
    assert plan.out is not None
    for answer in answers:
        height, width = answer.size
        lines = []
        for label, score, (x0, y0, x1, y1) in _boxes(answer):
            parts = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            lines.append(f"{label} {' '.join(f'{part:.6f}' for part in parts)} {score:.6f}\n")
        path = plan.out / Path(answer.file.name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(lines))
    atomic_write(plan.out / "classes.txt", "".join(f"{name}\n" for name in student.classes))
    return f"written: {plan.out}/, {len(answers)} images"


def _boxes(answer: Answer) -> Iterator[tuple[int, float, list[float]]]:
    assert answer.boxes is not None
    yield from zip(answer.labels, answer.scores, answer.boxes, strict=True)


FORMS: dict[str, Callable[[Student, Sequence[Answer], Predict], str]] = {
    "csv": _csv,
    "json": _json,
    "coco": _coco,
    "yolo": _yolo,
}
