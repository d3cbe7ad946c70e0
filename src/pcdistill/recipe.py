"""Recipes: a typed schema, YAML files with one level of `base`, overrides, and errors that name file and key.

Nothing in a recipe is executed: it holds values only. The one exception is named by its form: a model or a loss given
as `path/to/file.py:name` is the user's own code, and is imported when it is built.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pcdistill.errors import InputError, nearest
from pcdistill.methods import METHODS

RECIPES = Path(__file__).parent / "recipes"
FORBID = ConfigDict(extra="forbid")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are fed.

    `batch_size` is the global batch of one optimiser step; `views` is by default what the losses compare; `seed`, of
    split, order and augmentation, is by default the teacher cache's, else the run's.
    """

    __pydantic_config__ = FORBID
    name: str = "digits"
    batch_size: Count = 64
    eval_batch_size: Count = 256
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    image_size: Count | None = None
    augment: str = "auto"
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    views: Annotated[int, Field(ge=1, le=2)] | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    limit: Count | None = None
    download: bool = False
    root: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model by name (`timm/`, `torchvision/`, `cifar/`, `hf/` and NAME, or `file.py:function`) and its weights."""

    __pydantic_config__ = FORBID
    name: str = "cifar/resnet8"
    weights: str | None = None
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The teacher; `epochs` > 0 trains it first, with the student's recipe, when it has no weights for these classes.

    `classes` names its outputs when the weights do not; `mean`, `std` and `image_size` are its own input's; `cache` is
    a folder that `pcdistill cache` made, whose logits stand in for the teacher's in training.
    """

    name: str = "cifar/resnet20"
    epochs: Annotated[int, Field(ge=0)] = 0
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    image_size: Count | None = None
    cache: str | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and gradient clipping (`clip_norm`: None turns it off)."""

    __pydantic_config__ = FORBID
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: Positive = 0.1
    warmup_epochs: NotNegative = 0.0
    clip_norm: Positive | None = 5.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and bookkeeping of a run. `ema` is the decay of the weights' moving average, 0 for none.

    `channels_last` is by default on but for Apple's GPUs and for students whose training breaks in it on a CPU (see
    pcdistill.engine.loop.uses_channels_last); `fold_teacher` folds the teacher's batch normalisation into its
    convolutions where features are not compared. Both change rounding alone.
    """

    __pydantic_config__ = FORBID
    epochs: Count = 30
    seed: Annotated[int, Field(ge=0)] = 0
    accumulate: Count = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keep: Literal["best", "last"] = "best"
    compile: bool = False
    channels_last: bool | None = None
    fold_teacher: bool = True
    sync_batchnorm: bool = True
    checkpoint_seconds: NotNegative = 60.0
    device: str = "auto"
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@dataclass(frozen=True)
class DetectionConfig:
    """Where dense detectors (RetinaNet, FCOS) compare logits: on the `top_k` anchors of an image that the teacher rates
    highest, if it rates them `threshold` at least. Two-stage detectors compare them on the student's proposals.
    """

    __pydantic_config__ = FORBID
    top_k: Count = 100
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class TermConfig:
    """One weighted term of the objective; keys that are not listed here are options of the loss itself.

    `weight_to` and `temperature_to`: where weight and temperature move to, epoch by epoch and in equal steps, from
    `weight` and the loss's `temperature` in the first epoch to these values in the last; none: they stay.
    `entropy_weighting`: samples weigh by the entropies of teacher and student (EA-KD) at this temperature; true: at 3.
    """

    __pydantic_config__ = FORBID
    method: str
    weight: NotNegative = 1.0
    weight_to: NotNegative | None = None
    temperature_to: Positive | None = None
    warmup_epochs: NotNegative = 0.0
    standardize: bool = False
    entropy_weighting: bool | float = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result. `allow` lists the checks that are overridden by name."""

    __pydantic_config__ = FORBID
    task: Literal["classification", "detection"] = "classification"
    method: str = "pcd"
    losses: tuple[TermConfig, ...] = ()
    methods: dict[str, tuple[TermConfig, ...]] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    allow: tuple[Literal["weak-teacher", "mismatched-weights", "class-order"], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; `Recipe` and back loses nothing."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        plain["losses"] = [_flat_term(term) for term in plain["losses"]]
        plain["methods"] = {name: [_flat_term(term) for term in terms] for name, terms in plain["methods"].items()}
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any value that can change a run's result."""
        plain = self.to_dict()
        for key in ("checkpoint_seconds", "trackers", "device"):
            plain["train"].pop(key)
        plain.pop("methods")
        if self.task != "detection":
            plain.pop("detection")
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


