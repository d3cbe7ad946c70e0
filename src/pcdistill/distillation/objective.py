"""The objective: terms are built here from a recipe, checked before the teacher is trained, and summed."""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.distillation.strength import Strength
from pcdistill.errors import InputError, nearest
from pcdistill.files import home_followed
from pcdistill.losses._features import rows_of
from pcdistill.losses.base import Features, Kind, Needs, Shapes, check_fit, check_needs, kind_of, needs_of
from pcdistill.losses.eakd import EntropyWeightedLoss
from pcdistill.losses.lskd import StandardizedLoss
from pcdistill.losses.options import Option, fitted, options_of
from pcdistill.losses.pcd import DEFAULT_STAGES
from pcdistill.methods import METHODS
from pcdistill.models.names import is_user_code
from pcdistill.recipe import Recipe, TermConfig
from pcdistill.schedules import moved, warmup_factor

# Arguments of a loss's constructor that the engine fills in: no options of a recipe.
OFFERED: dict[Kind, tuple[str, ...]] = {
    "logits": ("num_classes",),
    "features": ("student", "teacher", "n_data", "labels", "num_classes"),
    "pyramids": ("student", "teacher", "n_data", "num_classes"),
}


@dataclass
class Term:
    """One loss of the objective.

    Attributes:
        name: what its column is called.
        loss: the module, `loss(student, teacher, target)` -> scalar.
        weight: its factor after warm-up.
        warmup_epochs: epochs over which the factor rises.
        weight_to: the weight moves from `weight` in the first epoch to this in the last.
        temperature_to: the same of the loss's attribute `temperature`.
        strength: chooses the weight so that the term pulls so many times as hard as the labels; `weight` is then 1.
    """

    name: str
    loss: nn.Module
    weight: float = 1.0
    warmup_epochs: float = 0.0
    weight_to: float | None = None
    temperature_to: float | None = None
    strength: Strength | None = None

    def __post_init__(self) -> None:
        self.kind: Kind = kind_of(self.loss)
        self.needs: Needs = needs_of(self.loss)


