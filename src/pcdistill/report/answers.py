"""What student and teacher answered on every held-out image: confusions, classes, and images that they differ on.

answers.npz of a run's folder holds `classes` [K], `split`, and for its N images `target`, `student` and, with a
teacher, `teacher` [N] (positions of classes), `student_p` and `teacher_p` [N] (their probabilities); of some of the
images `shown` [M] (positions), `names` [M] and `thumb_0`, ... [H, W, 3] uint8.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import bdtr

from pcdistill.report._format import MISSING, SPLITS
from pcdistill.report.boxes import TINY, picture_data

FILE = "answers.npz"
MATRIX = 12  # more classes than this are no matrix on a page
MOST_CONFUSIONS = 12
THUMBS = 18
LINES = 15  # classes on the page before the list is folded
ALIKE = 0.05


@dataclass(frozen=True)
class Answers:
    """answers.npz, read; arrays as the module says."""

    classes: list[str]
    split: str
    target: np.ndarray
    student: np.ndarray
    student_p: np.ndarray
    teacher: np.ndarray | None = None
    teacher_p: np.ndarray | None = None
    thumbs: list[tuple[int, str, np.ndarray]] = field(default_factory=list)  # position, name, pixels

    def __len__(self) -> int:
        return len(self.target)


def read_answers(run_dir: Path) -> Answers | None:
    """None where there is no such file, or it is damaged."""
    try:
        with (Path(run_dir) / FILE).open("rb") as file, np.load(file, allow_pickle=False) as found:
            stored = dict(found)
        thumbs = [
            (int(row), str(name), stored[f"thumb_{i}"])
            for i, (row, name) in enumerate(zip(stored["shown"], stored["names"], strict=True))
        ]
        return Answers(
            [str(name) for name in stored["classes"]],
            str(stored["split"]),
            stored["target"],
            stored["student"],
            stored["student_p"],
            stored.get("teacher"),
            stored.get("teacher_p"),
            thumbs,
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # cut off, or no archive of ours
        return None


def interesting(found: Answers, most: int = THUMBS) -> list[int]:
    """Positions of images that the student gets wrong and the teacher right, the teacher's most certain first.

    Without a teacher: those that the student gets wrong, its most certain first.
    """
    wrong = found.student != found.target
    certain = found.student_p
    if found.teacher is not None and found.teacher_p is not None:
        wrong, certain = wrong & (found.teacher == found.target), found.teacher_p
    rows = np.flatnonzero(wrong)
    order = np.argsort(-certain[rows].astype(np.float64), kind="stable")
    return [int(row) for row in rows[order][:most]]


def class_table(found: Answers) -> dict[str, Any]:
    """Accuracy of every class that has images, with their number; the student's worst class first."""
    images = np.bincount(found.target, minlength=len(found.classes))
    names = {"student": found.student, **({} if found.teacher is None else {"teacher": found.teacher})}
    right = {
        who: np.bincount(found.target[answer == found.target], minlength=len(found.classes))
        for who, answer in names.items()
    }
    present = [k for k in range(len(found.classes)) if images[k]]
    share = {who: 100 * counts / np.maximum(images, 1) for who, counts in right.items()}
    order = sorted(present, key=lambda k: (share["student"][k], -images[k], k))
    rows = []
    for k in order:
        cells = [found.classes[k], f"{images[k]:,}", *(f"{share[who][k]:.1f}" for who in names)]
        if "teacher" in share:
            cells.append(_signed(share["student"][k] - share["teacher"][k]))
        rows.append(cells)
    head = ["class", "images", "student (%)", *(["teacher (%)", "difference"] if "teacher" in share else [])]
    worst = [k for k in order if share["student"][k] == share["student"][order[0]]]
    named = _listed([found.classes[k] for k in worst])
    said = f"Hardest for the student: {named}, with {share['student'][worst[0]]:.1f} % right."
    if share["student"][worst[0]] == 100:
        said = "The student makes no mistake on any class."
    absent = len(found.classes) - len(present)
    notes = [f"Of {len(found):,} {SPLITS[found.split]} images. The fewer a class has, the rougher its figure."]
    notes += [f"{absent} classes have no image in this split."] if absent else []
    return {
        "per_class_head": head,
        "per_class": rows,
        "per_class_said": said,
        "per_class_notes": notes,
        "class_lines": LINES,
    }


