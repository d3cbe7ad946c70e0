"""The objective: a weighted sum of losses, each under its own warm-up."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcdistill.errors import InputError, nearest
from pcdistill.losses import StandardizedLoss
from pcdistill.methods import METHODS
from pcdistill.schedules import moved, warmup_factor


@dataclass
class Term:
    """One loss of the objective.

    Attributes:
        name: what its column is called.
        loss: the module, `loss(student, teacher, target)` -> scalar.
        weight: its factor after warm-up.
        warmup_epochs: epochs over which the factor rises.
        kind: what it compares: "logits", "features" or "detection".
        weight_to: the weight moves from `weight` in the first epoch to this in the last.
        temperature_to: the same of the loss's attribute `temperature`.
    """

    name: str
    loss: nn.Module
    weight: float = 1.0
    warmup_epochs: float = 0.0
    kind: str = "logits"
    weight_to: float | None = None
    temperature_to: float | None = None


class Objective(nn.Module):
    """Weighted sum of terms; learnable parts of the losses (adapters, temperatures) are its parameters."""

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise InputError("an objective needs at least one term")
        self.terms = list(terms)
        self.losses = nn.ModuleList(term.loss for term in terms)
        self.factors = [term.weight * warmup_factor(0.0, term.warmup_epochs) for term in terms]
        self._tempered = [_tempered(term) for term in terms]

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term with a weight looks at the teacher."""
        return any(
            (term.weight > 0 or term.weight_to) and not getattr(term.loss, "ignores_teacher", False)
            for term in self.terms
        )

    @property
    def views(self) -> int:
        return max(int(getattr(term.loss, "views", 1)) for term in self.terms)

    def set_progress(self, *, progress: float, epoch: float, total_epochs: int) -> None:
        """Tell every term where training is: `progress` in [0, 1), `epoch` from 0, of so many."""
        for i, term in enumerate(self.terms):
            end = term.weight if term.weight_to is None else term.weight_to
            weight = moved(term.weight, end, epoch=epoch, total_epochs=total_epochs)
            self.factors[i] = weight * warmup_factor(epoch, term.warmup_epochs)
            tempered = self._tempered[i]
            if tempered is not None and term.temperature_to is not None:
                loss, start = tempered
                loss.temperature = moved(start, term.temperature_to, epoch=epoch, total_epochs=total_epochs)
            set_progress: Callable[..., None] | None = getattr(term.loss, "set_progress", None)
            if set_progress is not None:
                set_progress(progress=progress, epoch=epoch)

    def forward(self, student: Any, teacher: Any, target: Tensor) -> dict[str, Tensor]:
        """Sum the terms.

        Args:
            student: the student's logits [N, C], or its Features when a term needs them.
            teacher: the same of the teacher; None when no term looks at it.
            target: [N] class indices or [N, C] probabilities.

        Returns:
            "loss" with a graph, and "loss/NAME" for every term: its unweighted value, detached.
        """
        student_logits = getattr(student, "logits", student)
        teacher_logits = getattr(teacher, "logits", teacher)
        if teacher_logits is None:
            teacher_logits = student_logits.detach()  # no term reads it
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term, factor in zip(self.terms, self.factors, strict=True):
            if term.kind == "features":
                value = term.loss(student, teacher, target)
            else:
                value = term.loss(student_logits, teacher_logits, target)
            parts[f"loss/{term.name}"] = value.detach()
            total = factor * value if total is None else total + factor * value
        assert total is not None
        return {"loss": total, **parts}


def _tempered(term: Term) -> tuple[Any, float] | None:
    """The module whose temperature moves, and where it starts; under standardisation the inner loss."""
    if term.temperature_to is None:
        return None
    loss: Any = term.loss.loss if isinstance(term.loss, StandardizedLoss) else term.loss
    start = getattr(loss, "temperature", None)
    if not isinstance(start, int | float):
        raise InputError(f"{term.name}: temperature_to needs a loss with one temperature, which {term.name} has not")
    return loss, float(start)


def build_loss(
    method: str,
    options: Mapping[str, Any],
    *,
    standardize: bool = False,
    where: str = "losses",
    context: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, str]:
    """Build a loss by name or by `path/to/file.py:Class`, with its options checked against its signature.

    Args:
        method: a key of METHODS, or the user's own class.
        options: keyword arguments from the recipe.
        standardize: wrap the loss so that it sees standardised logits (LSKD).
        where: the key to name in messages.
        context: what the engine can offer: arguments with these names are filled in when the loss asks for them.

    Returns:
        The module and its kind.

    Raises:
        InputError: unknown method or option, or a value that the loss refuses.
    """
    if method in METHODS:
        loss_class: Callable[..., nn.Module] = METHODS[method].load()
        kind: str = METHODS[method].kind
    elif ".py:" in method:
        loss_class = import_user_object(method, where)
        kind = getattr(loss_class, "kind", "logits")
    else:
        raise InputError(f'{where}: unknown method "{method}"{nearest(method, METHODS)}')
    parameters = inspect.signature(loss_class).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {name: value for name, value in (context or {}).items() if name in parameters}
    known = [name for name in parameters if name not in (context or {})]
    for name in options:
        if name not in known and not open_ended:
            hint = nearest(name, known) or f"; its options: {', '.join(known) or 'none'}"
            raise InputError(f'{where}: {method} has no option "{name}"{hint}')
    try:
        loss = loss_class(**offered, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {method}: {error}") from error
    if standardize:
        if kind != "logits":
            raise InputError(f"{where}: standardize fits losses on logits; {method} compares {kind}")
        loss = StandardizedLoss(loss)
    return loss, kind


def import_user_object(spec: str, where: str) -> Callable[..., Any]:
    """What `path/to/file.py:name` names. The user's file is run: that is what the user asked for."""
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).expanduser()
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
