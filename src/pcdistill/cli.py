"""The command line: parse, call one function, print. torch is imported only by what needs it."""

import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from pcdistill.errors import InputError, PcdistillError
from pcdistill.recipe import Recipe, load_recipe, recipe_names

# Flags and the recipe keys that they stand for.
FLAGS = {
    "data": "data.name",
    "student": "student.name",
    "model": "student.name",
    "teacher": "teacher.name",
    "student_weights": "student.weights",
    "student_pretrained": "student.pretrained",
    "weights": "student.weights",
    "pretrained": "student.pretrained",
    "teacher_weights": "teacher.weights",
    "teacher_pretrained": "teacher.pretrained",
    "teacher_epochs": "teacher.epochs",
    "teacher_cache": "teacher.cache",
    "method": "method",
    "epochs": "train.epochs",
    "batch_size": "data.batch_size",
    "lr": "optim.lr",
    "seed": "train.seed",
    "image_size": "data.image_size",
    "workers": "data.workers",
    "limit": "data.limit",
    "download": "data.download",
    "precision": "train.precision",
    "device": "train.device",
}


FLAG = arg(help_behavior_hint="")


def flag(metavar: str) -> Any:
    """How a flag that may be left out is shown: its metavar alone, no "(default: None)"."""
    return arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Common:
    """Flags that every training command has; all else of a recipe by --set."""

    recipe: Annotated[Positional[str | None], flag("RECIPE")] = None
    """A shipped recipe's name (`pcdistill list recipes`) or a YAML file; by default one that fits the data."""
    data: Annotated[str | None, flag("NAME|FOLDER|FILE.npz")] = None
    """digits, cifar10, cifar100, torchvision/NAME, a folder of class folders, or an .npz file; for detection
    digits-detection, coco:FOLDER or voc:FOLDER."""
    epochs: Annotated[int | None, flag("N")] = None
    """Length of the training."""
    batch_size: Annotated[int | None, flag("N")] = None
    """Images in one step, over all processes."""
    lr: Annotated[float | None, flag("X")] = None
    """Base learning rate."""
    image_size: Annotated[int | None, flag("N")] = None
    """Side of the images in pixels."""
    limit: Annotated[int | None, flag("N")] = None
    """Use only so many training images."""
    workers: Annotated[int | None, flag("N")] = None
    """Processes that load images (folders only)."""
    download: Annotated[bool | None, flag("True|False")] = None
    """Download the data set if it is not there."""
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, flag("auto|float32|bfloat16|float16")
    ] = None
    """Arithmetic of the models."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, flag("auto|cpu|cuda|mps")] = None
    """Where to compute."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Any other key of the recipe, as often as needed: --set losses.pcd.stages=5 --set optim.clip_norm=1."""
    allow: UseAppendAction[tuple[Literal["weak-teacher", "mismatched-weights", "class-order"], ...]] = ()
    """Go on although the named check fails."""
    out: Annotated[Path | None, flag("FOLDER")] = None
    """Folder of the run; the same command continues an interrupted one."""
    print_config: Annotated[bool, FLAG] = False
    """Print the resolved recipe and stop."""
    quiet: Annotated[bool, FLAG] = False
    """Show warnings and results only."""


