"""The command line: parse, call one function, print. A command imports what it needs when it runs."""

import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from pcdistill import __version__
from pcdistill.errors import WORDS, InputError, PcdistillError, is_text, os_sentence, told

if TYPE_CHECKING:
    from pcdistill.commands.jobs import Pool
    from pcdistill.engine.console import Console
    from pcdistill.recipe import Recipe

FLAG = arg(help_behavior_hint="")


def flag(metavar: str) -> Any:
    """How a flag that may be left out is shown: its metavar alone, no "(default: None)"."""
    return arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Key:
    """The recipe key that a flag sets."""

    name: str


def keys_of(command: Any) -> dict[str, Any]:
    """Recipe keys to values, of the flags that were given."""
    found = {}
    for name, hint in get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        for key in getattr(hint, "__metadata__", ()):
            if isinstance(key, Key) and value is not None and value != ():
                found[key.name] = list(value) if isinstance(value, tuple) else value
    return found


def with_home(command: Any) -> Any:
    """The command with ~ in its paths followed: a shell leaves that of --out=~/runs as it stands."""
    from pcdistill.files import home_followed

    values = {one.name: getattr(command, one.name) for one in fields(command)}
    paths = {name: home_followed(value) for name, value in values.items() if isinstance(value, Path)}
    return replace(command, **paths)


