"""Recipes: a typed schema, YAML files with one level of `base`, overrides, and errors that name file and key.

Nothing in a recipe is executed: it holds values only. The one exception is named by its form: a model or a loss given
as `path/to/file.py:name` is the user's own code, and is imported when it is built.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pcdistill.errors import InputError, nearest
from pcdistill.files import home_followed
from pcdistill.methods import METHODS
from pcdistill.models.names import has_zoo_weights, is_endpoint, is_user_code
from pcdistill.plain import (
    NUMBER,
    either,
    one_line,
    parse_yaml,
    read_text,
    shown,
    structure_faults,
    value_faults,
    write_yaml,
)

NO_FOLDER = re.compile(r'[/\\:,"*?<>|\x00-\x1f]|^[.~ ]|[. ]$|^$|^teacher(-\d+)?$|^pictures$|^(seed|strength)-')
RECIPES = Path(__file__).parent / "recipes"
GRAPHS = "reduce-overhead"  # of train.compile: torch's name for compiled modules replayed as CUDA graphs
ALONE = "none"  # the method that trains the student without a teacher
LOADERS = "loaders"  # the data of a run from Python, on the caller's own loaders and modules
FORBID = ConfigDict(extra="forbid")
MOST_BASES = 20
LARGEST_SEED = 2**32 - 1  # of NumPy's generators


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
Share = Annotated[float, Field(ge=0, lt=1), NUMBER]
Finite = Annotated[float, Field(allow_inf_nan=False), NUMBER]
Count = Annotated[int, Field(ge=1, lt=2**31), NUMBER]
FromZero = Annotated[int, Field(ge=0, lt=2**31), NUMBER]
Pixels = Annotated[int, Field(ge=1, le=16384), NUMBER]
Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are fed.

    `batch_size` is the global batch of one optimiser step; `views` is by default what the losses compare; `seed`, of
    split, order and augmentation, is by default the teacher cache's, else the run's. `unlabelled` are images without
    labels for the distillation terms: a folder, an .npz file, or "rest" for what `limit` leaves out; each step takes
    `unlabelled_batch` of them beside the batch, by default as many as the batch has. `streamed` reads the parquet
    files of `hf:NAME` where they lie, in place of fetching and converting all of them first.
    """

    __pydantic_config__ = FORBID
    name: Name = "digits"
    batch_size: Count = 64
    eval_batch_size: Count = 256
    val_fraction: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.1
    image_size: Pixels | None = None
    augment: str = "auto"
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    views: Annotated[int, Field(ge=1, le=2), NUMBER] | None = None
    workers: Annotated[int, Field(ge=0, le=1024), NUMBER] | None = None
    limit: Count | None = None
    download: bool = False
    streamed: bool = False
    root: str | None = None
    seed: Annotated[int, Field(ge=0), NUMBER] | None = None
    unlabelled: str | None = None
    unlabelled_batch: Count | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model by name (`timm/`, `torchvision/`, `cifar/`, `hf/` and NAME, or `file.py:function`) and its weights.

    `pretrained` starts from the zoo's weights. Without `weights` it is by default on for a teacher that is named by
    `timm/`, `torchvision/` or `hf/`, and for a detector whose name is of a model, or over a backbone, that has such.
    """

    __pydantic_config__ = FORBID
    name: Name = "cifar/resnet8"
    weights: str | None = None
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] | None = None


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The student; `head: teacher` starts its classifier from the teacher's, where both read as many features."""

    head: Literal["own", "teacher"] = "own"


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The teacher; `epochs` > 0 trains it first, with the student's recipe, when it has no weights for these classes.

    `classes` names its outputs when the weights do not; `mean`, `std` and `image_size` are its own input's; `cache` is
    a folder that `pcdistill cache` made, whose logits stand in for the teacher's in training; `weight` is its share
    among several. `pretrained` of `file.py:function` says that the function gives a trained model; `call` says that it
    is the teacher itself: called with images [N, C, H, W] it gives logits [N, K], as a name `http://...` does.
    `precision` is of its weights: float32 leaves them as they are, float8 stores large ones in 8 bits; `batch_size` is
    the most images in one pass of it; `shard` splits its weights over the processes of the run.
    """

    name: Name = "cifar/resnet20"
    epochs: FromZero = 0
    classes: tuple[str, ...] | None = None
    mean: tuple[Finite, ...] | None = None
    std: tuple[Positive, ...] | None = None
    image_size: Pixels | None = None
    cache: str | None = None
    weight: Positive = 1.0
    call: bool = False
    precision: Literal["float32", "bfloat16", "float16", "float8"] = "float32"
    batch_size: Count | None = None
    shard: bool = False

    @property
    def outside(self) -> bool:
        """Whether it is asked for logits, by a call or over HTTP, and has no weights here."""
        return self.call or is_endpoint(self.name)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and gradient clipping (`clip_norm`: None turns it off)."""

    __pydantic_config__ = FORBID
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[Annotated[FromZero | NotNegative, either("a number from 0")], ...] = ()
    gamma: Positive = 0.1
    warmup_epochs: NotNegative = 0.0
    clip_norm: Positive | None = 5.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and bookkeeping of a run. `ema` is the decay of the weights' moving average, 0 for none.

    `channels_last` is by default on but for Apple's GPUs and for students whose training breaks in it on a CPU (see
    pcdistill.engine.placement.make_placement); `fold_teacher` folds the teacher's batch normalisation into its
    convolutions where features are not compared. Both change rounding alone. `compile`: student and teacher in
    torch.compile; "reduce-overhead": and on a CUDA device replayed as graphs, for small models and batches.
    """

    __pydantic_config__ = FORBID
    epochs: Count = 30
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), NUMBER] = 0
    accumulate: Count = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ema: Share = 0.0
    keep: Literal["best", "last"] = "best"
    compile: Annotated[bool | Literal["reduce-overhead"], either(f"true, false or {GRAPHS}")] = False
    channels_last: bool | None = None
    fold_teacher: bool = True
    sync_batchnorm: bool = True
    checkpoint_seconds: NotNegative = 60.0
    device: str = "auto"
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()


@dataclass(frozen=True)
class DetectionConfig:
    """Where detectors are compared, and whether by their boxes too.

    `pairing`: "student": its own regions; "teacher": the `top_k` regions of an image that the teacher rates highest, if
    it rates them `threshold` at least; "anchors": those anchors, of dense detectors that share them; "auto": anchors
    where they are the same, a two-stage student's proposals, else the teacher's regions. `boxes` distils the boxes of
    the same regions, by their L1 distance or GIoU, at `boxes_weight`. `adapters` are the user's own, each
    `path/to/file.py:Adapter`.
    """

    __pydantic_config__ = FORBID
    top_k: Count = 100
    threshold: Share = 0.0
    pairing: Literal["auto", "student", "teacher", "anchors"] = "auto"
    boxes: Literal["none", "l1", "giou"] = "none"
    boxes_weight: NotNegative = 1.0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class TermConfig:
    """One weighted term of the objective; keys that are not listed here are options of the loss itself.

    `weight_to` and `temperature_to`: where weight and temperature move to, epoch by epoch and in equal steps, from
    `weight` and the loss's `temperature` in the first epoch to these values in the last; none: they stay.
    `strength`, in place of a weight: the term pulls so many times as hard as the labels; see distillation/strength.py;
    `strength_follow`: measured through all of training, or kept after the first steps.
    `entropy_weighting`: samples weigh by the entropies of teacher and student (EA-KD) at this temperature; true: at 3.
    """

    __pydantic_config__ = FORBID
    method: Name
    weight: NotNegative = 1.0
    weight_to: NotNegative | None = None
    temperature_to: Positive | None = None
    warmup_epochs: NotNegative = 0.0
    standardize: bool = False
    strength: Positive | None = None
    strength_follow: bool = True
    entropy_weighting: Annotated[bool | float, either("true, false or a number")] = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result. `allow` lists the checks that are overridden by name.

    `teachers` stands for `teacher`, which is then None: several teach as one, by the weighted mean of their
    probabilities at temperature 1 or of their logits, as `teachers_combine` says.
    """

    __pydantic_config__ = FORBID
    task: Literal["classification", "detection"] = "classification"
    method: Name = "pcd"
    losses: tuple[TermConfig, ...] = ()
    methods: dict[str, tuple[TermConfig, ...]] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    teachers_combine: Literal["probabilities", "logits"] = "probabilities"
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    allow: tuple[Literal["weak-teacher", "mismatched-weights", "class-order", "raw-images"], ...] = ()

    @property
    def distils(self) -> bool:
        """Whether a teacher takes part; else the student is trained alone."""
        return bool(self.all_teachers) and self.method != ALONE

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        """The teachers: none, one or several."""
        return self.teachers or (() if self.teacher is None else (self.teacher,))

    def with_teachers(self, teachers: Sequence[TeacherConfig]) -> "Recipe":
        """The same with these in place of its teachers, one for each."""
        if self.teachers:
            return dataclasses.replace(self, teachers=tuple(teachers))
        return dataclasses.replace(self, teacher=teachers[0] if teachers else None)

    def with_caches_of_seed(self) -> "Recipe":
        """The same, where `{seed}` in the path of a teacher's cache is the run's seed."""
        teachers = [
            dataclasses.replace(one, cache=one.cache and one.cache.replace("{seed}", str(self.train.seed)))
            for one in self.all_teachers
        ]
        return self.with_teachers(teachers) if teachers else self

    @property
    def strength(self) -> float | None:
        """How many times as hard as the labels distillation pulls, all terms together; None where weights are given."""
        found = [term.strength for term in self.losses if term.strength is not None]
        return round(sum(found), 9) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; `Recipe` and back loses nothing."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        _drop_later_keys(plain)
        plain["losses"] = [_flat_term(term) for term in plain["losses"]]
        plain["methods"] = {name: [_flat_term(term) for term in terms] for name, terms in plain["methods"].items()}
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return write_yaml(self.to_dict())

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any value that can change a run's result."""
        plain = self.to_dict()
        for key in ("checkpoint_seconds", "trackers", "device"):
            plain["train"].pop(key)
        for teacher in [plain["teacher"], *plain.get("teachers", ())]:
            for key in ("batch_size", "shard") if teacher is not None else ():  # the same logits, up to rounding
                teacher.pop(key, None)
        plain.pop("methods")
        if self.task != "detection":
            plain.pop("detection")
        if self.data.name == LOADERS:  # the models came as modules: what they are called decides nothing
            plain.update(student=dataclasses.asdict(ModelConfig()), teacher=None)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


