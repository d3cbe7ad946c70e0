"""`pcdistill compare --students`: the same comparison for several students, with one teacher and one page for all."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pcdistill import report
from pcdistill.commands.claim import claimed
from pcdistill.commands.compare import RECORD as COMPARISON
from pcdistill.commands.compare import Plan, compare
from pcdistill.commands.first_teachers import one_spelling, with_teachers
from pcdistill.commands.folder import read_json
from pcdistill.commands.session import check_names
from pcdistill.commands.tasks import task_of
from pcdistill.commands.teachers import teacher_folder
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.files import atomic_write
from pcdistill.recipe import ALONE, Recipe
from pcdistill.stats import MARGIN

RECORD = "students.json"  # which folders the page is of


def student_recipes(text: str, make: Callable[[str], Recipe]) -> dict[str, Recipe]:
    """ "cifar/resnet8,cifar/resnet14" -> a recipe for each, by the folder of its comparison.

    Args:
        text: names with commas between.
        make: a student's name -> the comparison's recipe with it.

    Raises:
        InputError: fewer than two names, one twice, or two that would have one folder.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"--students must name two students or more, each once, got {text}")
    found = {}
    for name in names:
        folder = name.rsplit(":", 1)[-1].replace("/", "-")
        if folder == teacher_folder(0):
            raise InputError(f"--students: {name} would have the folder {folder}, which is the teacher's; rename it")
        if folder in found:
            raise InputError(f"--students: {name} and another one would both have the folder {folder}")
        found[folder] = make(name)
        if found[folder].student.weights is not None:
            raise InputError("--students: student.weights are of one student; leave them out")
    return found


def compare_students(
    recipe: Recipe, students: dict[str, Recipe], plan: Plan, out: Path, *, console: Console, command: str | None
) -> str:
    """A comparison for every student, in a folder of its own; a teacher without weights is trained once.

    Args:
        recipe: data, teacher, schedule.
        students: as :func:`student_recipes` gives them.
        plan: methods, seeds, strengths.
        out: holds the teacher, the comparisons and the page.
        console: progress.
        command: what the user typed.

    Returns:
        The comparisons' texts, one below the other.
    """
    for one in students.values():
        check_names(one, task_of(one))
    with claimed(out, "students", recipe):
        taught = students
        if any(method != ALONE for method in plan.methods):
            taught = with_teachers(
                recipe, students, one_spelling(out), console=console, command=command, pool=plan.pool
            )
        texts = []
        for name, one in taught.items():
            label = console.labelled(name)
            text = compare(one, plan, out / name, console=label, command=command)
            texts.append(f"{one.student.name}\n\n{text}")
        record = {"folders": list(students), "command": command, "margin": plan.margin}
        atomic_write(out / RECORD, json.dumps(record) + "\n")
        write_students(out)
    return "\n\n".join(texts)


def student_folders(out: Path) -> list[str]:
    """The folders of the comparisons that a page of several students is of.

    Raises:
        InputError: the record of them is damaged.
    """
    found = read_json(out / RECORD).get("folders")
    # Pages are written there, so it must be a folder in this one.
    if not isinstance(found, list) or not all(isinstance(name, str) and name == Path(name).name for name in found):
        raise InputError(f"{out / RECORD} is damaged; the command that made it writes it anew")
    return found


def runs_of(folder: Path, record: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders and results of a comparison's runs: METHOD/seed-N and METHOD/strength-S/seed-N.

    Args:
        folder: of the comparison.
        record: what its comparison.json holds. It names the runs, as others may lie beside them, of another call;
            records of earlier versions do not, and then all are taken.

    Raises:
        InputError: a result is damaged.
    """
    names = record.get("runs")
    if isinstance(names, list):
        places = [folder / str(name) / "result.json" for name in names]
    else:
        places = sorted([*folder.glob("*/seed-*/result.json"), *folder.glob("*/strength-*/seed-*/result.json")])
    for path in places:
        if found := read_json(path):
            yield path.parent, found
        elif path.exists():
            raise InputError(f"{path} is damaged; the command that made it trains this run anew")


def write_students(out: Path) -> Path:
    """The page of all students, from the results in their folders."""
    record = read_json(out / RECORD)
    results = {}
    for folder in student_folders(out):
        found = [result for _, result in runs_of(out / folder, read_json(out / folder / COMPARISON))]
        if found:
            name = next((str(r["student"].get("name")) for r in found if isinstance(r.get("student"), dict)), folder)
            results[name] = found
    return report.write_students_report(
        out, results, str(record.get("command") or ""), margin=float(record.get("margin", MARGIN))
    )
