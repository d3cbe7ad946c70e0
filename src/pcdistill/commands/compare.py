"""`pcdistill compare`: one student under several methods and seeds, against one teacher."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pcdistill import report
from pcdistill.commands.claim import claimed
from pcdistill.commands.contents import PresentContents
from pcdistill.commands.defaults import method_folder
from pcdistill.commands.ending import write_pages
from pcdistill.commands.first_teachers import (
    check_weights,
    in_order,
    one_spelling,
    refuse_other_runs,
    teacher_threads,
    train_teacher,
    trained_first,
    untrained_teachers,
    value_text,
)
from pcdistill.commands.folder import read_json, read_recipe, recorded_summary
from pcdistill.commands.header import (
    Told,
    data_lines,
    device_line,
    method_line,
    model_line,
    starts_from,
    training_line,
)
from pcdistill.commands.jobs import Job, Machine, Outcome, Pool, check_numbers, pool_of
from pcdistill.commands.session import bare_model, open_data, rehearse, try_own_student
from pcdistill.commands.tasks import task_of
from pcdistill.commands.teachers import facts_without_model, without_model
from pcdistill.distillation.cache_replay import resolve_cache
from pcdistill.distillation.objective import at_strength
from pcdistill.engine.console import Console, duration
from pcdistill.engine.placement import make_accelerator
from pcdistill.errors import InputError, PcdistillError, nearest
from pcdistill.files import atomic_write, clear_parts, new_digest
from pcdistill.methods import METHODS
from pcdistill.models.names import is_user_code
from pcdistill.recipe import ALONE, LOADERS, ModelConfig, Recipe, TeacherConfig, with_method
from pcdistill.report.compare_page import Curves
from pcdistill.report.strengths import shown_strengths
from pcdistill.stats import MARGIN

RECORD = "comparison.json"  # says what results the pages are of
GROUPS = {"all-logit": "logits", "all-feature": "features", "all-detection": "pyramids"}


def expand_methods(text: str, recipe: Recipe) -> list[str]:
    """ "none,kd,all-logit" -> names of methods, in order, once each.

    Raises:
        InputError: naming the unknown method and the nearest known one.
    """
    found: list[str] = []
    known = [ALONE, *METHODS, *recipe.methods, *GROUPS]
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        if name in GROUPS:
            own = ("ce", "detector")  # the tasks' own losses
            found += [k for k, m in METHODS.items() if (m.group or m.kind) == GROUPS[name] and k not in own]
        elif name in known or is_user_code(name):
            found.append(name)
        else:
            raise InputError(f'unknown method "{name}"{nearest(name, known)}; known: {", ".join(known)}')
    if not found:
        raise InputError("--methods must name at least one method")
    return list(dict.fromkeys(found))


def unasked(text: str, methods: Sequence[str]) -> list[str]:
    """Those of the methods that `--methods` names by a group alone."""
    named = {part.strip() for part in text.split(",")}
    return [method for method in methods if method not in named]


def parse_strengths(text: str | None) -> list[float]:
    """ "0.5,1,2" -> strengths, rising, once each; None gives none.

    Raises:
        InputError: something that is not a finite number above 0.
    """
    found = set()
    for part in [] if text is None else text.split(","):
        try:
            strength = float(part)
        except ValueError:
            strength = math.nan
        if not 0 < strength < math.inf:
            raise InputError(f'--equal-strength must be finite numbers above 0, as in 1,4,16; got "{part.strip()}"')
        found.add(strength)
    return sorted(found)


@dataclass(frozen=True)
class Plan:
    """What a comparison is made of, and how it is carried out.

    Attributes:
        methods: names; "none" trains the student alone.
        seeds: of each method, 0 .. seeds - 1.
        strengths: every method is trained at each of them; none: with the weights that its name stands for.
        margin: points of the metric; a difference below it may pass for none.
        jobs: runs at a time (see :func:`pcdistill.commands.jobs.shares`).
        threads: of each run; None divides the cores among the runs.
        optional: those of the methods that are left out where they do not fit, as nobody asked for them by name.
        pool: where the runs go, in the place of processes of this machine.
    """

    methods: Sequence[str]
    seeds: int
    strengths: Sequence[float] = ()
    margin: float = MARGIN
    jobs: int | Literal["auto"] = "auto"
    threads: int | None = None
    optional: Sequence[str] = ()
    pool: Pool | None = None


class Key(NamedTuple):
    """One run of a comparison."""

    method: str
    strength: float | None
    seed: int

    def __str__(self) -> str:
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return f"{self.method}{strength}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """A method's name is a folder; of a user's `path/file.py:Class` all of it, in earlier versions the Class."""
        method = out / method_folder(self.method)
        if is_user_code(self.method) and not method.exists():
            earlier = out / self.method.rsplit(":", 1)[-1]
            if any(read_recipe(file.parent).method == self.method for file in earlier.rglob("recipe.yaml")):
                method = earlier
        strength = method if self.strength is None else method / f"strength-{self.strength:g}"
        return strength / f"seed-{self.seed}"


def compare(recipe: Recipe, plan: Plan, out: Path, *, console: Console, command: str | None = None) -> str:
    """One student under several methods and seeds, against one teacher; finished runs are kept, so it can be resumed.

    Args:
        recipe: data, models, schedule; its method is replaced.
        plan: methods, seeds, strengths.
        out: folder of the comparison; in it one folder for each method, strength and seed.
        console: progress.
        command: what the user typed.

    Returns:
        Verdict and table as text; out/ then holds report.html, table.md and results.csv.

    Raises:
        InputError: wrong input; a method that cannot be built is known before anything is trained.
        TrainingStopped: the teacher was stopped, now or in an earlier call.
        Interrupted: stopped by a signal; the same call continues.
    """
    check_numbers(plan.jobs, plan.threads)
    recipes = _recipes(recipe, plan)
    with claimed(out, "comparison", recipe):
        return _compare(recipe, recipes, plan, out, console=console, command=command)


def _compare(
    recipe: Recipe, recipes: dict[Key, Recipe], plan: Plan, out: Path, *, console: Console, command: str | None
) -> str:
    """As :func:`compare`, in a folder that is held."""
    clear_parts(out)
    if recipe.method != ALONE and with_method(recipe, recipe.method, recipe.train.seed).losses != recipe.losses:
        console.warn(
            f"the recipe's own losses are left out: {recipe.method} is compared as its name stands for it; to compare "
            "them, give them a name under `methods`"
        )
    recipes = _fitting(recipe, recipes, plan, out, console)
    if not console.quiet and not all(recorded_summary(key.folder(out), one) for key, one in recipes.items()):
        say_header(recipe, recipes, plan, out, console)
    teachers, recipes = untrained_teachers(recipe, recipes, one_spelling(out), command)
    results = carry_out(recipes, plan, out, console=console, command=command, teachers=teachers)
    done = [key for key in recipes if key in results]
    ordered = [results[key] for key in done]
    chosen = shown_strengths(ordered)
    shown = [key for key in done if key.strength is None or key.strength == chosen.get(key.method)]
    curves = {(key.method, key.seed): report.read_metrics(key.folder(out) / "metrics.csv") for key in shown}
    drawn = {key.method: key.folder(out) for key in shown if key.seed == 0}
    runs = [key.folder(out).relative_to(out).as_posix() for key in done]
    write_comparison(out, ordered, curves, drawn, command=command, runs=runs, margin=plan.margin)
    return comparison_text(ordered, margin=plan.margin)


def comparison_text(results: Sequence[dict[str, Any]], **options: Any) -> str:
    """Verdict and tables: in the width of a terminal where standard output is one, else as Markdown."""
    make = report.terminal_text if sys.stdout.isatty() else report.comparison_text
    return make(results, **options)


def say_header(recipe: Recipe, recipes: Mapping[Key, Recipe], plan: Plan, out: Path, console: Console) -> None:
    """What a comparison is about to do, before anything is trained."""
    recipe = recipe.with_caches_of_seed()
    task, accelerator = task_of(recipe), make_accelerator(recipe.train)
    data = open_data(task, recipe, accelerator)
    lines = pair_lines(recipe, data, taught=any(one.distils for one in recipes.values()))
    for one in {key.method: one for key, one in recipes.items()}.values():
        lines.append(f"method  {method_line(one, task.outputs(data))}")
    steps = -(-len(data.train) // recipe.train.accumulate)
    lines.append(f"train   {training_line(recipe, steps)}; {device_line(accelerator)}")
    pool = pool_of(plan, len(recipes), recipe.train.device)
    lines += [f"runs    {len(recipes)}: {plan.seeds} seeds of each method; {pool.described}", f"folder  {out}"]
    for line in lines:
        console.say(line)


def pair_lines(recipe: Recipe, data: Any, *, taught: bool) -> list[str]:
    """Of a header of several runs: the data, the teachers if anything is `taught`, and the student."""
    task = task_of(recipe)
    lines = data_lines(recipe, data, -(-len(data.train) // recipe.train.accumulate))
    told: list[tuple[str, ModelConfig, str]] = [("student", recipe.student, starts_from(recipe.student, recipe.task))]
    for number, config in enumerate(recipe.all_teachers if taught else ()):
        trained = trained_first(recipe, number)
        first = "" if trained is None else f", and is trained first ({trained.train.epochs} epochs)"
        told.insert(number, ("teacher", config, starts_from(config, recipe.task) + first))
    for role, model, starts in told:
        if isinstance(model, TeacherConfig) and without_model(model):
            facts = facts_without_model(model, recipe.train.seed)
        else:
            facts = task.info(bare_model(recipe, model, task, data), data)
        lines.append(model_line(Told(role, model.name, starts, facts)))
    return lines


def renamed(result: dict[str, Any], name: str) -> dict[str, Any]:
    """A run's result under another name than its method's; the strength is then no axis of the comparison."""
    return {**{key: value for key, value in result.items() if key != "strength"}, "method": name}


def write_comparison(
    out: Path,
    results: Sequence[dict[str, Any]],
    curves: Curves,
    drawn: Mapping[str, Path],
    *,
    command: str | None,
    names: Mapping[str, str] | None = None,
    runs: Sequence[str] = (),
    **options: Any,
) -> None:
    """Pages of a comparison, and last comparison.json, which says what results they are of, and by which command.

    For the same results nothing is written but what is missing.

    Args:
        out: the comparison's folder.
        results: what the runs' result.json hold.
        curves: as :func:`pcdistill.report.write_compare_report` takes them.
        drawn: method to the folder of a run, whose images are shown.
        command: what the user typed.
        runs: their folders, relative to `out`; others may lie beside them, of another call.
        names: folder of a run, relative to `out`, to its name in the tables, where that is not its method.
        options: further ones of the report.
    """
    of = new_digest()
    of.update(json.dumps([list(results), options, *([dict(names)] if names else [])], sort_keys=True).encode())
    same = read_json(out / RECORD).get("of") == of.hexdigest()
    report.write_compare_report(out, results, curves, command or "", drawn=drawn, missing_only=same, **options)
    if not same:
        which = {"names": dict(names)} if names else {"runs": list(runs)}
        record = {"of": of.hexdigest(), "command": command, **which, **options}
        atomic_write(out / RECORD, json.dumps(record) + "\n")


def _fitting(recipe: Recipe, recipes: dict[Key, Recipe], plan: Plan, out: Path, console: Console) -> dict[Key, Recipe]:
    """The runs that can be carried out; every method that is still to be trained is tried before the first one is.

    Raises:
        InputError: methods that were asked for by name do not fit, each with its sentence.
    """
    waiting = {key: one for key, one in recipes.items() if not (key.folder(out) / "result.json").exists()}
    if not waiting or recipe.data.name == LOADERS:
        return recipes
    task = task_of(recipe)
    data = open_data(task, next(iter(waiting.values())), make_accelerator(recipe.train))
    try_own_student(recipe, task, data)
    refused: dict[str, str] = {}
    told: set[str] = set()
    for key, one in waiting.items():
        if key.seed != min(other.seed for other in waiting) or key.method in refused:
            continue
        try:
            notes = rehearse(one, task, data)
        except InputError as error:
            refused[key.method] = str(error)
            continue
        for note in notes:
            if note not in told:
                console.say(note)
                told.add(note)
    asked = {method: text for method, text in refused.items() if method not in plan.optional}
    if asked:
        raise InputError("; ".join(f"{method}: {text}" for method, text in asked.items()))
    for method, text in refused.items():
        console.warn(f"{method} is left out: {text}")
    return {key: one for key, one in recipes.items() if key.method not in refused}


def _recipes(recipe: Recipe, plan: Plan) -> dict[Key, Recipe]:
    """Every run's recipe, seeds outermost: an interrupted comparison has every method at equal numbers of seeds."""
    found: dict[Key, Recipe] = {}
    for seed in range(plan.seeds):
        for method in plan.methods:
            one = resolve_cache(with_method(recipe, method, seed))
            stronger = {s: at_strength(one, s) for s in plan.strengths}
            found |= {Key(method, s, seed): strong for s, strong in stronger.items() if strong is not None}
            if not any(stronger.values()):
                found[Key(method, None, seed)] = one
    return found


