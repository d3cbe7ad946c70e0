"""The search of `pcdistill tune`: what may be tried, and the trials, which Optuna proposes and gives up early."""

import ast
import csv
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from pcdistill.commands.folder import changes, differing, suggestion
from pcdistill.commands.jobs import Job, Outcome
from pcdistill.distillation.cache_replay import resolve_cache
from pcdistill.distillation.objective import at_strength, method_options, term_needs
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console
from pcdistill.errors import InputError, PcdistillError
from pcdistill.recipe import ALONE, Recipe, TermConfig, with_method

STRENGTHS = (0.5, 32.0)
FIRST_STRENGTH = 4.0  # where every method begins; docs/tuning.md says why
RATES = 4.0  # the learning rate is at most so many times greater or smaller than the recipe's
OPTIONS = {"temperature": (1.0, 8.0), "power": (0.1, 1.0)}  # of losses that have them; TTM's power is 1 / temperature
MOST_STAGES = 5
REDUCTION = 2  # at every rung about one trial of so many goes on, and the next rung is so many times later
FIRST_RUNG = 4  # the first rung is after 1 / 4 of a run; earlier ones would judge noise
CHECKPOINTS = ("last.pt", "best.pt")
STUDY = "tune"


class Space:
    """What a trial may set, and the recipe that it makes.

    Args:
        recipe: everything else; its method is replaced.
        methods: names to choose from.
        classes: C, which bounds PCD's stages.
    """

    def __init__(self, recipe: Recipe, methods: Sequence[str], classes: int) -> None:
        self.recipe_of = {method: with_method(recipe, method, recipe.train.seed) for method in methods}
        self.rate = recipe.optim.lr
        self.methods = list(methods)
        self.stages = max(min(MOST_STAGES, classes // 2), 1)
        self.options = {method: _options(one) for method, one in self.recipe_of.items()}
        self.strong = {method for method, one in self.recipe_of.items() if at_strength(one, 1.0) is not None}

    def first(self, method: str) -> dict[str, Any]:
        """What the method begins with: its own options at the recipe's rate, at one strength for all."""
        found: dict[str, Any] = {"method": method}
        if method in self.strong:
            found["strength"] = FIRST_STRENGTH
        for name, default in self.options[method].items():
            low, high = (1, self.stages) if name == "stages" else OPTIONS[name]
            found[f"{method}.{name}"] = min(max(default, low), high)
        return {**found, "rate": self.rate}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A trial's settings; what it was given before it keeps."""
        method = trial.suggest_categorical("method", self.methods)
        if method in self.strong:
            trial.suggest_float("strength", *STRENGTHS, log=True)
        for name in self.options[method]:
            if name == "stages":
                trial.suggest_int(f"{method}.stages", 1, self.stages)
            else:
                trial.suggest_float(f"{method}.{name}", *OPTIONS[name], log=True)
        trial.suggest_float("rate", self.rate / RATES, self.rate * RATES, log=True)
        return trial.params

    def recipe(self, settings: dict[str, Any], base: Recipe) -> Recipe:
        """The settings in a recipe: `base`, with the method, its options, its strength and the rate."""
        method = settings["method"]
        one = with_method(base, method, base.train.seed)
        chosen = {name: _short(settings[f"{method}.{name}"]) for name in self.options[method]}
        terms = tuple(_with_options(term, chosen) for term in one.losses)
        one = replace(one, losses=terms, optim=replace(one.optim, lr=_short(settings["rate"])))
        if "strength" in settings:
            strong = at_strength(one, _short(settings["strength"]))
            assert strong is not None
            one = strong
        return one


def described(settings: dict[str, Any]) -> str:
    """ "dist, strength 4, temperature 2.1, rate 0.05"."""
    method = settings["method"]
    named = {key.removeprefix(f"{method}."): value for key, value in settings.items() if key != "method"}
    return ", ".join([method, *(f"{name} {_short(value):g}" for name, value in named.items())])


class Search:
    """The trials: which comes next, whether to go on with one, and which was best. All is kept in a file at once.

    Every proposal is drawn from a generator of its own, seeded with the trial's number. So, with one trial at a time, a
    search that goes on after a kill proposes what it would have proposed.

    Args:
        study: from :func:`open_study`.
        space: what may be tried.
        base: the recipe that trials are made of, with the teacher and its cache.
        out: the folder; a trial's own lies in trials/.
        metric: of validation, which is to be high.
        trials: begun in all, those of earlier sessions among them.
        seconds: spent in all; None for no limit.
        console: progress.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        base: Recipe,
        *,
        out: Path,
        metric: str,
        trials: int,
        seconds: float | None,
        console: Console,
    ) -> None:
        self.study, self.space, self.base, self.out = study, space, base, out
        self.metric, self.trials, self.limit, self.console = f"val/{metric}", trials, seconds, console
        self._going: dict[str, Trial] = {}
        self._reported: dict[str, dict[int, float]] = {}  # by trial and epoch
        self._late: set[str] = set()  # trials that the time ran out on
        self._spent = float(self.study.user_attrs.get("seconds", 0.0))
        self._since = time.monotonic()
        for method in space.methods:
            self.study.enqueue_trial(space.first(method), skip_if_exists=True)

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return max(self.trials - self._count(ended=True), 0)

    def jobs(self) -> Iterator[Job]:
        """The trials, one when it is asked for; those that a killed process left unfinished come first."""
        self._since = time.monotonic()
        for unfinished in self.study.get_trials(states=(TrialState.RUNNING,)):
            if self._over():
                return
            self._seed(unfinished.number)
            trial = Trial(self.study, unfinished._trial_id)
            self._reported[self._name(trial)] = dict(unfinished.intermediate_values)
            yield self._job(trial)
        while self._count() < self.trials and not self._over():
            self._seed(self._count())
            yield self._job(self.study.ask())

    def judge(self, job: Job, row: dict[str, float]) -> bool:
        """Whether to go on with a trial after an epoch with this row."""
        trial, epoch = self._going[job.name], int(row["epoch"])
        value, before = row[self.metric], self._reported.setdefault(job.name, {})
        if job.recipe.train.keep == "best":
            value = max(value, *before.values()) if before else value
        if epoch not in before:  # else it was told before a kill
            before[epoch] = value
            trial.report(value, epoch)
        if epoch == job.recipe.train.epochs:
            return True
        if self._over():
            self._late.add(job.name)
            return False
        return not trial.should_prune()

    def take(self, job: Job, outcome: Outcome) -> None:
        """Keep how a trial ended.

        Raises:
            PcdistillError: the operating system refused something that it needs.
        """
        trial = self._going.pop(job.name)
        self.study.set_user_attr("seconds", self._seconds())
        if outcome.status == "refused":  # the trial can go on when the disk can
            raise PcdistillError(f"{job.name}: {outcome.text}")
        if job.name in self._late:
            self.console.say(f"{job.name}: the time is over; with a longer --time-limit the same command continues it")
            return
        if outcome.status == "done" and outcome.summary is not None:
            value = self._value(outcome.summary["history"])
            self.study.tell(trial, value)
            said = f"{value:.2f} % on validation"
        else:
            failed = outcome.status == "failed"
            self.study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)
            frozen = self.study.trials[trial.number]
            best = max(frozen.intermediate_values.values(), default=float("nan"))
            said = outcome.text or f"given up after epoch {frozen.last_step} at {best:.2f} % on validation"
        line = f"[{self._count(ended=True)}/{self.trials}] {job.name}: {described(trial.params)}: {said}"
        (self.console.warn if outcome.status in ("failed", "stopped") else self.console.say)(line)
        if outcome.status == "failed":  # its folder may hold what is not its own
            return
        for name in CHECKPOINTS:  # only now: a trial that was not told is continued from them
            (job.out / name).unlink(missing_ok=True)

    def best(self) -> FrozenTrial:
        """The trial with the highest value on validation, the first of equals.

        Raises:
            InputError: none was trained to its end.
        """
        ended = self.study.get_trials(states=(TrialState.COMPLETE,))
        if not ended:
            raise InputError(
                "no trial was trained to its end; the lines above say why. A greater --trials or --time-limit goes on"
            )
        return max(ended, key=lambda trial: (trial.value or 0.0, -trial.number))

    def best_described(self) -> str:
        """The best trial in a line."""
        best = self.best()
        return f"{described(best.params)} (trial {best.number}, {best.value:.2f} % on validation)"

    def write_table(self) -> None:
        """trials.csv: every trial's number, state, value, epochs and settings."""
        text = io.StringIO()
        trials = [trial for trial in self.study.trials if trial.state != TrialState.WAITING]
        columns = list(dict.fromkeys(key for trial in trials for key in trial.params))
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", self.metric, "epochs", *columns])
        for trial in trials:
            settings = [trial.params.get(key, "") for key in columns]
            value = max(trial.intermediate_values.values(), default="") if trial.value is None else trial.value
            writer.writerow(
                [trial.number, trial.state.name.lower(), value, trial.last_step or 0, *map(_cell, settings)]
            )
        path = self.out / "trials.csv"
        if not (path.exists() and path.read_bytes() == text.getvalue().encode()):
            atomic_write(path, text.getvalue())

    def _job(self, trial: Trial) -> Job:
        name = self._name(trial)
        self._going[name] = trial
        recipe = resolve_cache(self.space.recipe(self.space.suggest(trial), self.base))
        return Job(name, recipe, self.out / "trials" / f"{trial.number:03d}", trial=True)

    def _name(self, trial: Trial) -> str:
        return f"trial {trial.number}"

    def _seed(self, number: int) -> None:
        self.study.sampler = TPESampler(seed=(self.base.train.seed * 1_000_003 + number) % 2**32)

    def _count(self, *, ended: bool = False) -> int:
        """Trials that were begun, or that have ended."""
        waiting = (TrialState.WAITING, TrialState.RUNNING) if ended else (TrialState.WAITING,)
        return sum(trial.state not in waiting for trial in self.study.get_trials(deepcopy=False))

    def _value(self, history: Sequence[dict[str, float]]) -> float:
        values = [row[self.metric] for row in history]
        return max(values) if self.base.train.keep == "best" else values[-1]

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._since

    def _over(self) -> bool:
        return self.limit is not None and self._seconds() > self.limit


def open_study(out: Path, recipe: Recipe, methods: Sequence[str]) -> optuna.Study:
    """The study in the folder, begun or continued. Only one process at a time writes to it.

    Raises:
        InputError: the folder holds the search of another recipe or of other methods.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = out / "study.log"
    _mend(file)
    epochs, warmup = recipe.train.epochs, math.ceil(recipe.optim.warmup_epochs)
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=_NoLock(str(file))))
    pruner = SuccessiveHalvingPruner(max(math.ceil(epochs / FIRST_RUNG), warmup + 1), reduction_factor=REDUCTION)
    own = {"recipe": recipe.digest(), "methods": list(methods)}
    try:  # opening one that is there writes nothing
        study = optuna.load_study(study_name=STUDY, storage=storage, pruner=pruner)
    except KeyError:
        study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize", pruner=pruner)
    if "of" not in study.user_attrs:
        study.set_user_attr("tree", recipe.to_dict())
        study.set_user_attr("of", own)
    elif study.user_attrs["of"] != own:
        before, tree = study.user_attrs["of"].get("methods"), study.user_attrs.get("tree")
        found = [] if before == own["methods"] else [f"--methods {','.join(before)} -> {','.join(methods)}"]
        found += [] if tree is None else changes(tree, recipe.to_dict())
        raise InputError(
            f"{out} holds the search of another recipe or other methods{differing(found)}; name another folder "
            f"(--out {suggestion(out)}), or delete {out}"
        )
    return study


class _NoLock(JournalFileOpenLock):
    """One process writes; and a lock that Ctrl-C meets while it is taken raises an error of its own."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _mend(file: Path) -> None:
    """Take away what a kill in the middle of a write leaves: half a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        text = file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            atomic_write(file, whole.decode())


def _options(recipe: Recipe) -> dict[str, float]:
    """Options of the recipe's terms that can be tuned, with the values that they have."""
    found: dict[str, float] = {}
    for term in recipe.losses:
        for option in method_options(term.method) if recipe.method != ALONE else ():
            if option.name not in (*OPTIONS, "stages") or not _compares(term):
                continue
            value = term.options.get(option.name, ast.literal_eval(option.default or "None"))
            if option.name == "stages" and value is None:
                value = 3
            if isinstance(value, int | float):
                found[option.name] = value
    return found


def _compares(term: TermConfig) -> bool:
    return term_needs(term).teacher and term.temperature_to is None


def _with_options(term: TermConfig, chosen: dict[str, float]) -> TermConfig:
    """The term with those of the options that it has."""
    if not _compares(term):
        return term
    own = {option.name for option in method_options(term.method)}
    return replace(term, options={**term.options, **{key: value for key, value in chosen.items() if key in own}})


def _short(value: float) -> float:
    """Three digits: a recipe to be read, and a trial's exact settings."""
    return value if isinstance(value, int) else float(f"{value:.3g}")


def _cell(value: Any) -> Any:
    return _short(value) if isinstance(value, float) else value