TERM_KEYS = [f.name for f in dataclasses.fields(TermConfig)]


@functools.cache
def _schema() -> TypeAdapter[Recipe]:
    """Built on first use: it takes longer than all else of this module."""
    return TypeAdapter(Recipe)


class _Mistakes:
    """The mistakes found in one recipe, to be told together.

    Args:
        where: the file or call that they are in.
        words: what the user typed for a dotted key, such as "--lr"; it is named in place of file and key.
    """

    def __init__(self, where: str, words: Mapping[str, str] | None = None) -> None:
        self.where = where
        self.words = dict(words or {})
        self.found: list[tuple[str, str]] = []

    def add(self, sentence: str, where: str | None = None) -> None:
        self.found.append((one_line(where or self.where), one_line(sentence)))

    def add_of(self, key: str, sentence: str) -> None:
        """A mistake in the value of a dotted key, which a sentence that does not name it gets in front."""
        parts = key.split(".")
        above = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        typed = next((one for one in above if one in self.words), None)
        named = typed == key or f'"{key}"' in sentence or sentence.startswith(f"{key} ")
        self.add(sentence if named else f"{key}: {sentence}", None if typed is None else self.words[typed])

    def raise_if_any(self) -> None:
        """One mistake is one sentence; several are a list under the name of the file.

        Raises:
            InputError: there is a mistake.
        """
        if len(self.found) == 1:
            raise InputError(": ".join(self.found[0]))
        if self.found:
            lines = [text if where == one_line(self.where) else f"{where}: {text}" for where, text in self.found]
            raise InputError("\n  ".join([f"Found {len(lines)} errors in {one_line(self.where)}:", *lines]))


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_for(data: str) -> str:
    """The shipped recipe that fits the data when none is named."""
    if data in ("digits", "digits-detection"):
        return data
    return "detection" if data.startswith(("coco:", "voc:", "yolo:")) else "default"