@dataclass(frozen=True)
class Seeded:
    """The seed of a single run."""

    seed: Annotated[int | None, flag("N")] = None
    """Seed of initialisation, order and augmentation."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student."""

    teacher: Annotated[str | None, flag("MODEL")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME or path/to/file.py:function."""
    student: Annotated[str | None, flag("MODEL")] = None
    """The same for the student."""
    teacher_weights: Annotated[str | None, flag("FILE")] = None
    """The teacher's weights: .safetensors, or a state dict (.pt, .pth)."""
    teacher_epochs: Annotated[int | None, flag("N")] = None
    """Train the teacher first for so many epochs, when it has no weights for these classes."""
    teacher_pretrained: Annotated[bool | None, flag("True|False")] = None
    """Start the teacher from its zoo's pretrained weights (default: yes for timm, torchvision and hf)."""
    teacher_cache: Annotated[str | None, flag("FOLDER")] = None
    """What `pcdistill cache` made: its logits stand in for the teacher's in training."""
    student_weights: Annotated[str | None, flag("FILE")] = None
    """Weights that the student starts from."""
    student_pretrained: Annotated[bool | None, flag("True|False")] = None
    """Start the student from its zoo's pretrained weights."""


@dataclass(frozen=True)
class Train(Common, Seeded):
    """Train a model without a teacher (a teacher, for instance)."""

    model: Annotated[str | None, flag("MODEL")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME or path/to/file.py:function."""
    weights: Annotated[str | None, flag("FILE")] = None
    """Weights to start from."""
    pretrained: Annotated[bool | None, flag("True|False")] = None
    """Start from the zoo's pretrained weights."""


@dataclass(frozen=True)
class Distill(Common, Seeded, Pair):
    """Distil a teacher into a student."""

    method: Annotated[str | None, flag("METHOD")] = None
    """A method's name (`pcdistill list methods`) or path/to/file.py:Class."""


@dataclass(frozen=True)
class Compare(Common, Pair):
    """One student under several methods and seeds: mean, 95 % interval, paired test against KD."""

    methods: str = "none,kd,pcd"
    """Names with commas between; all-logit and all-feature stand for all of a kind."""
    seeds: int = 3
    """How many seeds each method gets."""
    margin: float = 0.5
    """Points of the metric: the verdict says whether a difference greater than this can be ruled out."""


@dataclass(frozen=True)
class Cache(Common, Seeded):
    """Store a teacher's logits for some epochs of augmented batches, so that students need not run it."""

    teacher: Annotated[str | None, flag("MODEL")] = None
    """timm/NAME, torchvision/NAME, cifar/NAME, hf/NAME or path/to/file.py:function."""
    teacher_weights: Annotated[str | None, flag("FILE")] = None
    """The teacher's weights: .safetensors, or a state dict (.pt, .pth)."""
    teacher_pretrained: Annotated[bool | None, flag("True|False")] = None
    """Take its zoo's pretrained weights (default: yes for timm, torchvision and hf)."""
    views: Literal[1, 2] = 1
    """Views of each image: 2 for mlkd and cskd."""
    top_k: Annotated[int | None, flag("N")] = None
    """Store only so many logits of each image, and one value for the rest: smaller, not exact."""
    temperature: float = 4.0
    """With --top-k: where the probability of the rest is kept."""


@dataclass(frozen=True)
class Demo:
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


@dataclass(frozen=True)
class Evaluate:
    """Top-1 and top-5 of a run's student, or of any model with weights."""

    run: Annotated[Positional[Path | None], flag("RUN")] = None
    """A run's folder; data, model and weights are then its own."""
    data: Annotated[str | None, flag("NAME|FOLDER|FILE.npz")] = None
    """The data, if no run is named, or other data than the run's."""
    model: Annotated[str | None, flag("MODEL")] = None
    """The model, if no run is named."""
    weights: Annotated[str | None, flag("FILE")] = None
    """Its weights."""
    split: Literal["test", "val", "train"] = "test"
    """Which images."""
    image_size: Annotated[int | None, flag("N")] = None
    """Side of the images in pixels."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, flag("auto|cpu|cuda|mps")] = None
    """Where to compute."""


@dataclass(frozen=True)
class List:
    """Names that can be used: methods, models, detectors, data sets, recipes."""

    what: Positional[Literal["methods", "models", "detectors", "data", "recipes"]] = "methods"
    """What to list."""
    search: str = ""
    """Only names that contain this."""


COMMANDS: dict[str, Any] = {
    "train": Train,
    "distill": Distill,
    "compare": Compare,
    "cache": Cache,
    "evaluate": Evaluate,
    "list": List,
    "demo": Demo,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pcdistill`; exits with 0 (done), 2 (wrong input) or 1 (anything else)."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["pcdistill", *argv])
    try:
        args = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="pcdistill",
            description="Distil a big model into a small one.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        RUN[type(args)](args, command)
    except InputError as error:
        _fail(str(error), 2)
    except PcdistillError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped at once; the last checkpoint is kept, and the same command continues from it", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    print(f"pcdistill: {message}", file=sys.stderr)
    sys.exit(code)


def _values(args: Any) -> dict[str, Any]:
    """Recipe keys of the flags that were given."""
    found = {key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag, None) is not None}
    if getattr(args, "allow", ()):
        found["allow"] = list(args.allow)
    return found


def _recipe(args: Any, **forced: Any) -> Recipe:
    values = {**_values(args), **forced}
    source = args.recipe
    if source is None:
        source = _source_of(str(values.get("data.name", "digits")))
    teacher = values.get("teacher.name")
    if teacher is not None and "teacher.weights" not in values:
        zoo = teacher.partition("/")[0] in ("timm", "torchvision", "hf")
        values.setdefault("teacher.pretrained", zoo)
    return load_recipe(source, args.set, values=values)


def _source_of(data: str) -> str:
    """The recipe that fits data when none is named."""
    if data in ("digits", "digits-detection"):
        return data
    return "detection" if data.startswith(("coco:", "voc:")) else "default"


def _out(args: Any, recipe: Recipe, kind: str) -> Path:
    if args.out is not None:
        return Path(args.out)
    data = Path(recipe.data.name).stem
    name = f"{kind}-{data}-{recipe.student.name.rsplit('/', 1)[-1].rsplit(':', 1)[-1]}"
    return Path("runs") / (f"{name}-{recipe.method}-seed{recipe.train.seed}" if kind == "distill" else name)


def _train(args: Train, command: str) -> None:
    recipe = _recipe(args, method="none")
    recipe = load_recipe_without_teacher(recipe)
    _one_run(args, recipe, "train", command)


def load_recipe_without_teacher(recipe: Recipe) -> Recipe:
    """The recipe of a training without a teacher."""
    from dataclasses import replace

    return replace(recipe, teacher=None)


def _distill(args: Distill, command: str) -> None:
    _one_run(args, _recipe(args), "distill", command)


def _one_run(args: Any, recipe: Recipe, kind: str, command: str) -> None:
    if args.print_config:
        print(recipe.to_yaml(), end="")
        return
    from pcdistill.commands.compare import run_with_report
    from pcdistill.engine.console import Console

    out = _out(args, recipe, kind)
    console = Console(recipe.method if kind == "distill" else kind, quiet=args.quiet)
    result = run_with_report(recipe, out, console=console, command=command)
    print(_result_text(result.summary, out))


def _result_text(summary: dict[str, Any], out: Path) -> str:
    split = "test" if summary["last"]["test"] else "val"
    lines = []
    metric, label = summary["metric"], "AP" if summary["metric"] == "map" else "top-1"
    if summary["teacher"]:
        value = summary["teacher"][split][metric]
        size = summary["teacher"]["parameters"] / 1e6
        lines.append(f"teacher   {size:8.2f} M parameters  {split} {label} {value:.2f} %")
    for which in ("best", "last"):
        one = summary[which]
        lines.append(
            f"student   {summary['student']['parameters'] / 1e6:8.2f} M parameters  {split} {label} "
            f"{one[split][metric]:.2f} %  ({which} epoch, {one['epoch']})"
        )
    lines.append(f"kept the {summary['kept']} epoch: {out / 'student.safetensors'}; report: {out / 'report.html'}")
    return "\n".join(lines)


def _compare(args: Compare, command: str) -> None:
    recipe = _recipe(args)
    if args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {args.seeds}")
    if not 0 < args.margin < math.inf:
        raise InputError(f"--margin must be a finite number above 0, got {args.margin:g}")
    if args.print_config:
        print(recipe.to_yaml(), end="")
        return
    from pcdistill.commands.compare import compare, expand_methods
    from pcdistill.engine.console import Console

    out = _out(args, recipe, "compare")
    methods = expand_methods(args.methods, recipe)
    console = Console("compare", quiet=args.quiet)
    print(compare(recipe, methods, args.seeds, out, console=console, command=command, margin=args.margin))
    print(f"written: {out / 'report.html'}, {out / 'table.md'}, {out / 'results.csv'}")


def _cache(args: Cache, command: str) -> None:
    recipe = _recipe(args, method="kd", **{"data.views": args.views})
    out = args.out or Path("runs") / f"cache-{Path(recipe.data.name).stem}-seed{recipe.train.seed}"
    if args.print_config:
        print(recipe.to_yaml(), end="")
        return
    from pcdistill.commands.cache import make_cache
    from pcdistill.engine.console import Console

    info = make_cache(
        recipe,
        out,
        epochs=recipe.train.epochs,
        top_k=args.top_k,
        temperature=args.temperature,
        console=Console("cache", quiet=args.quiet),
    )
    size = info.epochs * info.batches * info.rows * info.row.itemsize / 1e6
    print(f"cached {info.epochs} epochs of {info.batches * info.rows} images, {size:.1f} MB: --teacher-cache {out}")


def _demo(args: Demo, command: str) -> None:
    if args.seeds is not None and args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {args.seeds}")
    detection = args.task == "detection"
    recipe = load_recipe("digits-detection" if detection else "digits", args.set)
    methods = ["none", "kd", "pcd", *(["dfmsd"] if detection else [])]
    from pcdistill.commands.compare import compare
    from pcdistill.engine.console import Console

    console = Console("demo", quiet=args.quiet)
    out = args.out or Path("runs/demo-detection" if detection else "runs/demo")
    print(compare(recipe, methods, args.seeds or (3 if detection else 5), out, console=console, command=command))
    print(f"report: {out / 'report.html'}")


def _evaluate(args: Evaluate, command: str) -> None:
    from pcdistill.commands.compare import evaluate_model, run_recipe

    values = {key: value for key, value in _values(args).items() if key != "student.weights"}
    weights = args.weights
    if args.run is not None:
        from pcdistill.recipe import make_recipe

        tree = run_recipe(args.run).to_dict()
        for key, value in values.items():
            group, name = key.split(".")
            tree[group][name] = value
        recipe = make_recipe(tree)
        weights = weights or str(args.run / "student.safetensors")
    else:
        if args.model is None or args.data is None:
            raise InputError("name a run's folder, or --data and --model (with --weights)")
        recipe = load_recipe(_source_of(args.data), values={**values, "method": "none"})
    print(json.dumps(evaluate_model(recipe, weights, split=args.split), indent=2))


def _list(args: List, command: str) -> None:
    rows: list[tuple[str, str]]
    if args.what == "methods":
        from pcdistill.methods import METHODS

        rows = [("none", "the student alone")]
        rows += [(name, f"{m.summary} [{m.kind}; {m.source}]") for name, m in METHODS.items()]
    elif args.what == "recipes":
        rows = [(name, _first_comment(name)) for name in recipe_names()]
    elif args.what == "data":
        from pcdistill.data import DATASETS

        rows = list(DATASETS.items())
    elif args.what == "detectors":
        from pcdistill.detection.detectors.build import list_detectors

        rows = [(name, "") for name in list_detectors()]
    else:
        from pcdistill.models import list_models

        rows = [(name, "") for name in list_models()]
    for name, text in rows:
        if args.search.lower() in name.lower():
            print(f"{name:<24} {text}".rstrip())


def _first_comment(name: str) -> str:
    from pcdistill.recipe import RECIPES

    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


RUN: dict[type, Any] = {
    Train: _train,
    Distill: _distill,
    Compare: _compare,
    Cache: _cache,
    Demo: _demo,
    Evaluate: _evaluate,
    List: _list,
}

if __name__ == "__main__":
    main()