TERM_KEYS = [f.name for f in dataclasses.fields(TermConfig)]
ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(
    source: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from a name or file, then dotted `values`, then `key=value` overrides, in this order.

    Args:
        source: a shipped recipe's name, a YAML file, or None for the schema's defaults.
        overrides: strings `dotted.key=value`, the value in YAML; a term of `losses` is addressed by position or method.
        values: dotted keys to values, as the command line's flags give them; None values are passed over.

    Raises:
        InputError: naming the file, the key, and the nearest valid key.
    """
    tree, where = _read(source) if source is not None else ({}, "recipe")
    given = {key: value for key, value in (values or {}).items() if value is not None}
    text: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise InputError(f"--set must be KEY=VALUE, got {override!r}")
        try:
            text[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key}: the value is not valid YAML: {value!r}") from error
    method = text.get("method", given.get("method"))
    if method is not None and "losses" not in text:
        tree.pop("losses", None)  # a method that is asked for brings its own terms
    for owner in ("student", "teacher"):
        name = text.get(f"{owner}.name", given.get(f"{owner}.name"))
        old = tree.get(owner)
        if name is not None and isinstance(old, dict):
            # A model that is asked for by name is that model, without the arguments and weights of the recipe's.
            tree[owner] = {key: value for key, value in old.items() if key == "epochs"}
    for key, value in {**given, **{k: v for k, v in text.items() if not k.startswith("losses.")}}.items():
        _put(tree, key, value, "--set" if key in text else where)
    return make_recipe(tree, where, {k: v for k, v in text.items() if k.startswith("losses.")})


def make_recipe(
    tree: Mapping[str, Any], where: str = "recipe", term_overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Check a tree of plain values against the schema, and fill in the terms that the method's name stands for."""
    plain = copy.deepcopy(dict(tree))
    method = plain.get("method", Recipe.method)
    plain["method"] = method
    named = plain.get("methods") or {}
    if not plain.get("losses"):
        plain["losses"] = method_terms(method, named, where, task=plain.get("task", Recipe.task))
    for key, value in (term_overrides or {}).items():
        _put_term(plain["losses"], key, value)
    plain["losses"] = [_nested_term(term, f"losses.{i}", where) for i, term in enumerate(plain["losses"])]
    plain["methods"] = {
        name: [_nested_term(term, f"methods.{name}.{i}", where) for i, term in enumerate(terms)]
        for name, terms in named.items()
    }
    return _validate(plain, where)


def method_terms(
    method: str, named: Mapping[str, Any], where: str = "recipe", *, task: str = "classification"
) -> list[dict[str, Any]]:
    """The terms that a method's name stands for: the recipe's own, else the registry's; "none" is the task's own loss.

    In detection the detector's own losses stand, with weight 1, where classification has cross-entropy, and the
    distillation term of a logit method keeps its weight and options.
    """
    own = {"method": "detector" if task == "detection" else "ce", "weight": 1.0}
    if method in named:
        return copy.deepcopy(list(named[method]))
    if method == "none":
        return [own]
    if method in METHODS:
        terms = copy.deepcopy(list(METHODS[method].terms))
        if task == "detection" and not any(term["method"] == "detector" for term in terms):
            return [own, *(term for term in terms if term["method"] != "ce")]
        return terms
    if ".py:" in method:
        return [own, {"method": method, "weight": 1.0}]
    known = ["none", *METHODS, *named]
    raise InputError(f'{where}: method: unknown method "{method}"{nearest(method, known)}; known: {", ".join(known)}')


def with_method(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The same recipe under another method and seed, for comparisons."""
    tree = recipe.to_dict()
    tree.update(method=method, losses=[])
    tree["train"]["seed"] = seed
    return make_recipe(tree)


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    """The merged tree of a recipe and its base, and the name to use in messages."""
    tree, path = _read_file(source)
    base = tree.pop("base", None)
    if base is not None:
        below, _ = _read_file(path.parent / base if str(base).endswith((".yaml", ".yml")) else str(base))
        if "base" in below:
            raise InputError(f"{path.name}: base: {base} has a base of its own; one level is the most")
        tree = _merge(below, tree)
    return tree, path.name


def _read_file(source: str | Path) -> tuple[dict[str, Any], Path]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            known = recipe_names()
            raise InputError(
                f'unknown recipe "{source}"{nearest(str(source), known)}; it must be a .yaml file or one of: '
                + ", ".join(known)
            )
    if not path.is_file():
        raise InputError(f"recipe file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path.name}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
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


def _put(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        below = tree.get(name)
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise InputError(f"{where}: {dotted}: {name} is not a group of keys")
        tree = below
    tree[last] = value


def _put_term(terms: list[dict[str, Any]], dotted: str, value: Any) -> None:
    """Set `losses.1.stages` or `losses.pcd.stages`."""
    parts = dotted.split(".")
    names = [str(term.get("method")) for term in terms]
    if len(parts) != 3:
        raise InputError(f"--set {dotted}: must be losses.TERM.KEY, TERM a position or one of: {', '.join(names)}")
    _, name, key = parts
    if name in names:
        index = names.index(name)
    elif name.isdigit() and int(name) < len(terms):
        index = int(name)
    else:
        raise InputError(f"--set {dotted}: no such term{nearest(name, names)}; the terms are: {', '.join(names)}")
    terms[index] = {**terms[index], key: value}


def _nested_term(term: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(term, Mapping) or "method" not in term:
        raise InputError(f'{where}: {key}: a term must be a mapping with "method", got {term!r}')
    method = str(term["method"])
    if method not in METHODS and ".py:" not in method:
        raise InputError(f'{where}: {key}.method: unknown method "{method}"{nearest(method, METHODS)}')
    known = {name: term[name] for name in TERM_KEYS if name in term}
    options = {**term.get("options", {}), **{name: value for name, value in term.items() if name not in TERM_KEYS}}
    return {**known, "options": options}


def _flat_term(term: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in term.items() if key != "options" and value is not None}
    if not own.get("entropy_weighting"):
        own.pop("entropy_weighting", None)  # runs from before it keep their digest
    return {**own, **term["options"]}


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return ADAPTER.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        key = ".".join(path)
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _keys_at(path[:-1])
            hint = nearest(path[-1], known) or f"; known keys: {', '.join(known)}"
            raise InputError(f'{where}: unknown key "{key}"{hint}') from None
        raise InputError(f"{where}: {key}: {first['msg'].lower()}, got {first['input']!r}") from None


def _keys_at(path: list[str]) -> list[str]:
    """Names of the fields of the dataclass at a path of field names."""
    at: Any = Recipe
    nested = {"data": DataConfig, "student": ModelConfig, "teacher": TeacherConfig, "optim": OptimConfig}
    nested.update(train=TrainConfig, detection=DetectionConfig)
    if path:
        at = nested.get(path[0], TermConfig)
    return [f.name for f in dataclasses.fields(at)]
