"""Teachers that a command of several runs trains first, and what may go beside them."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pcdistill.commands.contents import PresentContents
from pcdistill.commands.folder import recorded_summary, refuse_another_run, refuse_stopped_run
from pcdistill.commands.jobs import Job, Outcome, Pool, SideBySide, shares, threads_of_torch
from pcdistill.commands.run import run_with_report
from pcdistill.commands.session import check_names, open_data
from pcdistill.commands.tasks import task_of
from pcdistill.commands.teachers import comes_from_cache, teacher_file, teacher_folder, teacher_recipe, training_of
from pcdistill.engine.console import Console
from pcdistill.engine.placement import make_accelerator
from pcdistill.errors import InputError, PcdistillError, TrainingStopped
from pcdistill.models.weights import check_file
from pcdistill.recipe import Recipe

K = TypeVar("K")


def with_teachers(
    recipe: Recipe,
    recipes: dict[K, Recipe],
    out: Path,
    *,
    console: Console,
    command: str | None,
    pool: Pool | None = None,
) -> dict[K, Recipe]:
    """The recipes, with teachers that are trained once, in `out`, where they have no weights for the classes.

    They are trained here, or where `pool` trains them.
    """
    teachers, recipes = untrained_teachers(recipe, recipes, out, command)
    for job in teachers:
        train_teacher(job, pool, console)
    return recipes


def untrained_teachers(
    recipe: Recipe, recipes: dict[K, Recipe], out: Path, command: str | None
) -> tuple[list[Job], dict[K, Recipe]]:
    """Trainings of the teachers that have no weights for the classes, in `out`, and the recipes with these weights.

    Students alone need none. Their recipes name the weights all the same: so they stay what they are when others come.

    Raises:
        InputError: `out` holds the training of another teacher.
        TrainingStopped: a teacher's training was stopped in an earlier call.
    """
    todo: list[Job] = []
    needed = any(one.distils for one in recipes.values())
    for number in range(len(recipe.all_teachers)):
        try:
            trained = trained_first(recipe, number)
        except InputError:  # it cannot be had
            if needed:
                raise
            continue
        if trained is None:
            continue
        name = teacher_folder(number)
        changes = {"weights": str(teacher_file(out / name)), "pretrained": False}
        recipes = {key: _with_teacher(one, number, changes) for key, one in recipes.items()}
        if not needed:
            continue
        refuse_other_runs({out / name: trained}, out)
        refuse_stopped_run(out / name, trained, root=out)
        summary = recorded_summary(out / name, trained)
        # Of a teacher that is done the weights may be gone; what needs them says so.
        weights = teacher_file(out / name)
        gone = not any(path.exists() for path in (weights, out / name / "best.pt", out / name / "last.pt"))
        if summary is not None and (weights.exists() or gone):
            PresentContents().settle(out / name, trained, summary)
        else:
            todo.append(Job(name, trained, out / name, command, role="teacher"))
    return todo, recipes


def one_spelling(out: Path) -> Path:
    """A folder as it is spelled from the working directory: what is trained in it is named in the runs' recipes.

    Another spelling would make another recipe; and with all of it moved, relative paths stay right.
    """
    with suppress(ValueError):  # it may lie on another drive
        inside = Path(os.path.relpath(out))
        return out.resolve() if inside.parts[:1] == ("..",) else inside
    return out.resolve()


def train_teacher(job: Job, pool: Pool | None, console: Console) -> None:
    """Train a teacher, here or where the pool does.

    Raises:
        InputError: wrong input.
        TrainingStopped: it was stopped.
        PcdistillError: the operating system refused something that it needs.
    """
    if pool is None:
        with threads_of_torch(job.threads) if job.threads else nullcontext():
            run_with_report(job.recipe, job.out, console=console.labelled(job.name), command=job.command, role=job.role)
        return
    for _, outcome in pool.run([job], console=console):
        check_teacher(outcome)
        console.say(f"{job.name}: {value_text(outcome.summary or {})}")


def check_teacher(outcome: Outcome) -> None:
    """Raise what a teacher's training ended with, unless it is done."""
    errors = {"stopped": TrainingStopped, "failed": InputError, "refused": PcdistillError}
    if outcome.status in errors:
        raise errors[outcome.status](outcome.text)


def in_order(teachers: Sequence[Job], jobs: Sequence[Job], ended: Mapping[str, Outcome]) -> Iterator[Job | None]:
    """Teachers, then the jobs in their order, of which only those without a teacher come before all teachers ended.

    It ends after all teachers have, so that none fails unseen.

    Raises:
        PcdistillError: what a teacher's training ended with.
    """
    waiting = [*teachers, *jobs]
    while waiting or len(ended) < len(teachers):
        trained = len(ended) == len(teachers)
        job = next((one for one in waiting if trained or not one.recipe.distils), None)
        if job is not None:
            waiting.remove(job)
        yield job
        for outcome in ended.values():
            check_teacher(outcome)


def check_weights(jobs: Sequence[Job], teachers: Sequence[Job]) -> None:
    """Raise InputError if a file that a new job needs is neither there nor made by the trainings of `teachers`.

    A job that goes on may need none; it says so itself.
    """
    made = {str(teacher_file(job.out)) for job in teachers}
    for job in (one for one in jobs if not (one.out / "last.pt").exists()):
        for config in (job.recipe.student, *(job.recipe.all_teachers if job.recipe.distils else ())):
            if config.weights is not None and config.weights not in made:
                check_file(config.weights)


def teacher_threads(recipes: Collection[Recipe], plan: SideBySide, device: str) -> int | None:
    """Of a teacher that is trained beside students without one: those that these leave. None: as many as there are.

    It depends on the plan alone, so a comparison that goes on after a stop trains the same teacher.
    """
    places = shares(plan.jobs, len(recipes), threads=plan.threads, device=device)
    beside = min(len(places) - 1, sum(not one.distils for one in recipes))
    each = places[0].threads
    return max(each, torch.get_num_threads() - beside * each) if beside else None


def refuse_other_runs(runs: Mapping[Path, Recipe], root: Path) -> None:
    """Pass over folders of a comparison that hold no runs of other recipes, before anything is trained.

    Raises:
        InputError: one does; or, before that, a name in its recipe is mistyped.
    """
    for folder, recipe in runs.items():
        try:
            refuse_another_run(folder, recipe, root=root)
        except InputError:
            check_names(recipe, task_of(recipe))
            raise


def _with_teacher(recipe: Recipe, number: int, changes: dict[str, Any]) -> Recipe:
    """The same with one of its teachers changed."""
    teachers = list(recipe.all_teachers)
    teachers[number] = replace(teachers[number], **changes)
    return recipe.with_teachers(teachers)


def trained_first(recipe: Recipe, number: int) -> Recipe | None:
    """The recipe that trains a teacher first; the data are opened only if that depends on their classes."""
    config = recipe.all_teachers[number]
    if comes_from_cache(config) or (config.weights is None and not config.pretrained):
        return teacher_recipe(recipe, number)
    if config.weights is not None and (config.epochs == 0 or "mismatched-weights" not in recipe.allow):
        return None
    task = task_of(recipe)
    return training_of(recipe, number, task, open_data(task, recipe, make_accelerator(recipe.train)))


def value_text(summary: dict[str, Any]) -> str:
    """A run's last result in words; without one, how it ended."""
    last = summary.get("last")
    if not last:
        return str(summary.get("status", "no result"))
    metric = summary["metric"]
    return f"{(last['test'] or last['val'])[metric]:.2f} % {'AP' if metric == 'map' else 'top-1'}"