def refuse_keys(overrides: Iterable[str], refused: Mapping[str, str]) -> None:
    """Refuse `--set` of keys that the command itself decides.

    Args:
        overrides: strings KEY=VALUE.
        refused: dotted keys, with all below them, to what would be right.

    Raises:
        InputError: naming the key.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        for name, right in refused.items():
            if key == name or key.startswith(f"{name}."):
                raise InputError(f"--set {key} has no effect on this command: {right}")


def flags_of(command: Any) -> dict[str, str]:
    """Recipe keys to the flags that set them."""
    hints = get_type_hints(type(command), include_extras=True)
    return {
        key.name: f"--{name.replace('_', '-')}"
        for name, hint in hints.items()
        for key in getattr(hint, "__metadata__", ())
        if isinstance(key, Key)
    }


def words_of(command: Any) -> dict[str, str]:
    """Recipe keys that the user set to the flags that they typed."""
    given = keys_of(command)
    return {key: flag for key, flag in flags_of(command).items() if key in given}


@dataclass(frozen=True)
class Common:
    """Flags that every training command has; all else of a recipe by --set."""

    recipe: Annotated[Positional[str | None], flag("RECIPE|DATA")] = None
    """A shipped recipe's name (`pcdistill list recipes`) or a YAML file, by default one that fits the data; or the data
    itself, as for --data."""
    data: Annotated[str | None, flag("NAME|FOLDER|FILE.npz"), Key("data.name")] = None
    """digits, cifar10, cifar100, torchvision/NAME, a folder of class folders, or an .npz file; for detection
    digits-detection, coco:FOLDER, voc:FOLDER or yolo:data.yaml."""
    epochs: Annotated[int | None, flag("N"), Key("train.epochs")] = None
    """Length of the training."""
    batch_size: Annotated[int | None, flag("N"), Key("data.batch_size")] = None
    """Images in one step, over all processes."""
    lr: Annotated[float | None, flag("X"), Key("optim.lr")] = None
    """Base learning rate."""
    image_size: Annotated[int | None, flag("N"), Key("data.image_size")] = None
    """Side of the images in pixels."""
    limit: Annotated[int | None, flag("N"), Key("data.limit")] = None
    """Use only so many training images."""
    workers: Annotated[int | None, flag("N"), Key("data.workers")] = None
    """Processes that load images (folders only)."""
    download: Annotated[bool | None, flag("True|False"), Key("data.download")] = None
    """Download the data set if it is not there."""
    streamed: Annotated[bool | None, flag("True|False"), Key("data.streamed")] = None
    """Read the parquet files of hf:NAME where they lie, without a copy of all of them."""
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        flag("auto|float32|bfloat16|float16"),
        Key("train.precision"),
    ] = None
    """Arithmetic of the models."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, flag("auto|cpu|cuda|mps"), Key("train.device")] = (
        None
    )
    """Where to compute."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Any other key of the recipe, as often as needed: --set losses.dist.temperature=2 --set optim.clip_norm=1."""
    allow: Annotated[
        UseAppendAction[tuple[Literal["weak-teacher", "mismatched-weights", "class-order"], ...]], Key("allow")
    ] = ()
    """Go on although the named check fails."""
    out: Annotated[Path | None, flag("FOLDER")] = None
    """Folder of the run, by default one in runs/; the same command continues an interrupted one."""
    print_config: Annotated[bool, FLAG] = False
    """Print the resolved recipe and stop."""
    quiet: Annotated[bool, FLAG] = False
    """Show warnings and results only."""
    json: Annotated[bool, FLAG] = False
    """Print the result as JSON instead of text."""

    NAME: ClassVar[str]

    def run(self, command: str) -> None:
        from pcdistill.commands.claim import leads

        recipe = self.load()
        if self.print_config:
            from pcdistill.commands.printed import printed_recipe

            if leads():
                print(printed_recipe(recipe, self.console(self.NAME)), end="")
            return
        from pcdistill.commands.defaults import default_folder, first_line

        out = self.out or default_folder(recipe, self.folder_of())
        console = self.console(self.NAME)
        if console.live:  # PyTorch takes seconds to come; a log can wait for them
            console.say(first_line(self.NAME, recipe))
        for key, name in self.by_size().items():
            console.say(f"no {flags_of(self).get(key, key)} was named: {name}, by the size of the images")
        text = self.carry_out(recipe, out, command)
        if not leads():  # the first process says it for all
            return
        if self.json:
            from pcdistill.commands.machine import machine_result

            text = json.dumps(machine_result(self.NAME, out), indent=2)
        print(text)

    def folder_of(self) -> str:
        """What the folder of the result is called after."""
        return self.NAME

    def load(self, **forced: Any) -> "Recipe":
        """The recipe of these flags; `forced` are dotted keys that the command itself decides."""
        from pcdistill.recipe import load_recipe, recipe_for

        values = {**self.by_size(), **self.named(), **forced}
        source = None if self.data_named() else self.recipe
        recipe = load_recipe(
            source or recipe_for(values.get("data.name", "digits")), self.set, values=values, words=words_of(self)
        )
        if self.cache_alone():
            from pcdistill.commands.defaults import by_cache_alone

            recipe = by_cache_alone(recipe)
        return recipe.with_caches_of_seed() if self.NAME in ("distill", "plan") else recipe

    def named(self) -> dict[str, Any]:
        """Recipe keys to values that the user named."""
        given = keys_of(self)
        if self.data_named():
            if "data.name" in given:
                raise InputError(f"{self.recipe} and --data {given['data.name']} both name data; leave one out")
            given["data.name"] = self.recipe
        return given

    def data_named(self) -> bool:
        """Whether the data stand where a recipe may stand."""
        from pcdistill.commands.defaults import data_argument

        return data_argument(self.recipe)

    def by_size(self) -> dict[str, str]:
        """Models that are chosen by the size of the images, where no recipe and no model is named."""
        from pcdistill.commands.defaults import models_by_size
        from pcdistill.recipe import recipe_for

        given = {**{text.partition("=")[0]: None for text in self.set}, **self.named()}
        data = str(given.get("data.name") or "digits")
        if (self.recipe is not None and not self.data_named()) or recipe_for(data) != "default":
            return {}
        found = models_by_size(data, given)
        return {key: name for key, name in found.items() if key in flags_of(self)}

    def cache_alone(self) -> bool:
        """Whether the teacher is there by its cache alone."""
        given = {*keys_of(self), *(text.partition("=")[0] for text in self.set)}
        named = {key for key in given if key.startswith("teacher")}
        return named == {"teacher.cache"}

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        """Do it, and say what came out; `command` is what the user typed."""
        raise NotImplementedError

    def console(self, label: str) -> "Console":
        from pcdistill.commands.claim import leads
        from pcdistill.engine.console import Console

        return Console(label, quiet=self.quiet or not leads())


@dataclass(frozen=True)
class Seeded:
    """The seed of a single run."""

    seed: Annotated[int | None, flag("N"), Key("train.seed")] = None
    """Seed of initialisation, order and augmentation."""


