"""`pcdistill tune`: a search on validation, and the winner against the recipe as it was, on seeds that it never saw."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pcdistill import report
from pcdistill.commands.cache import make_cache
from pcdistill.commands.claim import claimed, several
from pcdistill.commands.compare import (
    Key,
    Plan,
    carry_out,
    comparison_text,
    pair_lines,
    renamed,
    write_comparison,
)
from pcdistill.commands.contents import PresentContents
from pcdistill.commands.first_teachers import with_teachers
from pcdistill.commands.header import device_line, training_line
from pcdistill.commands.jobs import Pool, check_numbers, pool_of
from pcdistill.commands.session import check_names, open_data, try_own_student
from pcdistill.commands.tasks import task_of
from pcdistill.distillation.cache_replay import resolve_cache
from pcdistill.distillation.objective import method_kind, views_of
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console
from pcdistill.engine.placement import make_accelerator
from pcdistill.errors import InputError
from pcdistill.extras import need
from pcdistill.files import clear_parts
from pcdistill.recipe import ALONE, Recipe, with_method
from pcdistill.report.rows import kept_epoch, verdict_of
from pcdistill.stats import MARGIN, Verdict

if TYPE_CHECKING:
    from pcdistill.commands.search import Search, Space

DEFAULT, TUNED = "default", "tuned"
LARGEST_CACHE = 8e9  # bytes; of more, the trials run the teacher itself


@dataclass(frozen=True)
class TunePlan:
    """What is searched, and how it is carried out.

    Attributes:
        methods: names to choose from.
        trials: begun in all.
        seconds: for trials, over all sessions; None for no limit.
        final_seeds: on which winner and default are trained anew.
        margin: points of the metric; a difference below it may pass for none.
        jobs: runs at a time (see :func:`pcdistill.commands.jobs.shares`).
        threads: of each run; None divides the cores among the runs.
        pool: where the runs go, in the place of processes of this machine.
    """

    methods: Sequence[str]
    trials: int
    seconds: float | None = None
    final_seeds: int = 5
    margin: float = MARGIN
    jobs: int | Literal["auto"] = "auto"
    threads: int | None = None
    pool: Pool | None = None


def tune(recipe: Recipe, plan: TunePlan, out: Path, *, console: Console, command: str | None = None) -> str:
    """Search, compare the winner with the recipe as it was, and write the better one; the same call continues.

    Args:
        recipe: data, models, schedule, and the default that the winner must beat.
        plan: what is searched.
        out: folder of the search: best.yaml, trials.csv, the comparison's report.html, and a folder for every run.
        console: progress.
        command: what the user typed.

    Returns:
        Verdict, table and what was found, as text.

    Raises:
        InputError: wrong input, no optuna, or no trial that came to its end.
        Interrupted: stopped by a signal; the same call continues.
    """
    need("optuna", what="tune")
    from pcdistill.commands.search import Space

    check_numbers(plan.jobs, plan.threads)
    if several() > 1:
        raise InputError(
            f"tune is started as one process, and there are {several()}; --jobs or --cluster spread its trials"
        )
    if not recipe.all_teachers:
        raise InputError("tune needs a teacher (--teacher MODEL)")
    task = task_of(recipe)
    data = open_data(task, recipe.with_caches_of_seed(), make_accelerator(recipe.train))
    for seed in range(recipe.train.seed, recipe.train.seed + plan.final_seeds + 1):
        resolve_cache(replace(recipe, train=replace(recipe.train, seed=seed)))  # a cache of a seed may not be there
    space = Space(recipe, plan.methods, len(data.classes))
    for method in plan.methods:
        task.check(space.recipe(space.first(method), recipe), data)
    task.check(recipe, data)
    try_own_student(recipe, task, data)
    with claimed(out, "search", recipe):
        return _tune(recipe, plan, space, data, out, console=console, command=command)


def _tune(
    recipe: Recipe, plan: TunePlan, space: "Space", data: Any, out: Path, *, console: Console, command: str | None
) -> str:
    """As :func:`tune`, in a folder that is held."""
    from pcdistill.commands.search import Search, open_study

    try:
        study = open_study(out, recipe, plan.methods)
    except InputError:
        check_names(recipe, task_of(recipe), data)  # a mistyped name is not another recipe
        raise
    clear_parts(out)
    _say_header(recipe.with_caches_of_seed(), plan, data, out, console)
    how: dict[str, Any] = {"console": console, "command": command, "pool": plan.pool}
    (base,) = with_teachers(recipe, {DEFAULT: recipe}, out.resolve(), **how).values()
    PresentContents().settle_study(out, study, base.with_caches_of_seed())
    cached = _with_cache(base, plan.methods, data, (out / "cache").resolve(), console=console)
    limits: dict[str, Any] = {"trials": plan.trials, "seconds": plan.seconds}
    search = Search(study, space, cached, out=out, metric=task_of(recipe).metric, console=console, **limits)
    _search(search, plan, console)
    best = search.best()
    tuned = space.recipe(best.params, base)
    pair = {DEFAULT: base, f"trial-{best.number}": tuned}
    text, verdict = _compare(pair, plan, out, console=console, command=command)
    kept = base if verdict.kind == "worse" else tuned
    found = search.best_described()
    notes = [
        *(f"Made by: {line}" for line in (command or "pcdistill tune").splitlines()),
        f"Found: {found}",
        f"On {plan.final_seeds} fresh seeds, {verdict.sentence(TUNED, DEFAULT)}",
        *(["So this is the recipe as it was."] if kept is base else []),
    ]
    text_of = "".join(f"# {note}\n" for note in notes) + resolve_cache(kept).to_yaml()
    if _without_command(out / "best.yaml") != _lines(text_of):  # else it is what it was, and keeps what made it
        atomic_write(out / "best.yaml", text_of)
    last = "the recipe as it was, for what was found is worse" if kept is base else "what was found"
    return f"{text}\nfound: {found}\nwritten: {out / 'best.yaml'} ({last}), {out / 'trials.csv'}, {out / 'report.html'}"


def _lines(text: str) -> list[str]:
    """The lines of a best.yaml but for the command that made it."""
    return [line for line in text.splitlines() if not line.startswith("# Made by: ")]


def _without_command(file: Path) -> list[str]:
    return _lines(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else []


def _say_header(recipe: Recipe, plan: TunePlan, data: Any, out: Path, console: Console) -> None:
    """What a search is about to do, before anything is trained."""
    steps = -(-len(data.train) // recipe.train.accumulate)
    pool = pool_of(plan, plan.trials, recipe.train.device)
    for line in (
        *pair_lines(recipe, data, taught=True),
        f"methods {', '.join(plan.methods)}",
        f"train   {training_line(recipe, steps)}; {device_line(make_accelerator(recipe.train))}",
        f"trials  {plan.trials}, then {plan.final_seeds} fresh seeds of the best and of the recipe as it is; "
        f"{pool.described}",
        f"folder  {out}",
    ):
        console.say(line)


def _with_cache(recipe: Recipe, methods: Sequence[str], data: Any, folder: Path, *, console: Console) -> Recipe:
    """The recipe with a cache of its teacher, made in the folder, where all methods compare the logits of one view.

    Several teachers have no cache in common, and run themselves.
    """
    distilling = [with_method(recipe, method, recipe.train.seed) for method in methods if method != ALONE]
    if recipe.task != "classification" or recipe.teachers or recipe.teacher is None or not distilling:
        return recipe
    if recipe.teacher.cache is not None:
        return recipe
    logits = all(method_kind(term.method) == "logits" for one in distilling for term in one.losses)
    if not logits or any(views_of(one) != 1 for one in distilling):
        return recipe
    rows = len(data.train) * len(next(data.train.epoch(0)))
    size = 2.0 * recipe.train.epochs * rows * len(data.classes)  # in float16
    if size > LARGEST_CACHE:
        console.say(f"the teacher's cache would take {size / 1e9:.0f} GB: the trials run the teacher itself")
        return recipe
    with closing(console.labelled("cache")) as progress:
        make_cache(distilling[0], folder, epochs=recipe.train.epochs, console=progress)
    return replace(recipe, teacher=replace(recipe.teacher, cache=str(folder)))


def _search(search: "Search", plan: TunePlan, console: Console) -> None:
    """All trials; how many go at a time, and with how many threads, is the same in every session."""
    pool = pool_of(plan, plan.trials, search.base.train.device)
    console.start()
    try:
        for job, outcome in pool.run(search.jobs(), console=console, total=max(search.left, 1), judge=search.judge):
            search.take(job, outcome)
    finally:
        search.write_table()


def _compare(
    recipes: Mapping[str, Recipe], plan: TunePlan, out: Path, *, console: Console, command: str | None
) -> tuple[str, Verdict]:
    """The default and another recipe on seeds that follow the search's, in pairs: the table's text, and the verdict.

    Raises:
        InputError: a recipe has no run that ended.
    """
    first = recipes[DEFAULT].train.seed + 1
    runs = {
        Key(name, None, seed): resolve_cache(replace(one, train=replace(one.train, seed=seed)))
        for seed in range(first, first + plan.final_seeds)
        for name, one in recipes.items()
    }
    made = Plan(list(recipes), plan.final_seeds, jobs=plan.jobs, threads=plan.threads, pool=plan.pool)
    found = carry_out(runs, made, out, console=console, command=command)
    named = {key: DEFAULT if key.method == DEFAULT else TUNED for key in runs if key in found}
    results = [renamed(found[run], name) for run, name in named.items()]
    curves = {(name, run.seed): report.read_metrics(run.folder(out) / "metrics.csv") for run, name in named.items()}
    shown = {name: run.folder(out) for run, name in named.items() if run.seed == first}
    options: dict[str, Any] = {"margin": plan.margin, "baseline": DEFAULT}
    names = {run.folder(out).relative_to(out).as_posix(): name for run, name in named.items()}
    write_comparison(out, results, curves, shown, command=command, names=names, **options)
    rows = report.compare_rows(results, **options)
    verdict = next((verdict_of(row, kept_epoch(rows)) for row in rows if row.name == TUNED), None)
    if verdict is None:
        raise InputError("the runs on fresh seeds allow no comparison; the lines above say why")
    return comparison_text(results, **options), verdict