class Objective(nn.Module):
    """Weighted sum of terms; learnable parts of the losses (adapters, temperatures) are its parameters."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise InputError("an objective needs at least one term")
        self.terms = list(terms)
        self.losses = nn.ModuleList(term.loss for term in terms)
        self.factors = [term.weight * warmup_factor(0.0, term.warmup_epochs) for term in terms]
        self._temperatures = [_start_temperature(term) for term in terms]
        self.strengths = nn.ModuleDict({str(i): t.strength for i, t in enumerate(terms) if t.strength is not None})

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    @property
    def notes(self) -> list[str]:
        """What the terms say of how they were built."""
        return [f"{term.name}: {note}" for term in self.terms if (note := getattr(term.loss, "note", None))]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term with a weight looks at the teacher."""
        return any((term.weight > 0 or term.weight_to) and term.needs.teacher for term in self.terms)

    @property
    def moving(self) -> list[str]:
        """Names of the terms that depend on where training is, and so on :meth:`set_progress`."""

        def moves(term: Term) -> bool:
            own: Any = term.loss
            return bool(
                term.warmup_epochs > 0
                or term.weight_to is not None
                or term.temperature_to is not None
                or getattr(own, "moves", hasattr(own, "set_progress"))
            )

        return [term.name for term in self.terms if moves(term)]

    @property
    def needs_index(self) -> bool:
        """Whether any term looks at the samples' positions in the data set."""
        return any(term.needs.index for term in self.terms)

    @property
    def views(self) -> int:
        return max(term.needs.views for term in self.terms)

    def set_progress(self, *, progress: float, epoch: float, total_epochs: int) -> None:
        """Tell every term where training is: `progress` in [0, 1), `epoch` from 0, of so many."""
        for i, (term, start) in enumerate(zip(self.terms, self._temperatures, strict=True)):
            end = term.weight if term.weight_to is None else term.weight_to
            weight = moved(term.weight, end, epoch=epoch, total_epochs=total_epochs)
            self.factors[i] = weight * warmup_factor(epoch, term.warmup_epochs)
            loss: Any = term.loss
            if start is not None and term.temperature_to is not None:
                loss.temperature = moved(start, term.temperature_to, epoch=epoch, total_epochs=total_epochs)
            if hasattr(loss, "set_progress"):
                loss.set_progress(progress=progress, epoch=epoch)

    def forward(self, student: Any, teacher: Any, target: Tensor, labelled: Tensor | None = None) -> dict[str, Tensor]:
        """Sum the terms. Those that need labels get the rows that have one; without any they are 0, with a graph.

        Args:
            student: the student's logits [N, C], or its Features when a term needs them.
            teacher: the same of the teacher; None when no term looks at it.
            target: [N] class indices or [N, C] probabilities.
            labelled: [L] positions of the rows that have a label; None: all have one.

        Returns:
            "loss" with a graph, and "loss/NAME" for every term: its unweighted value, detached.
        """
        student_logits = student.logits if isinstance(student, Features) else student
        teacher_logits = teacher.logits if isinstance(teacher, Features) else teacher
        if teacher_logits is None:
            teacher_logits = student_logits.detach()  # no term reads it
        if self.strengths:
            student_logits = student_logits.float()  # as the losses do: gradients in half precision vanish

        def value_of(term: Term) -> Tensor:
            labels = target if term.needs.labels else None
            pair = (student, teacher) if term.kind == "features" else (student_logits, teacher_logits)
            if labels is not None and labelled is not None:
                if len(labelled) == 0:
                    return student_logits[:0].sum()
                pair, labels = (rows_of(pair[0], labelled), rows_of(pair[1], labelled)), labels[labelled]
            value: Tensor = term.loss(*pair, labels)
            return value

        def places_of(term: Term) -> list[Tensor]:
            if term.kind != "features":
                return [student_logits]
            return [*student.maps, *(student.pre_activations or ()), student.pooled]

        def labels_alone() -> Tensor:
            if labelled is None:
                return F.cross_entropy(student_logits, target)
            # The sum by hand: the mean over no rows is no number.
            return F.cross_entropy(student_logits[labelled], target[labelled], reduction="sum") / max(len(labelled), 1)

        return self.weigh(value_of, Pull(places_of, labels_alone))

    def weigh(self, value_of: Callable[[Term], Tensor], pull: "Pull") -> dict[str, Tensor]:
        """The sum of the terms' values under their factors as "loss", and every value, detached, as "loss/NAME".

        The weight of a term with a strength is "loss/weight/NAME".
        """
        values = [value_of(term) for term in self.terms]
        factors: list[float | Tensor] = list(self.factors)
        parts = {f"loss/{term.name}": value.detach() for term, value in zip(self.terms, values, strict=True)}
        for i, term in enumerate(self.terms):
            if term.strength is not None:
                if values[i].requires_grad:
                    self._measure(term.strength, term, values, pull)
                factors[i] = self.factors[i] * term.strength.factor
                parts[f"loss/weight/{term.name}"] = term.strength.factor
        total = sum(factor * value for factor, value in zip(factors, values, strict=True))
        assert isinstance(total, Tensor)
        return {"loss": total, **parts}

    def _measure(self, strength: Strength, term: Term, values: Sequence[Tensor], pull: "Pull") -> None:
        if strength.due:
            terms = zip(self.terms, self.factors, values, strict=True)
            # A term of weight 0 pulls at nothing, and then the labels alone are the measure, as without it.
            own = [f * v for t, f, v in terms if not t.needs.teacher and (t.weight or t.weight_to)]
            labels = torch.stack(own).sum() if own else pull.labels_alone()
            strength.measure(values[self.terms.index(term)], labels, pull.places_of(term))
        strength.steps += 1


@dataclass(frozen=True)
class Pull:
    """Where terms and labels are compared by their gradients (see :mod:`pcdistill.distillation.strength`).

    Attributes:
        places_of: the student's tensors that a term compares.
        labels_alone: the labels' loss, for an objective without a term of it.
    """

    places_of: Callable[[Term], list[Tensor]]
    labels_alone: Callable[[], Tensor]