@dataclass(frozen=True)
class OneTeacher:
    """The teacher and its weights."""

    teacher: Annotated[str | None, flag("MODEL"), Key("teacher.name")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME, path/to/file.py:function or http://HOST/v2/models/NAME."""
    teacher_call: Annotated[bool | None, flag("True|False"), Key("teacher.call")] = None
    """The function is called with images [N, C, H, W] and gives logits [N, K]; without, it builds a module."""
    teacher_weights: Annotated[str | None, flag("FILE"), Key("teacher.weights")] = None
    """The teacher's weights: .safetensors, or a state dict (.pt, .pth)."""
    teacher_pretrained: Annotated[bool | None, flag("True|False"), Key("teacher.pretrained")] = None
    """Start the teacher from its zoo's pretrained weights, or its backbone's (default: where there are any)."""
    unlabelled: Annotated[str | None, flag("FOLDER|FILE.npz|rest"), Key("data.unlabelled")] = None
    """Images without labels for the distillation terms; rest: the training images that --limit leaves out."""


@dataclass(frozen=True)
class Pair(OneTeacher):
    """Teacher and student."""

    student: Annotated[str | None, flag("MODEL"), Key("student.name")] = None
    """The student: a name of the same kinds."""
    teacher_epochs: Annotated[int | None, flag("N"), Key("teacher.epochs")] = None
    """Train the teacher first for so many epochs, when it has no weights for these classes."""
    teacher_cache: Annotated[str | None, flag("FOLDER"), Key("teacher.cache")] = None
    """What `pcdistill cache` made: its logits stand in for the teacher's in training."""
    student_weights: Annotated[str | None, flag("FILE"), Key("student.weights")] = None
    """Weights that the student starts from."""
    student_pretrained: Annotated[bool | None, flag("True|False"), Key("student.pretrained")] = None
    """Start the student from its zoo's pretrained weights (default: as the recipe says; for detectors where there are
    any)."""


@dataclass(frozen=True)
class Train(Common, Seeded):
    """Train a model without a teacher (a teacher, for instance)."""

    NAME = "train"

    model: Annotated[str | None, flag("MODEL"), Key("student.name")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME or path/to/file.py:function."""
    weights: Annotated[str | None, flag("FILE"), Key("student.weights")] = None
    """Weights to start from."""
    pretrained: Annotated[bool | None, flag("True|False"), Key("student.pretrained")] = None
    """Start from the zoo's pretrained weights."""

    def load(self, **forced: Any) -> "Recipe":
        alone = "it trains without a teacher; `pcdistill distill` has one"
        refuse_keys(self.set, dict.fromkeys(("method", "losses", "teacher", "teachers", "teachers_combine"), alone))
        return replace(super().load(method="none"), teacher=None, teachers=())

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.run import result_text, run_with_report

        return result_text(run_with_report(recipe, out, console=self.console("train"), command=command).summary, out)


@dataclass(frozen=True)
class Distill(Common, Seeded, Pair):
    """Distil a teacher into a student."""

    NAME = "distill"

    method: Annotated[str | None, flag("METHOD"), Key("method")] = None
    """A method's name (`pcdistill list methods`) or path/to/file.py:Class."""
    baseline: Annotated[bool, FLAG] = False
    """Also train the same student without the teacher, on the same batches: the page then says whether it helped."""

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.run import result_text, run_with_baseline, run_with_report

        console = self.console(recipe.method)
        if self.baseline:
            return run_with_baseline(recipe, out, console=console, command=command)
        return result_text(run_with_report(recipe, out, console=console, command=command).summary, out)


@dataclass(frozen=True)
class Planned(Common, Seeded, Pair):
    """Measure a few steps, and say what a distillation will cost: time, memory, disk, and what bounds its speed."""

    NAME = "plan"

    method: Annotated[str | None, flag("METHOD"), Key("method")] = None
    """A method's name (`pcdistill list methods`) or path/to/file.py:Class."""
    data_size: Annotated[int | None, flag("N")] = None
    """Also say it for an epoch of so many images."""
    nodes: int = 1
    """Also say it for so many machines."""
    gpus: int = 1
    """Devices of each machine, each as fast as the one here."""
    link: float = 100.0
    """Gigabits a second between two machines."""
    top_k: Annotated[int | None, flag("N")] = None
    """Logits of an image in a cache of the largest, by default 100 of more than 200."""
    out: tyro.conf.Suppress[Path | None] = None

    def run(self, command: str) -> None:
        recipe = self.load()
        if self.print_config:
            from pcdistill.commands.printed import printed_recipe

            print(printed_recipe(recipe, self.console(self.NAME)), end="")
            return
        from pcdistill.commands.plan import Wanted, plan

        wanted = Wanted(self.data_size, self.nodes, self.gpus, self.link, self.top_k)
        found = plan(recipe, wanted, self.console(self.NAME))
        text = found.pop("text")
        print(json.dumps(found, indent=2) if self.json else text)


MOST_SEEDS = 1000
OF_COMPARE = {
    "method": "name the methods with --methods",
    "losses": "every method has its own terms; define a method with others in the recipe, under `methods`",
    "train.seed": "the seeds are 0 to N - 1; give their number with --seeds",
}


@dataclass(frozen=True)
class SideBySide:
    """How many runs go at a time."""

    jobs: Annotated[str, arg(metavar="auto|N")] = "auto"
    """Runs at a time; auto: one for each GPU, or for each core or group of --threads cores."""
    threads: Annotated[int | None, flag("N")] = None
    """Threads of each run; by default the cores are divided. On a CPU results depend on it, in rounding."""

    @property
    def at_a_time(self) -> "int | Literal['auto']":
        if self.jobs == "auto":
            return "auto"
        if not re.fullmatch("[0-9]{1,6}", self.jobs):
            raise InputError(f"--jobs must be auto or a number, got {self.jobs}")
        return int(self.jobs)


@dataclass(frozen=True)
class OnCluster(SideBySide):
    """Where the runs go."""

    cluster: Annotated[str | None, flag("auto|ADDRESS")] = None
    """Give the runs to the nodes of a Ray cluster; auto: the one that this machine belongs to."""
    gpus_per_run: Annotated[float | None, flag("G")] = None
    """GPUs of each run on a cluster, e.g. 0.5; by default 1 where it has GPUs. Its CPUs are --threads."""

    @contextmanager
    def pool(self, recipe: "Recipe", out: Path) -> "Iterator[Pool | None]":
        """The cluster, checked, while its runs go on; without --cluster None."""
        if self.cluster is None:
            if self.gpus_per_run is not None:
                raise InputError("--gpus-per-run is of runs on a cluster; name one with --cluster")
            yield None
            return
        if self.jobs != "auto":
            raise InputError("--jobs is of one machine; with --cluster leave it out, the nodes decide")
        from pcdistill.extras import need

        need("ray", what="--cluster")
        from pcdistill.commands.cluster import connected
        from pcdistill.commands.cluster_nodes import Wanted

        with connected(Wanted(self.cluster, self.threads, self.gpus_per_run), recipe.train.device, out) as pool:
            yield pool


@dataclass(frozen=True)
class Compare(Common, Pair, OnCluster):
    """One student under several methods and seeds: mean, 95 % interval, paired test against KD."""

    NAME = "compare"

    methods: str = "none,kd,pcd"
    """Names with commas between; all-logit and all-feature stand for all of a kind."""
    seeds: int = 3
    """How many seeds each method gets."""
    margin: float = 0.5
    """Points of the metric: the verdict says whether a difference greater than this can be ruled out."""
    equal_strength: Annotated[str | None, flag("S,S,...")] = None
    """Train every method at these strengths: distillation pulls so many times as hard as the labels, e.g. 1,4,16."""
    students: Annotated[str | None, flag("MODEL,MODEL,...")] = None
    """Compare so for each of these students: a folder for each, and a page that weighs accuracy against cost."""

    def folder_of(self) -> str:
        from pcdistill.commands.defaults import STUDENTS

        return self.NAME if self.students is None else STUDENTS

    def load(self, **forced: Any) -> "Recipe":
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        if self.seeds > MOST_SEEDS:
            raise InputError(f"--seeds must be at most {MOST_SEEDS}, got {self.seeds}")
        if not 0 < self.margin < math.inf:
            raise InputError(f"--margin must be a finite number above 0, got {self.margin:g}")
        refuse_keys(self.set, OF_COMPARE)
        return super().load(**forced)

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.compare import Plan, compare, expand_methods, parse_strengths, unasked

        methods = expand_methods(self.methods, recipe)
        plan = Plan(
            methods,
            self.seeds,
            parse_strengths(self.equal_strength),
            margin=self.margin,
            jobs=self.at_a_time,
            threads=self.threads,
            optional=unasked(self.methods, methods),
        )
        if self.students is not None:
            from pcdistill.commands.students import compare_students, student_recipes

            students = student_recipes(self.students, lambda name: self.load(**{"student.name": name}))
            with self.pool(recipe, out) as pool:
                made = replace(plan, pool=pool)
                text = compare_students(recipe, students, made, out, console=self.console("compare"), command=command)
            return f"{text}\nwritten: {out / 'report.html'}"
        with self.pool(recipe, out) as pool:
            made = replace(plan, pool=pool)
            table = compare(recipe, made, out, console=self.console("compare"), command=command)
        return f"{table}\nwritten: {out / 'report.html'}, {out / 'table.md'}, {out / 'results.csv'}"


@dataclass(frozen=True)
class Tune(Common, Seeded, Pair, OnCluster):
    """Search method, strength and learning rate on validation, then compare the winner with the recipe as it was."""

    NAME = "tune"

    methods: str = "kd,dist,wttm,pcd,ldrld"
    """What to choose from: names with commas between."""
    trials: int = 30
    """How many settings to try."""
    time_limit: Annotated[float | None, flag("HOURS")] = None
    """Begin and go on with trials for so long, over all sessions."""
    final_seeds: int = 5
    """Fresh seeds on which the winner is compared with the recipe as it was."""
    margin: float = 0.5
    """Points of the metric: the verdict says whether a difference greater than this can be ruled out."""

    def load(self, **forced: Any) -> "Recipe":
        for name, value, least in (("--trials", self.trials, 1), ("--final-seeds", self.final_seeds, 2)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.final_seeds > MOST_SEEDS:
            raise InputError(f"--final-seeds must be at most {MOST_SEEDS}, got {self.final_seeds}")
        for name, limit in (("--time-limit", self.time_limit), ("--margin", self.margin)):
            if limit is not None and not 0 < limit < math.inf:
                raise InputError(f"{name} must be a finite number above 0, got {limit:g}")
        return super().load(**forced)

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.compare import expand_methods
        from pcdistill.commands.tune import TunePlan, tune

        plan = TunePlan(
            expand_methods(self.methods, recipe),
            self.trials,
            None if self.time_limit is None else self.time_limit * 3600,
            final_seeds=self.final_seeds,
            margin=self.margin,
            jobs=self.at_a_time,
            threads=self.threads,
        )
        with self.pool(recipe, out) as pool:
            return tune(recipe, replace(plan, pool=pool), out, console=self.console("tune"), command=command)


@dataclass(frozen=True)
class Cache(Common, Seeded, OneTeacher):
    """Store a teacher's logits for some epochs of augmented batches, so that students need not run it."""

    NAME = "cache"

    views: Annotated[Literal[1, 2], Key("data.views")] = 1
    """Views of each image: 2 for mlkd and cskd."""
    top_k: Annotated[int | None, flag("N")] = None
    """Store only so many logits of each image, and one value for the rest: smaller, not exact."""
    temperature: Annotated[float | None, flag("T")] = None
    """With --top-k: where the probability of the rest is kept (default: 4)."""
    storage: Annotated[Literal["float16", "int8"], flag("float16|int8")] = "float16"
    """Of one logit: int8 takes half the room, and rounds to 1/255 of a row's range."""

    def load(self, **forced: Any) -> "Recipe":
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k must be at least 1, got {self.top_k}")
        if self.temperature is not None and self.top_k is None:
            raise InputError("--temperature has no effect without --top-k: every logit is stored")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"--temperature must be a finite number above 0, got {self.temperature:g}")
        return super().load(method="kd", **forced)

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.cache import make_cache

        options: dict[str, Any] = {"top_k": self.top_k, "storage": self.storage}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        with closing(self.console("cache")) as console:
            info = make_cache(recipe, out, epochs=recipe.train.epochs, console=console, **options)
        size = info.epochs * info.batches * info.rows * info.row.itemsize / 1e6
        images = info.batches * info.rows
        from pcdistill.remote import place_of

        return f"cached {info.epochs} epochs of {images} images, {size:.1f} MB: --teacher-cache {place_of(out)}"


@dataclass(frozen=True)
class Demo(SideBySide):
    """Teacher, KD and PCD on real digits in minutes, or on digits with boxes (--task detection): no download."""

    task: Literal["classification", "detection"] = "classification"
    """What to demonstrate."""
    seeds: int | None = None
    """How many seeds each method gets; by default 5, or 3 for detection."""
    out: Path | None = None
    """Folder of the results; by default runs/demo or runs/demo-detection."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Any key of the demo's recipe."""
    quiet: Annotated[bool, FLAG] = False
    """Show results only."""
    json: Annotated[bool, FLAG] = False
    """Print the results as JSON instead of text."""

    def run(self, command: str) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        if self.seeds is not None and self.seeds > MOST_SEEDS:
            raise InputError(f"--seeds must be at most {MOST_SEEDS}, got {self.seeds}")
        refuse_keys(self.set, OF_COMPARE)
        from pcdistill.commands.demo import demo
        from pcdistill.engine.console import Console

        out = self.out or Path("runs/demo-detection" if self.task == "detection" else "runs/demo")
        console = Console("demo", quiet=self.quiet)
        table = demo(
            self.task,
            self.seeds,
            out,
            overrides=self.set,
            jobs=self.at_a_time,
            threads=self.threads,
            console=console,
            command=command,
        )
        if self.json:
            from pcdistill.commands.machine import machine_result

            print(json.dumps(machine_result("compare", out), indent=2))
            return
        print(table)
        print(f"report: {out / 'report.html'}")


@dataclass(frozen=True)
class Evaluate:
    """Top-1 and top-5 of a run's student, or of any model with weights."""

    folder: Annotated[Positional[Path | None], arg(name="run", metavar="RUN", help_behavior_hint="")] = None
    """A run's folder; data, model and weights are then its own."""
    data: Annotated[str | None, flag("NAME|FOLDER|FILE.npz"), Key("data.name")] = None
    """The data, if no run is named, or other data than the run's."""
    model: Annotated[str | None, flag("MODEL"), Key("student.name")] = None
    """The model, if no run is named."""
    weights: Annotated[str | None, flag("FILE")] = None
    """Its weights."""
    split: Annotated[Literal["test", "val", "train"] | None, flag("test|val|train")] = None
    """Which images; by default test, or where the data have no such split val."""
    image_size: Annotated[int | None, flag("N"), Key("data.image_size")] = None
    """Side of the images in pixels."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, flag("auto|cpu|cuda|mps"), Key("train.device")] = (
        None
    )
    """Where to compute."""
    json: Annotated[bool, FLAG] = False
    """Print the metrics as JSON alone, as a pipe gets them in any case."""

    def run(self, command: str) -> None:
        from pcdistill.commands.evaluate import evaluate_model, evaluation_recipe, evaluation_text
        from pcdistill.models import run_weights

        recipe = evaluation_recipe(self.folder, keys_of(self), words_of(self))
        kept = None if self.folder is None else str(run_weights(self.folder))
        found = evaluate_model(recipe, self.weights or kept, split=self.split)
        if not self.json:
            print(evaluation_text(found), file=sys.stderr)
        if self.json or not sys.stdout.isatty():  # what reads a pipe wants values
            print(json.dumps(found, indent=2))


@dataclass(frozen=True)
class Export:
    """Write a run's student in the form that production reads, and compare it on real images."""

    folder: Annotated[Positional[Path], arg(name="run", metavar="RUN", help_behavior_hint="")]
    """A run's folder."""
    to: Literal["onnx", "torch-export", "safetensors", "timm", "hf"] = "onnx"
    """The form; detectors: onnx or safetensors."""
    int8: Annotated[bool, FLAG] = False
    """Also in 8-bit integers, calibrated on 256 training images (onnx, classifiers)."""
    check: Annotated[str | None, flag("DATA")] = None
    """Data to compare and calibrate on, with the student's classes; by default the run's own."""
    out: Annotated[Path | None, flag("PATH")] = None
    """The file, or for timm and hf the folder; by default in export/ of the run's folder."""

    def run(self, command: str) -> None:
        from pcdistill.commands.export import Export, export

        export(self.folder, Export(self.to, self.int8, self.check, self.out), print)


@dataclass(frozen=True)
class Predict:
    """What a run's student says of image files: classes with probabilities, or boxes."""

    folder: Annotated[Positional[Path], arg(name="run", metavar="RUN", help_behavior_hint="")]
    """A run's folder."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES", help_behavior_hint="")]
    """Files, and folders, which are searched with all that is in them."""
    format: Annotated[Literal["csv", "json", "coco", "yolo"] | None, flag("csv|json|coco|yolo")] = None
    """csv or json for classifiers; csv, coco or yolo for detectors."""
    out: Annotated[Path | None, flag("PATH")] = None
    """Write to this file, for yolo to this folder; by default it is printed."""
    draw: Annotated[Path | None, flag("FOLDER")] = None
    """Also draw the answers on the images, into this folder."""
    top_k: int = 1
    """Classes per image (classifiers)."""
    score: Annotated[float | None, flag("X")] = None
    """Leave out boxes below it (detectors; by default 0.3, for coco 0)."""

    def run(self, command: str) -> None:
        from pcdistill.commands.predict import Predict, predict

        print(predict(self.folder, self.images, Predict(self.format, self.out, self.draw, self.top_k, self.score)))


@dataclass(frozen=True)
class Bench:
    """Latency and throughput of a run's student and teacher, or of any model, eager, compiled, in ONNX and int8."""

    what: Annotated[Positional[str], arg(name="run", metavar="RUN|MODEL", help_behavior_hint="")]
    """A run's folder, whose page and card then show the table; or a classifier's name."""
    batch_size: int = 64
    """Images of a batch, for the throughput."""
    image_size: Annotated[int | None, flag("N")] = None
    """Side of the images in pixels; by default the run's, or 224 (cifar/: 32)."""
    programs: str = "eager,compiled,onnx,int8"
    """What to measure: names with commas between."""
    seconds: float = 2.0
    """How long each figure is measured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where eager and compiled models run; ONNX Runtime runs on the CPU."""

    def run(self, command: str) -> None:
        from pcdistill.commands.bench import Bench, bench

        programs = tuple(name.strip() for name in self.programs.split(",") if name.strip())
        if not programs:
            raise InputError("--programs must name at least one of eager, compiled, onnx and int8")
        plan = Bench(self.batch_size, self.image_size, programs, self.seconds, self.device)
        print(bench(self.what, plan, lambda line: print(line, file=sys.stderr)))


@dataclass(frozen=True)
class Report:
    """Make the pages of a run or a comparison anew, from what its folder holds."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help_behavior_hint="")]
    """Of a run, a comparison, or a comparison of several students."""

    def run(self, command: str) -> None:
        from pcdistill.commands.pages import remake_pages, written

        print(written(remake_pages(self.folder)))


@dataclass(frozen=True)
class CheckData:
    """What a data set holds, what was repaired or left out in reading it, what looks wrong; a page of samples."""

    data: Annotated[Positional[str], arg(metavar="DATA"), Key("data.name")]
    """As for --data: a name, a folder, an .npz file, or coco:, voc: or yolo: and a folder or annotation file."""
    task: Annotated[Literal["classification", "detection"] | None, flag("classification|detection")] = None
    """What the data is for; by default what it looks like."""
    samples: int = 12
    """Images on the page."""
    val_fraction: Annotated[float | None, flag("X"), Key("data.val_fraction")] = None
    """Share of the training images that validation gets if the data has none."""
    streamed: Annotated[bool | None, flag("True|False"), Key("data.streamed")] = None
    """As of the training commands."""
    out: Annotated[Path | None, flag("FILE")] = None
    """The page; by default in runs/."""
    json: Annotated[bool, FLAG] = False
    """Print JSON instead of text."""

    def run(self, command: str) -> None:
        from pcdistill.commands.check_data import check_data, default_page, findings_text
        from pcdistill.recipe import DataConfig
        from pcdistill.report.data_page import write_data_page

        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise InputError(f"--val-fraction must be between 0 and 1, got {self.val_fraction:g}")
        config = DataConfig(**{key.removeprefix("data."): value for key, value in keys_of(self).items()})
        found = check_data(config, self.task, self.samples)
        page = write_data_page(found, self.out or default_page(self.data))
        if self.json:
            print(json.dumps({**found.to_dict(), "page": str(page)}, indent=2))
        else:
            print(f"{findings_text(found)}\nwritten: {page}")


@dataclass(frozen=True)
class Push:
    """Upload a run's student to the Hugging Face hub, with its card, recipe and results."""

    folder: Annotated[Positional[Path], arg(name="run", metavar="RUN", help_behavior_hint="")]
    """A run's folder."""
    repo: Annotated[Positional[str], arg(metavar="USER/NAME", help_behavior_hint="")]
    """The repository, which is made if it is not there."""
    private: Annotated[bool, FLAG] = False
    """Make it so that nobody else sees it."""

    def run(self, command: str) -> None:
        from pcdistill.commands.push import push

        print(push(self.folder, self.repo, private=self.private))


@dataclass(frozen=True)
class List:
    """Names that can be used: methods, models, detectors, data sets, recipes."""

    what: Positional[Literal["methods", "models", "detectors", "data", "recipes"]] = "methods"
    """What to list."""
    pattern: Annotated[Positional[str], arg(metavar="PATTERN", help_behavior_hint="")] = ""
    """Only names that contain this, or that fit it with * and ?; on a terminal models are counted without it."""
    search: str = ""
    """The same."""
    options: Annotated[str | None, flag("METHOD")] = None
    """The options of one method's loss: type, default and meaning."""
    json: Annotated[bool, FLAG] = False
    """Print JSON instead of text."""

    def run(self, command: str) -> None:
        from pcdistill.commands.listing import fitting, listed, options_listed, print_rows, summarised

        if self.options is not None and self.what != "methods":
            raise InputError(f"--options is of a method; leave {self.what} out")
        rows = listed(self.what) if self.options is None else options_listed(self.options)
        rows = fitting(rows, self.pattern or self.search)
        if self.json:
            print(json.dumps([{"name": name, "about": text} for name, text in rows], indent=2))
        elif sys.stdout.isatty() and self.what in ("models", "detectors") and not (self.pattern or self.search):
            print_rows(summarised(rows, self.what), sys.stdout)
        else:
            print_rows(rows, sys.stdout)


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "distill": Distill,
    "compare": Compare,
    "tune": Tune,
    "cache": Cache,
    "plan": Planned,
    "evaluate": Evaluate,
    "export": Export,
    "predict": Predict,
    "bench": Bench,
    "report": Report,
    "check-data": CheckData,
    "push": Push,
    "list": List,
    "demo": Demo,
}


def _check_text(argv: Iterable[str]) -> None:
    """Raise InputError for an argument that is not in UTF-8: it goes into recipes, which hold nothing else."""
    for text in argv:
        if not is_text(text):
            raise InputError(f"{text!a} is not in UTF-8; rename the file or folder")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pcdistill`.

    Exits with 0 (done), 2 (wrong input), 128 + the signal's number (130: Ctrl-C, 143: SIGTERM), or 1 (anything else).
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be in no encoding at all
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv[:1] == ["--version"]:
        print(f"pcdistill {__version__}")
        return
    try:
        _check_text(argv)
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="pcdistill",
            description="Distil a big model into a small one. --version prints the version; --tyro-print-completion "
            "bash (zsh, tcsh) a script for the shell's completion.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        with_home(command).run(shlex.join(["pcdistill", *argv]))
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error), 2)
    except PcdistillError as error:
        number = getattr(error, "signal", None)  # of an interruption
        _fail(str(error), 1 if number is None else 128 + number)
    except KeyboardInterrupt:
        _fail("stopped at once; the last checkpoint is kept, and the same command continues from it", 130)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # then it may be what cannot be printed
            _close_stdout()
        _fail(os_sentence(error), 2 if error.errno in WORDS else 1)


def _close_stdout() -> None:
    """Let what is not printed yet go nowhere: at its end Python would try once more, and fail."""
    with suppress(OSError):  # it may have no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    print(f"pcdistill: {told(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