def load_recipe(
    source: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    words: Mapping[str, str] | None = None,
) -> Recipe:
    """Build a recipe from a name or file, then dotted `values`, then `key=value` overrides, in this order.

    Args:
        source: a shipped recipe's name, a YAML file, or None for the schema's defaults.
        overrides: strings `dotted.key=value`, the value in YAML; a term of `losses` is addressed by position or method.
        values: dotted keys to values, as the command line's flags give them; None values are passed over.
        words: dotted keys of `values` to what the user typed, which messages name.

    Raises:
        InputError: naming the file and every wrong key, with the nearest valid one.
    """
    tree, where = _read(source) if source is not None else ({}, "recipe")
    given = {key: value for key, value in (values or {}).items() if value is not None}
    mistakes = _Mistakes(where)
    text = _parse_overrides(overrides, mistakes)
    mistakes.words = {**(words or {}), **{key: f"--set {key}" for key in text}}
    method = text.get("method", given.get("method"))
    if method is not None and "losses" not in text:
        tree.pop("losses", None)  # a method that is asked for brings its own terms
    task = str(text.get("task", given.get("task", tree.get("task", Recipe.task))))
    for owner in ("student", "teacher"):
        name = text.get(f"{owner}.name", given.get(f"{owner}.name"))
        old = tree.get(owner)
        if name is not None and isinstance(old, dict):
            weighted = any(f"{owner}.weights" in asked for asked in (given, text))
            tree[owner] = _renamed(old, str(name), task, weighted=weighted)
    _scale_milestones(tree, {**given, **text})
    if tree.get("teachers") and "teachers" not in text:
        of_one = [key for key in {**given, **text} if key.split(".")[0] == "teacher"]
        if {"teacher", "teacher.name", "teacher.weights"} & set(of_one):
            del tree["teachers"]  # one that is asked for stands for the recipe's several
        elif of_one:
            mistakes.add(f"{of_one[0]}: this recipe has several teachers; set it in each of `teachers`")
    of_terms = {key: value for key, value in text.items() if key.startswith("losses.")}
    asked = _asked(tree, {**given, **text})
    for key, value in {**given, **text}.items():
        if key not in of_terms:
            _put(tree, key, value, mistakes)
    _check_structure(tree, mistakes)
    _check_structure(of_terms, mistakes)
    return _make(tree, mistakes, of_terms, asked)