def confusions_of(found: Answers) -> dict[str, Any] | None:
    """What is taken for what: a matrix of few classes, and the most frequent confusions; None without any."""
    k = len(found.classes)
    counts = np.zeros((k, k), dtype=np.int64) if k <= MATRIX else None
    if counts is not None:
        np.add.at(counts, (found.target, found.student), 1)
    wrong = found.student != found.target
    if not wrong.any():
        return None
    pairs, numbers = np.unique(np.stack([found.target[wrong], found.student[wrong]], 1), axis=0, return_counts=True)
    images = np.bincount(found.target, minlength=k)
    order = np.argsort(-numbers, kind="stable")[:MOST_CONFUSIONS]
    rows = []
    for i in order:
        true, answer = pairs[i]
        cells = [f"{found.classes[true]} → {found.classes[answer]}", str(numbers[i]), f"{images[true]:,}"]
        if found.teacher is not None:
            cells.append(str(int(((found.target == true) & (found.teacher == answer)).sum())))
        rows.append(cells)
    head = ["true class → student's answer", "times", "of images", *([] if found.teacher is None else ["teacher"])]
    matrix = None
    if counts is not None:
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        matrix = [
            (found.classes[i], [(int(counts[i, j]), round(0.45 * float(share[i, j]), 3), i == j) for j in range(k)])
            for i in range(k)
        ]
    notes = [] if len(pairs) <= len(order) else [f"{len(pairs) - len(order)} rarer ones are not listed."]
    return {"classes": found.classes, "matrix": matrix, "head": head, "rows": rows, "notes": notes}


def thumbs_of(found: Answers) -> dict[str, Any] | None:
    """The images that the student gets wrong and the teacher right, as the page shows them; None without any."""
    images = [_thumb(found, *one) for one in found.thumbs]
    wrong = found.student != found.target
    if found.teacher is None:
        title, said = "What the student gets wrong", f"{_images(wrong)} of {len(found):,} {SPLITS[found.split]} images."
    else:
        right = found.teacher == found.target
        title = "What the student gets wrong and the teacher right"
        said = (
            f"{_images(wrong & right)} of {len(found):,} {SPLITS[found.split]} images; the other way round "
            f"{_images(~wrong & ~right)}; both wrong {_images(wrong & ~right)}."
        )
    if not images:
        return None
    order = "the teacher's" if found.teacher is not None else "the student's"
    notes = [f"As the student sees them; those with {order} highest probability first."]
    return {"title": title, "said": said, "images": images, "notes": notes}


def paired(a: Answers, b: Answers) -> tuple[str, str]:
    """A student with a teacher and one without on the same images: "better", "worse" or "alike", and in words.

    Both empty if the images are not the same. The test is McNemar's, exact: an image on which just one is right is as
    likely to be either's.
    """
    if a.split != b.split or len(a) != len(b) or not np.array_equal(a.target, b.target):
        return "", ""
    only_a = int(((a.student == a.target) & (b.student != b.target)).sum())
    only_b = int(((a.student != a.target) & (b.student == b.target)).sum())
    if not only_a + only_b:
        return "alike", f"Both are right on the same of the {len(a):,} {SPLITS[a.split]} images."
    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    tail = "more than the choice of images explains" if p < ALIKE else "which the choice of images alone could explain"
    kind = "alike" if p >= ALIKE else "better" if only_a > only_b else "worse"
    return kind, (
        f"On the same {len(a):,} {SPLITS[a.split]} images, {only_a} are right only with the teacher and {only_b} only "
        f"without, {tail} (McNemar's test, p = {p:.2g})."
    )


def _thumb(found: Answers, row: int, name: str, pixels: np.ndarray) -> dict[str, Any]:
    target, student = found.classes[found.target[row]], found.classes[found.student[row]]
    caption = [f"is {target}", f"student: {student}, {100 * float(found.student_p[row]):.0f} %"]
    if found.teacher_p is not None:
        caption.append(f"teacher: {100 * float(found.teacher_p[row]):.0f} % right")
    caption += [name] if name else []
    return {
        "data": picture_data(pixels),
        "alt": f"{target}, taken for {student}",
        "caption": caption,
        "tiny": max(pixels.shape[:2]) <= TINY,
    }


def _images(mask: np.ndarray) -> str:
    return f"{int(mask.sum()):,}"


def _signed(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:+.1f}".replace("-", "\u2212") if abs(value) >= 0.05 else "0.0"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:3])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