def carry_out(
    recipes: dict[Key, Recipe],
    plan: Plan,
    out: Path,
    *,
    console: Console,
    command: str | None,
    teachers: Sequence[Job] = (),
) -> dict[Key, dict[str, Any]]:
    """The summaries of all runs: those that are there, then the others side by side; without those that failed.

    `teachers` are trained first. On a machine with room for several runs, students that need none go beside them.

    Raises:
        InputError: no run ended with a result, or a teacher failed.
        TrainingStopped: a teacher was stopped.
        PcdistillError: the operating system refused what all runs or a teacher need.
        Interrupted: stopped by a signal.
    """
    results: dict[Key, dict[str, Any]] = {}
    waiting: dict[str, Key] = {}
    refuse_other_runs({key.folder(out): recipe for key, recipe in recipes.items()}, out)
    present = PresentContents()
    for key, recipe in recipes.items():
        summary = recorded_summary(key.folder(out), recipe)
        if summary is None:
            waiting[str(key)] = key
            continue
        present.settle(key.folder(out), recipe, summary)
        results[key] = summary
        write_pages(key.folder(out), summary, missing_only=True)
        console.say(f"[{len(results)}/{len(recipes)}] {key}: {value_text(summary)}, as it was found")
    jobs = [Job(name, recipes[key], key.folder(out), command) for name, key in waiting.items()]
    check_weights(jobs, teachers)
    device = next(iter(recipes.values())).train.device
    todo = [replace(job, threads=teacher_threads(recipes.values(), plan, device)) for job in teachers]
    pool = pool_of(plan, len(recipes), device)
    ended: dict[str, Outcome] = {}
    if isinstance(pool, Machine) and len(pool.places) > 1 and not all(job.recipe.distils for job in jobs):
        total = len(todo) + len(jobs)
        console.start()
        outcomes = pool.run(in_order(todo, jobs, ended), console=console, total=total)
    else:
        for job in todo:
            train_teacher(job, plan.pool, console)
        total, todo = len(jobs), []
        console.start()
        outcomes = pool.run(jobs, console=console)
    failed = refused = 0
    for done, (job, outcome) in enumerate(outcomes, start=1):
        if job in todo:
            ended[job.name] = outcome
            if outcome.status == "done":
                console.say(f"{job.name}: {value_text(outcome.summary or {})}")
            continue
        key = waiting[job.name]
        if outcome.status in ("failed", "refused"):
            failed += 1
            refused += outcome.status == "refused"
            console.warn(f"{key} failed: {outcome.text}")
            continue
        if outcome.status == "stopped":
            console.warn(f"{key}: {outcome.text}")
        results[key] = outcome.summary or recorded_summary(job.out, job.recipe) or {}
        left = console.time_left(done / total)
        tail = f"  ({duration(left)} left)" if left and done < total else ""
        console.say(f"[{len(results)}/{len(recipes)}] {key}: {value_text(results[key])}{tail}")
    if failed:
        console.warn(
            f"{failed} of {len(jobs)} runs failed; the table is of the others. The same command tries them again"
        )
    if refused == len(recipes):
        raise PcdistillError("no run of the comparison could be carried out; the warnings above say why")
    if not results:
        raise InputError("no run of the comparison ended with a result; the warnings above say why")
    return results