def _renamed(old: Mapping[str, Any], name: str, task: str, *, weighted: bool) -> dict[str, Any]:
    """A recipe's model after another was asked for by name: without the arguments and weights of the recipe's.

    What the recipe says of `pretrained` stays where it can be said of both models, and no weights are asked for.
    """
    kept = {key: value for key, value in old.items() if key in ("epochs", "head")}
    spoken = "pretrained" in old and old.get("weights") is None and has_zoo_weights(str(old.get("name")), task)
    if spoken and not weighted and has_zoo_weights(name, task):
        kept["pretrained"] = old["pretrained"]
    return kept


def _scale_milestones(tree: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Where another length than the recipe's is asked for, its milestones move with it."""
    epochs, optim, train = asked.get("train.epochs"), tree.get("optim"), tree.get("train")
    if not isinstance(optim, dict) or "optim.milestones" in asked:
        return
    old = train.get("epochs", TrainConfig.epochs) if isinstance(train, dict) else TrainConfig.epochs
    milestones = optim.get("milestones")
    # Nothing is checked yet: what is no number of epochs is left for the check to refuse.
    if not isinstance(epochs, int) or not isinstance(old, int) or not isinstance(milestones, list | tuple):
        return
    sound = all(isinstance(m, int | float) and 0 <= m < 2**31 for m in milestones)
    if sound and 0 < old < 2**31 and 0 < epochs < 2**31:
        optim["milestones"] = scaled_milestones(milestones, old, epochs)


def scaled_milestones(milestones: Sequence[float], old: int, new: int) -> list[float]:
    """Milestones of a run of `old` epochs for one of `new`: at the same share of it, whole numbers where they are."""
    if old == new:
        return list(milestones)
    moved = [round(m * new / old, 2) for m in milestones]
    return [int(m) if m == int(m) else m for m in moved]


def make_recipe(tree: Mapping[str, Any], where: str = "recipe", *, words: Mapping[str, str] | None = None) -> Recipe:
    """Check a tree of plain values against the schema, and fill in the terms that the method's name stands for.

    Args:
        tree: keys to values, as a recipe's file holds them.
        where: what to name in messages.
        words: dotted keys to what the user typed, which messages name in place of `where` and key.

    Raises:
        InputError: naming `where` and every wrong key, with the nearest valid one.
    """
    mistakes = _Mistakes(where, words)
    if not isinstance(tree, Mapping):
        raise InputError(f"{where}: a recipe must be a mapping of keys to values, got {type(tree).__name__}")
    _check_structure(tree, mistakes)
    return _make(copy.deepcopy(dict(tree)), mistakes, {})


def _check_structure(tree: Mapping[str, Any], mistakes: _Mistakes) -> None:
    """Refuse at once what the other checks could not walk through."""
    faults = list(structure_faults(tree))
    for key, fault in faults:
        if key:
            mistakes.add_of(key, fault)
        else:
            mistakes.add(fault)
    if faults:
        mistakes.raise_if_any()


def _make(tree: dict[str, Any], mistakes: _Mistakes, of_terms: Mapping[str, Any], asked: Iterable[str] = ()) -> Recipe:
    """The recipe of a tree of sound structure, which is changed.

    Args:
        tree: keys to values.
        mistakes: where they are told.
        of_terms: overrides of single terms.
        asked: keys of IDLE that must have an effect.
    """
    tree.setdefault("method", Recipe.method)
    for key in ("losses", "methods", "teachers"):
        if tree.get(key, ()) is None:
            del tree[key]
    named = _named_methods(tree.get("methods", {}), mistakes)
    terms = tree.get("losses", [])
    if terms in ([], ()) and isinstance(tree["method"], str):
        try:
            terms = method_terms(tree["method"], named, task=tree.get("task", Recipe.task))
        except InputError as error:
            mistakes.add_of("method", str(error).removeprefix("method: "))
    if isinstance(terms, list | tuple):
        terms = _nested_terms(_with_overrides(list(terms), of_terms, mistakes), "losses", mistakes)
    tree["losses"] = terms
    tree["methods"] = {name: _nested_terms(terms, f"methods.{name}", mistakes) for name, terms in named.items()}
    several = tree.get("teachers")
    if several:
        tree["teacher"] = None
    task = str(tree.get("task", Recipe.task))
    weighable = [tree.get("teacher"), *(several if isinstance(several, list | tuple) else ())]
    if task == "detection":
        weighable.append(tree.get("student"))
    for model in weighable:
        if isinstance(model, dict) and "pretrained" not in model and model.get("weights") is None and "name" in model:
            model["pretrained"] = has_zoo_weights(str(model["name"]), task)
    _check_arguments(tree, mistakes)
    recipe = _validated(tree, mistakes)
    if recipe is not None:
        _check_together(recipe, asked, mistakes)
    mistakes.raise_if_any()
    assert recipe is not None
    return recipe


def _asked(tree: Mapping[str, Any], typed: Mapping[str, Any]) -> list[str]:
    """Keys of IDLE that somebody wants an effect of: typed, or in a file that says nothing of what they depend on.

    A run's recipe.yaml holds every key, so it says something of all.
    """

    def stands(key: str) -> bool:
        group, _, name = key.rpartition(".")
        at = tree.get(group, {}) if group else tree
        return isinstance(at, Mapping) and name in at

    def is_typed(key: str) -> bool:
        return any(one == key or one.startswith(f"{key}.") for one in typed)

    return [
        key
        for key, (depends_on, _, _) in IDLE.items()
        if is_typed(key) or (stands(key) and not stands(depends_on) and not is_typed(depends_on))
    ]


def _check_together(recipe: Recipe, asked: Iterable[str], mistakes: _Mistakes) -> None:
    """What values of several keys must be to each other."""
    for key in asked:
        _, idle, sentence = IDLE[key]
        if idle(recipe):
            mistakes.add_of(key, sentence)
    for i, teacher in enumerate(recipe.all_teachers):
        owner = f"teachers.{i}" if recipe.teachers else "teacher"
        if (teacher.mean is None) != (teacher.std is None):
            given = "mean" if teacher.std is None else "std"
            mistakes.add_of(f"{owner}.{given}", "mean and std must be given together")
        elif teacher.mean is not None and teacher.std is not None and len(teacher.mean) != len(teacher.std):
            mistakes.add_of(f"{owner}.std", f"must have as many numbers as mean, {len(teacher.mean)}")
        _check_outside(recipe, teacher, owner, mistakes)
        _check_big(recipe, teacher, owner, mistakes)
    if recipe.optim.nesterov and recipe.optim.name == "sgd" and recipe.optim.momentum == 0:
        mistakes.add_of("optim.nesterov", "needs optim.momentum above 0")
    if recipe.train.compile == GRAPHS and recipe.train.accumulate > 1:
        mistakes.add_of("train.accumulate", f"must be 1 with train.compile {GRAPHS}, whose gradients last one batch")


def _check_outside(recipe: Recipe, teacher: TeacherConfig, owner: str, mistakes: _Mistakes) -> None:
    """What can be said of a teacher that is asked for logits."""
    if teacher.call and not is_user_code(teacher.name):
        mistakes.add_of(f"{owner}.call", f"needs a name of the form path/to/file.py:function, got {teacher.name}")
    if not teacher.outside:
        return
    if recipe.task != "classification":
        mistakes.add_of(f"{owner}.name", f"{teacher.name} is asked for logits, and {recipe.task} has none")
    for key in ("weights", "features"):
        if getattr(teacher, key) is not None:
            mistakes.add_of(f"{owner}.{key}", f"has no effect on {teacher.name}, which is asked for logits")


def _check_big(recipe: Recipe, teacher: TeacherConfig, owner: str, mistakes: _Mistakes) -> None:
    """What can be said of a teacher in fewer bits, in micro-batches or in parts."""
    asked = [key for key, default in BIG.items() if getattr(teacher, key) != default]
    for key in asked:
        if recipe.task != "classification":
            mistakes.add_of(f"{owner}.{key}", f"is of classifiers, and the task is {recipe.task}; leave it out")
        elif recipe.data.name == LOADERS:
            mistakes.add_of(f"{owner}.{key}", "has no effect on a module that is passed in; change the module itself")
        elif teacher.outside and key != "batch_size":
            mistakes.add_of(f"{owner}.{key}", f"has no effect on {teacher.name}, whose weights are elsewhere")
    if teacher.shard and recipe.teachers:
        mistakes.add_of(f"{owner}.shard", "is of one teacher, and there are several; leave it out, or name one teacher")


def _named_methods(named: Any, mistakes: _Mistakes) -> dict[str, Any]:
    """The recipe's own methods that are lists of terms."""
    if not isinstance(named, Mapping):
        mistakes.add_of("methods", f"must map names to lists of terms, got {shown(named)}")
        return {}
    for name, terms in named.items():
        if NO_FOLDER.search(str(name)):  # a comparison has a folder for each, beside the teacher's
            mistakes.add_of(f"methods.{name}", "must be a name for a folder of its own, such as my-kd")
        if not isinstance(terms, list | tuple) or not terms:
            mistakes.add_of(f"methods.{name}", f"must be a list of terms, got {shown(terms)}")
    return {name: terms for name, terms in named.items() if isinstance(terms, list | tuple) and terms}


def _check_arguments(tree: Mapping[str, Any], mistakes: _Mistakes) -> None:
    """Arguments of models, which the schema leaves free."""
    several = tree.get("teachers")
    owners = {"student": tree.get("student"), "teacher": tree.get("teacher")}
    owners |= {f"teachers.{i}": one for i, one in enumerate(several if isinstance(several, list | tuple) else ())}
    for owner, group in owners.items():
        for key, fault in value_faults(group.get("kwargs") if isinstance(group, Mapping) else None, f"{owner}.kwargs"):
            mistakes.add_of(key, fault)


def _parse_overrides(overrides: Iterable[str], mistakes: _Mistakes) -> dict[str, Any]:
    """Dotted keys to values of strings `KEY=VALUE`, the value in YAML."""
    found: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            mistakes.add(f"must be KEY=VALUE, got {shown(override)}", "--set")
            continue
        try:
            found[key.strip()] = parse_yaml(value, shown(value))
        except InputError as error:
            mistakes.add(f"the value {error}", f"--set {key}")
    return found


def method_terms(method: str, named: Mapping[str, Any], *, task: str = "classification") -> list[dict[str, Any]]:
    """The terms that a method's name stands for: the recipe's own, else the table's; "none" is the task's own loss.

    In detection the detector's own losses stand, with weight 1, where classification has cross-entropy, and the
    distillation term of a logit method keeps its weight and options.

    Raises:
        InputError: there is no such method.
    """
    own = {"method": "detector" if task == "detection" else "ce", "weight": 1.0}
    if method in named:
        return copy.deepcopy(list(named[method]))
    if method == ALONE:
        return [own]
    if method in METHODS:
        terms = copy.deepcopy(list(METHODS[method].terms))
        if task == "detection" and not any(term["method"] == "detector" for term in terms):
            return [own, *(term for term in terms if term["method"] != "ce")]
        return terms
    if is_user_code(method):
        return [own, {"method": method, "weight": 1.0}]
    known = list(dict.fromkeys([ALONE, *METHODS, *named]))
    raise InputError(f'method: unknown method "{method}"{nearest(method, known)}; known: {", ".join(known)}')


def with_method(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The same recipe under another method and seed, for comparisons."""
    tree = recipe.to_dict()
    tree.update(method=method, losses=[])
    tree["train"]["seed"] = seed
    return make_recipe(tree)


def _read(source: str | Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """The merged tree of a recipe and the bases below it, and the name to use in messages."""
    tree, path = _read_file(source)
    if path.resolve() in above:
        raise InputError(f"{above[0].name}: base: {path.name} is its own base")
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path.name}: base: must be a recipe's name or a .yaml file, got {shown(base)}")
        if len(above) >= MOST_BASES:
            raise InputError(f"{above[0].name}: base: more than {MOST_BASES} recipes below each other")
        place = path.parent / home_followed(base) if base.endswith((".yaml", ".yml")) else base
        below, _ = _read(place, (*above, path.resolve()))
        tree = _merge(below, tree)
    return tree, path.name


def _read_file(source: str | Path) -> tuple[dict[str, Any], Path]:
    path = home_followed(source)
    if path.suffix not in (".yaml", ".yml"):
        known = recipe_names()
        if str(source) not in known:
            raise InputError(
                f'unknown recipe "{str(source)[:80]}"{nearest(str(source), known)}; it must be a .yaml file or one of: '
                + ", ".join(known)
            )
        path = RECIPES / f"{source}.yaml"
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise InputError(f"recipe file {path} does not exist")
    tree = parse_yaml(read_text(path), path.name)
    if not isinstance(tree, dict):
        raise InputError(f"{path.name}: a recipe must be a mapping of keys to values, got {type(tree).__name__}")
    return tree, path


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`; mappings merge, anything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _put(tree: dict[str, Any], dotted: str, value: Any, mistakes: _Mistakes) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        below = tree.get(name)
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            mistakes.add_of(dotted, f"{name} is not a group of keys")
            return
        tree = below
    tree[last] = value


def _with_overrides(terms: list[Any], of_terms: Mapping[str, Any], mistakes: _Mistakes) -> list[Any]:
    """The terms after overrides such as `losses.1.stages` or `losses.pcd.stages`."""
    names = [str(term.get("method", "")) if isinstance(term, Mapping) else "" for term in terms]
    for dotted, value in of_terms.items() if terms else ():  # without terms, the method is the mistake
        parts = dotted.split(".")
        shown = ", ".join(name for name in names if name)
        if len(parts) != 3:
            mistakes.add(f"must be losses.TERM.KEY, where TERM is a position or one of: {shown}", f"--set {dotted}")
            continue
        _, name, key = parts
        places = [str(i) for i in range(len(terms))]
        if name not in names and name not in places:
            hint = nearest(name, names) or f"; the terms are: {shown}"
            mistakes.add(f"no such term{hint}", f"--set {dotted}")
            continue
        index = names.index(name) if name in names else int(name)
        if isinstance(terms[index], Mapping):
            terms[index] = {**terms[index], key: value}
            mistakes.words[f"losses.{index}.{key}"] = f"--set {dotted}"
    return terms


def _nested_terms(terms: Iterable[Any], key: str, mistakes: _Mistakes) -> list[dict[str, Any]]:
    """Terms as the schema has them, each loss's options apart; what is no term is named and left out."""
    found = []
    for i, term in enumerate(terms):
        here = f"{key}.{i}"
        if not isinstance(term, Mapping) or "method" not in term:
            mistakes.add_of(here, f'a term must be a mapping with "method", got {shown(term)}')
            continue
        method = term["method"]
        if not isinstance(method, str) or (method not in METHODS and not is_user_code(method)):
            hint = nearest(method, METHODS) if isinstance(method, str) else ""
            mistakes.add_of(f"{here}.method", f'unknown method "{method}"{hint}')
            continue
        known = {name: term[name] for name in TERM_KEYS if name in term}
        options = {name: value for name, value in term.items() if name not in TERM_KEYS}
        nested = term.get("options", {})
        if isinstance(nested, Mapping):
            for name in [name for name in nested if name in options or name in TERM_KEYS]:
                other = "is given twice" if name in options else "is a key of the term, not of its options"
                mistakes.add_of(f"{here}.options.{name}", other)
            nested = {**nested, **options}
        for place, fault in value_faults(nested, here):
            mistakes.add_of(place, fault)
        found.append({**known, "options": nested})
    return found


# Keys without effect in some recipes: what that depends on, when it is so, and what to say.
IDLE: dict[str, tuple[str, Callable[[Recipe], bool], str]] = {
    "optim.milestones": (
        "optim.schedule",
        lambda recipe: recipe.optim.schedule != "multistep",
        "has no effect unless optim.schedule is multistep",
    ),
    "optim.gamma": (
        "optim.schedule",
        lambda recipe: recipe.optim.schedule != "multistep",
        "has no effect unless optim.schedule is multistep",
    ),
    "optim.momentum": ("optim.name", lambda recipe: recipe.optim.name == "adamw", "has no effect on adamw"),
    "optim.nesterov": ("optim.name", lambda recipe: recipe.optim.name == "adamw", "has no effect on adamw"),
    "data.streamed": (
        "data.name",
        lambda recipe: not any(str(one).startswith("hf:") for one in (recipe.data.name, recipe.data.unlabelled)),
        "has no effect unless data.name or data.unlabelled begins with hf:",
    ),
    "data.unlabelled_batch": (
        "data.unlabelled",
        lambda recipe: recipe.data.unlabelled is None,
        "has no effect without data.unlabelled",
    ),
    "data.unlabelled": (
        "method",
        lambda recipe: recipe.data.unlabelled is not None and not recipe.distils,
        "images without labels have no effect on a student that is trained alone",
    ),
    "student.head": (
        "method",
        lambda recipe: recipe.student.head == "teacher" and not recipe.distils,
        "there is no teacher whose head could be copied",
    ),
    "teachers_combine": ("teachers", lambda recipe: not recipe.teachers, "has no effect on one teacher"),
    "teacher.weight": ("teachers", lambda recipe: not recipe.teachers, "has no effect on one teacher"),
    **dict.fromkeys(
        ("detection.top_k", "detection.threshold"),
        ("task", lambda recipe: recipe.task != "detection", "has no effect unless task is detection"),
    ),
}


# Keys of big teachers, with their defaults.
BIG: dict[str, Any] = {"precision": "float32", "batch_size": None, "shard": False}

# Keys that came later, by group, with their defaults: recipes without them keep their digests.
LATER: dict[str, dict[str, Any]] = {
    "": {"teachers": [], "teachers_combine": "probabilities"},
    "data": {"unlabelled": None, "unlabelled_batch": None, "streamed": False},
    "student": {"head": "own"},
    "teacher": {"weight": 1.0, "call": False, **BIG},
    "detection": {"pairing": "auto", "boxes": "none", "boxes_weight": 1.0, "adapters": []},
}


def _drop_later_keys(plain: dict[str, Any]) -> None:
    """Take the keys that came later out of a recipe's plain values where they are at their defaults."""
    groups = [plain if not group else plain[group] for group in LATER]
    for group, defaults in [
        *zip(groups, LATER.values(), strict=True),
        *((t, LATER["teacher"]) for t in plain["teachers"]),
    ]:
        for key, default in defaults.items():
            if group is not None and group.get(key) == default:
                del group[key]


def _flat_term(term: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in term.items() if key != "options" and value is not None}
    if own.get("strength_follow"):
        own.pop("strength_follow")
    if not own.get("entropy_weighting"):
        own.pop("entropy_weighting", None)  # keys that came later: recipes without them keep their digests
    return {**own, **term["options"]}


def _validated(tree: dict[str, Any], mistakes: _Mistakes) -> Recipe | None:
    """The recipe, or None if the schema refuses anything."""
    try:
        return _schema().validate_python(tree)
    except ValidationError as error:
        for key, message in dict.fromkeys(_told(found) for found in error.errors()):
            mistakes.add_of(key, message)
    return None


def _told(found: Any) -> tuple[str, str]:
    """One of the schema's errors: the dotted key, and a sentence."""
    path, kind, given = [str(part) for part in found["loc"]], found["type"], shown(found["input"])
    key = ".".join(path)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_at(path[:-1])
        return key, f'unknown key "{key}"' + (nearest(path[-1], known) or f"; known keys: {', '.join(known)}")
    if kind == "dataclass_type":
        return key, f"{key} must be a group of keys, got {given}"
    quoted = "; put it in quotes" if kind == "string_type" and isinstance(found["input"], int | float) else ""
    return key, f"{found['msg'].lower()}, got {given}{quoted}"


def _keys_at(path: list[str]) -> list[str]:
    """Names of the fields of the dataclass at a path of field names."""
    at: Any = Recipe
    nested = {"data": DataConfig, "student": StudentConfig, "teacher": TeacherConfig, "optim": OptimConfig}
    nested.update(train=TrainConfig, detection=DetectionConfig, teachers=TeacherConfig)
    if path:
        at = nested.get(path[0], TermConfig)
    return [f.name for f in dataclasses.fields(at)]
