"""The command line: parse, call one function, print. A command imports what it needs when it runs."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from pcdistill.errors import WORDS, InputError, PcdistillError, os_sentence

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Common:
    """Flags that every training command has; all else of a recipe by --set."""

    recipe: Annotated[Positional[str | None], flag("RECIPE")] = None
    """A shipped recipe's name (`pcdistill list recipes`) or a YAML file; by default one that fits the data."""
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
    """Folder of the run; the same command continues an interrupted one."""
    print_config: Annotated[bool, FLAG] = False
    """Print the resolved recipe and stop."""
    quiet: Annotated[bool, FLAG] = False
    """Show warnings and results only."""

    NAME: ClassVar[str]

    def run(self, command: str) -> None:
        recipe = self.load()
        if self.print_config:
            print(recipe.to_yaml(), end="")
            return
        from pcdistill.commands.folder import default_folder

        out = self.out or default_folder(recipe, self.NAME)
        print(self.carry_out(recipe, out, command))

    def load(self, **forced: Any) -> "Recipe":
        """The recipe of these flags; `forced` are dotted keys that the command itself decides."""
        from pcdistill.recipe import load_recipe, recipe_for

        values = {**keys_of(self), **forced}
        return load_recipe(self.recipe or recipe_for(values.get("data.name", "digits")), self.set, values=values)

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        """Do it, and say what came out; `command` is what the user typed."""
        raise NotImplementedError

    def console(self, label: str) -> "Console":
        from pcdistill.engine.console import Console

        return Console(label, quiet=self.quiet)


@dataclass(frozen=True)
class Seeded:
    """The seed of a single run."""

    seed: Annotated[int | None, flag("N"), Key("train.seed")] = None
    """Seed of initialisation, order and augmentation."""


@dataclass(frozen=True)
class OneTeacher:
    """The teacher and its weights."""

    teacher: Annotated[str | None, flag("MODEL"), Key("teacher.name")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME or path/to/file.py:function."""
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

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.run import result_text, run_with_report

        console = self.console(recipe.method)
        return result_text(run_with_report(recipe, out, console=console, command=command).summary, out)


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
        if not self.jobs.isdigit():
            raise InputError(f"--jobs must be auto or a number, got {self.jobs}")
        return int(self.jobs)


@dataclass(frozen=True)
class Compare(Common, Pair, SideBySide):
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

    def load(self, **forced: Any) -> "Recipe":
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        if not 0 < self.margin < math.inf:
            raise InputError(f"--margin must be a finite number above 0, got {self.margin:g}")
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
        table = compare(recipe, plan, out, console=self.console("compare"), command=command)
        return f"{table}\nwritten: {out / 'report.html'}, {out / 'table.md'}, {out / 'results.csv'}"


@dataclass(frozen=True)
class Tune(Common, Seeded, Pair, SideBySide):
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
        return tune(recipe, plan, out, console=self.console("tune"), command=command)


@dataclass(frozen=True)
class Cache(Common, Seeded, OneTeacher):
    """Store a teacher's logits for some epochs of augmented batches, so that students need not run it."""

    NAME = "cache"

    views: Annotated[Literal[1, 2], Key("data.views")] = 1
    """Views of each image: 2 for mlkd and cskd."""
    top_k: Annotated[int | None, flag("N")] = None
    """Store only so many logits of each image, and one value for the rest: smaller, not exact."""
    temperature: float = 4.0
    """With --top-k: where the probability of the rest is kept."""

    def load(self, **forced: Any) -> "Recipe":
        return super().load(method="kd", **forced)

    def carry_out(self, recipe: "Recipe", out: Path, command: str) -> str:
        from pcdistill.commands.cache import make_cache

        options: dict[str, Any] = {"top_k": self.top_k, "temperature": self.temperature}
        with closing(self.console("cache")) as console:
            info = make_cache(recipe, out, epochs=recipe.train.epochs, console=console, **options)
        size = info.epochs * info.batches * info.rows * info.row.itemsize / 1e6
        images = info.batches * info.rows
        return f"cached {info.epochs} epochs of {images} images, {size:.1f} MB: --teacher-cache {out}"


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

    def run(self, command: str) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
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
    split: Literal["test", "val", "train"] = "test"
    """Which images."""
    image_size: Annotated[int | None, flag("N"), Key("data.image_size")] = None
    """Side of the images in pixels."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, flag("auto|cpu|cuda|mps"), Key("train.device")] = (
        None
    )
    """Where to compute."""

    def run(self, command: str) -> None:
        from pcdistill.commands.evaluate import evaluate_model, evaluation_recipe

        recipe = evaluation_recipe(self.folder, keys_of(self))
        kept = None if self.folder is None else str(self.folder / "student.safetensors")
        print(json.dumps(evaluate_model(recipe, self.weights or kept, split=self.split), indent=2))


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
        plan = Bench(self.batch_size, self.image_size, programs, self.seconds, self.device)
        print(bench(self.what, plan, lambda line: print(line, file=sys.stderr)))


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
    search: str = ""
    """Only names that contain this."""
    options: Annotated[str | None, flag("METHOD")] = None
    """The options of one method's loss: type, default and meaning."""

    def run(self, command: str) -> None:
        from pcdistill.commands.listing import listed, options_listed

        for name, text in listed(self.what) if self.options is None else options_listed(self.options):
            if self.search.lower() in name.lower():
                print(f"{name:<24} {text}".rstrip())


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "distill": Distill,
    "compare": Compare,
    "tune": Tune,
    "cache": Cache,
    "evaluate": Evaluate,
    "export": Export,
    "predict": Predict,
    "bench": Bench,
    "check-data": CheckData,
    "push": Push,
    "list": List,
    "demo": Demo,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pcdistill`.

    Exits with 0 (done), 2 (wrong input), 128 + the signal's number (130: Ctrl-C, 143: SIGTERM), or 1 (anything else).
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="pcdistill",
            description="Distil a big model into a small one.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run(shlex.join(["pcdistill", *argv]))
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
    print(f"pcdistill: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