def _start_temperature(term: Term) -> float | None:
    """Where a moving temperature starts; None where it does not move."""
    if term.temperature_to is None:
        return None
    start = getattr(term.loss, "temperature", None)
    if not isinstance(start, int | float):
        raise InputError(f"{term.name}: temperature_to needs a loss with one temperature, and this loss has none")
    return float(start)


def build_objective(
    terms: Sequence[TermConfig], *, num_classes: int, context: Mapping[str, Any] | None = None
) -> Objective:
    """The recipe's terms as one module; names are made unique."""
    built: list[Term] = []
    for i, term in enumerate(terms):
        loss = build_loss(
            term.method,
            term.options,
            standardize=term.standardize,
            entropy_weighting=term.entropy_weighting,
            where=f"losses.{i}",
            context={"num_classes": num_classes, **(context or {})},
        )
        name = short_name(term.method)
        if any(other.name == name for other in built):
            name = f"{name}_{i}"
        strength = _strength(term, needs_of(loss), f"losses.{i}")
        built.append(Term(name, loss, term.weight, term.warmup_epochs, term.weight_to, term.temperature_to, strength))
    return Objective(built)


def _strength(term: TermConfig, needs: Needs, where: str) -> Strength | None:
    """What chooses the term's weight, if the recipe gives a strength.

    Raises:
        InputError: a term that has no counterpart among the labels to be measured by.
    """
    if term.strength is None:
        return None
    if term.weight != 1.0 or term.weight_to is not None:
        raise InputError(f"{where}: {term.method}: give a weight or a strength, not both")
    if not needs.teacher:
        raise InputError(f"{where}: {term.method}: strength is for terms that compare with the teacher; give a weight")
    if needs.replaces_labels:
        raise InputError(
            f"{where}: {term.method} stands for cross-entropy too, so there is no pull of the labels to compare with; "
            "leave strength out and give a weight"
        )
    return Strength(term.strength, follow=term.strength_follow)


def at_strength(recipe: Recipe, strength: float) -> Recipe | None:
    """The recipe with every term that compares with the teacher at this strength, and the labels at weight 1.

    Several such terms share the strength as they shared the weight. No term is warmed up: a strength already keeps a
    steep loss from pulling too hard at the start.

    None where there is nothing to weigh: no teacher, or a term that stands for the labels' loss too.
    """
    needs = [term_needs(term, f"losses.{i}") for i, term in enumerate(recipe.losses)]
    whole = sum(term.weight for term, need in zip(recipe.losses, needs, strict=True) if need.teacher)
    if whole == 0 or any(need.replaces_labels for need in needs):
        return None
    terms = []
    for term, need in zip(recipe.losses, needs, strict=True):
        own = strength * (term.weight / whole) if need.teacher and term.weight > 0 else None
        weight = 0.0 if need.teacher and own is None else 1.0
        terms.append(replace(term, weight=weight, weight_to=None, warmup_epochs=0.0, strength=own))
    return replace(recipe, losses=tuple(terms))


def build_loss(
    method: str,
    options: Mapping[str, Any],
    *,
    standardize: bool = False,
    entropy_weighting: bool | float = False,
    where: str = "losses",
    context: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a loss by name or by `path/to/file.py:Class`, with its options checked against its signature.

    Args:
        method: a key of METHODS, or the user's own class.
        options: keyword arguments from the recipe.
        standardize: wrap the loss so that it sees standardised logits (LSKD).
        entropy_weighting: wrap it so that samples weigh by their entropies (EA-KD); a number is the temperature.
        where: the key to name in messages.
        context: what the engine can offer: arguments with these names are filled in when the loss asks for them.

    Raises:
        InputError: unknown method or option, or a value that the loss refuses.
    """
    loss_class = _loss_class(method, where)
    accepted = _check_options(loss_class, method, options, where)
    offered = {name: value for name, value in (context or {}).items() if name in accepted}
    try:
        loss = loss_class(**offered, **fitted(loss_class, options))
        kind = kind_of(loss)
        needs_of(loss)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {method}: {error}") from error
    if standardize:
        if kind != "logits":
            raise InputError(f"{where}: standardize fits losses on logits; {method} compares {kind}")
        loss = StandardizedLoss(loss)
    if not entropy_weighting:
        return loss
    if kind != "logits":
        raise InputError(f"{where}: entropy_weighting fits losses on logits; {method} compares {kind}")
    temperature = {} if entropy_weighting is True else {"entropy_temperature": entropy_weighting}
    try:
        return EntropyWeightedLoss(loss, **temperature)
    except ValueError as error:
        raise InputError(f"{where}: {method}: entropy_weighting: {error}") from error


def _loss_class(method: str, where: str) -> Callable[..., nn.Module]:
    if method in METHODS:
        return METHODS[method].load()
    if is_user_code(method):
        return import_user_object(method, where)
    raise InputError(f'{where}: unknown method "{method}"{nearest(method, METHODS)}')


def _check_options(
    loss_class: Callable[..., nn.Module], method: str, options: Mapping[str, Any], where: str
) -> tuple[str, ...]:
    """Raise unless the class has all options; the names of those of its arguments that the engine fills in."""
    parameters = inspect.signature(loss_class).parameters
    accepted = tuple(name for name in OFFERED[_class_kind(loss_class, method, where)] if name in parameters)
    known = [name for name in parameters if name not in accepted]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in options:
            if name not in known:
                hint = nearest(name, known) or f"; its options: {', '.join(known) or 'none'}"
                raise InputError(f'{where}: {method} has no option "{name}"{hint}')
    try:
        fitted(loss_class, options)
    except ValueError as error:
        raise InputError(f"{where}: {method}: {error}") from None
    return accepted


def _class_kind(loss_class: Any, method: str, where: str) -> Kind:
    try:
        return kind_of(loss_class)
    except ValueError as error:
        raise InputError(f"{where}: {method}: {error}") from error


def method_kind(method: str, where: str = "losses") -> Kind:
    """What a method compares: "logits", "features" or "pyramids"."""
    return METHODS[method].kind if method in METHODS else _class_kind(_loss_class(method, where), method, where)


def method_options(method: str, where: str = "--options") -> list[Option]:
    """What a recipe can set of a method's loss, beside the keys that every term has.

    Raises:
        InputError: unknown method.
    """
    loss_class = _loss_class(method, where)
    return options_of(loss_class, without=OFFERED[_class_kind(loss_class, method, where)])


def resolved_terms(recipe: Recipe, num_classes: int | None = None) -> list[dict[str, Any]]:
    """The recipe's terms as plain values with every option: what it gives, and the losses' defaults for the rest.

    Of a term with a strength no weight is named: the strength chooses it.

    Args:
        recipe: its terms are checked.
        num_classes: C, of which some defaults are made, such as PCD's number of stages; None leaves those out.
    """
    found = []
    recipe = recipe if num_classes is None else replace(recipe, losses=fitted_terms(recipe))
    for i, (term, given) in enumerate(zip(recipe.losses, recipe.to_dict()["losses"], strict=True)):
        where = f"losses.{i}"
        loss_class = _loss_class(term.method, where)
        offered = OFFERED[_class_kind(loss_class, term.method, where)]
        defaults = {
            name: one.default
            for name, one in inspect.signature(loss_class).parameters.items()
            if name not in offered and one.default is not one.empty
        }
        if num_classes is not None and None in defaults.values():
            with torch.random.fork_rng(devices=[]):
                plain = replace(term, standardize=False, entropy_weighting=False)
                loss = _early_loss(plain, where, {"num_classes": num_classes})
            defaults = {k: getattr(loss, k, None) if value is None else value for k, value in defaults.items()}
        own = {key: value for key, value in given.items() if not (key == "weight" and term.strength is not None)}
        quiet = {key for key, none in (("warmup_epochs", 0.0), ("standardize", False)) if own.get(key) == none}
        whole = json.loads(json.dumps({**own, **{k: v for k, v in defaults.items() if k not in own}}, default=str))
        found.append({key: value for key, value in whole.items() if key not in quiet and value is not None})
    return found


def term_needs(term: TermConfig, where: str = "losses") -> Needs:
    """What a term needs of a run, before there are features or classes to build it from: by its options, if it can be
    built without them, else by its class.
    """
    loss = _early_loss(term, where, {})
    if loss is not None:
        return needs_of(loss)
    try:
        return needs_of(_loss_class(term.method, where))
    except ValueError as error:
        raise InputError(f"{where}: {term.method}: {error}") from error


def _early_loss(term: TermConfig, where: str, context: Mapping[str, Any]) -> nn.Module | None:
    """The term's loss, if the engine need not offer more than the context to build it. Its options are checked."""
    loss_class = _loss_class(term.method, where)
    accepted = _check_options(loss_class, term.method, term.options, where)
    parameters = inspect.signature(loss_class).parameters
    if any(parameters[name].default is inspect.Parameter.empty and name not in context for name in accepted):
        return None
    return build_loss(
        term.method,
        term.options,
        standardize=term.standardize,
        entropy_weighting=term.entropy_weighting,
        where=where,
        context=context,
    )


def views_of(recipe: Recipe) -> int:
    """Views of each image: the recipe's number, or as many as its losses compare."""
    if recipe.data.views is not None:
        return recipe.data.views
    return max((term_needs(term, f"losses.{i}").views for i, term in enumerate(recipe.losses)), default=1)


def fitted_terms(recipe: Recipe) -> tuple[TermConfig, ...]:
    """The recipe's terms, where the options that the recipe's name of the method brings give way to few classes.

    PCD's S is the one: at its default it is left to the loss, which cuts it to what the classes allow. An S that was
    asked for stays, and is refused where it does not fit.
    """
    named = [(term.method, term.options) for term in recipe.methods.get(recipe.method, ())]
    found = []
    for term in recipe.losses:
        brought = (term.method, term.options) in named and term.options.get("stages") == DEFAULT_STAGES
        options = {key: value for key, value in term.options.items() if not (brought and key == "stages")}
        found.append(replace(term, options=options))
    return tuple(found)


def check_losses(recipe: Recipe, num_classes: int, *, soft_labels: bool = False) -> None:
    """Ask every term whether it can be trained in this run: a misfit is known before the teacher is trained.

    Losses that are built from features are asked for their options' names alone, and by their class's needs.

    Args:
        recipe: its terms, and what it does to labels.
        num_classes: C.
        soft_labels: whether the data's own targets are probabilities.

    Raises:
        InputError: with the term's own sentence, for example stages > C // 2.
    """
    soft_labels = soft_labels or recipe.data.mixup > 0 or recipe.data.cutmix > 0
    shapes = Shapes(num_classes, views=views_of(recipe), soft_labels=soft_labels)
    with torch.random.fork_rng(devices=[]):
        for i, term in enumerate(fitted_terms(recipe)):
            loss = _early_loss(term, f"losses.{i}", {"num_classes": num_classes})
            needs = term_needs(term, f"losses.{i}")
            _strength(term, needs, f"losses.{i}")
            try:
                if loss is not None:
                    check_fit(loss, shapes)
                else:
                    check_needs(needs, shapes)
            except ValueError as error:
                raise InputError(f"losses.{i}: {short_name(term.method)}: {error}") from error


def short_name(method: str) -> str:
    """The method's name, or the class's of `path/to/file.py:Class`."""
    return method.rsplit(":", 1)[-1] if is_user_code(method) else method


def import_user_object(spec: str, where: str) -> Callable[..., Any]:
    """What `path/to/file.py:name` names. The user's file is run: that is what the user asked for."""
    path_text, _, name = spec.rpartition(":")
    path = home_followed(path_text)
    if not path.is_file():
        raise InputError(f"{where}: file {path} does not exist")
    module_name = f"pcdistill_user_{path.stem}_{abs(hash(str(path.resolve())))}"
    if module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[module_name]
            if isinstance(error, Exception):
                raise InputError(f"{where}: {path} cannot be imported: {type(error).__name__}: {error}") from error
            raise
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f'{where}: {path} has no "{name}"{nearest(name, public)}')
    found: Callable[..., Any] = getattr(module, name)
    return found
