"""Distillation as one module, for loops that are not ours: a plain one, Hugging Face's, Lightning's, timm's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.classification.features import Tapped, tap
from pcdistill.classification.given_batch import Inputs, read_batch, rows_that_count
from pcdistill.data.loader import UNLABELLED, Batch, labelled_rows
from pcdistill.distillation.objective import Objective, build_objective, check_losses, method_kind, term_needs, views_of
from pcdistill.distillation.passed import first_pass
from pcdistill.distillation.teacher import Teacher, logits_of
from pcdistill.errors import InputError, PcdistillError
from pcdistill.methods import METHODS
from pcdistill.models.feature_maps import unwrap
from pcdistill.recipe import LOADERS, Recipe, load_recipe, make_recipe

CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of the names of models whose logits are of the next token


class Distiller(nn.Module):
    """Student, teacher and losses as one module: a batch -> {"loss", "logits", "loss/NAME"...}; you call `backward`.

        distiller = pcdistill.Distiller(student, teacher, "pcd", example=batch)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
        for batch in loader:
            distiller(batch)["loss"].backward()

    `parameters()` are the student's and those of the losses: adapters, projectors, temperatures. `state_dict()` has the
    same two parts; the teacher is in neither. It follows the student to its device. `student` is the module to keep:
    the one that was passed in, with SimKD one around it that has the teacher's classifier. In training mode `forward`
    distils; in eval mode it runs the student alone, and its "loss" is the labels' cross-entropy.

    A batch is (inputs, target), (inputs, target, index), or a mapping with the target under "target", "labels" or a
    name like them, and perhaps "index". Images are under "images" or "pixel_values"; other keys are handed to both
    models by name. Of methods with two views, the images are a pair.

    Args:
        student: images [N, C, H, W] -> logits [N, K], or the batch's other keys -> logits [N, T, V] of tokens.
        teacher: the same, over the same classes; frozen and kept in eval mode. A :class:`Teacher` around it says what
            differs: the order of classes, normalisation, resolution.
        method: a name of `pcdistill list methods`; None is the default of `pcdistill distill`.
        example: one batch of training. Both models are run on it once, in eval mode, to learn shapes.
        losses: terms in the recipe's form, in place of the method's own.
        labels: [n] classes of all training samples, for methods with a memory of them (crd).
        features: {"student": [module, ...], "teacher": [...]}: where features are taken; by default chosen.
        next_token: whether logits [N, T, V] at t are of the token at t + 1, so that labels are moved by one. None: yes
            if the student's class is named ...ForCausalLM or ...LMHeadModel.

    Rows of images without a label have the target -100: terms without labels learn from them. Tokens with the label
    -100, as padding has, are left out of every term.

    Raises:
        InputError: models, batch and method that do not fit, in one sentence.
    """

    accepts_loss_kwargs = False  # for transformers.Trainer: "loss" is a mean, to be divided when it accumulates

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: str | None = None,
        *,
        example: Any,
        losses: Sequence[Mapping[str, Any]] | None = None,
        labels: Sequence[int] | Tensor | None = None,
        features: Mapping[str, Sequence[str]] | None = None,
        next_token: bool | None = None,
    ) -> None:
        super().__init__()
        wrapped = teacher if isinstance(teacher, Teacher) else Teacher(_not_the_student(teacher, student))
        recipe = _recipe(student, wrapped.model, method, losses, features)
        self.views = views_of(recipe)
        seen = read_batch(example, self.views).to(_device(student))
        wrapped.to(_device(student))
        self.next_token = type(unwrap(student)).__name__.endswith(CAUSAL) if next_token is None else next_token
        num_classes = self._look(student, wrapped, seen)
        check_losses(recipe, num_classes, soft_labels=seen.target.is_floating_point())
        tapped = _tap(recipe, student, wrapped, seen, labels, num_classes)
        context = {} if tapped is None else tapped.context
        self.student = student if tapped is None else tapped.student
        self.objective: Objective = build_objective(recipe.losses, num_classes=num_classes, context=context)
        if tapped is not None:
            tapped.adopt(self.objective)
        self._hidden = _Hidden(self.student, wrapped, tapped)
        self._partly = bool((seen.target == UNLABELLED).any())
        self._told = False
        # SimKD's loss learns through the student's head: what both have is stored once, as the student's.
        own = {id(tensor): f"student.{name}" for name, tensor in _tensors(self.student)}
        self._shared = {
            f"objective.{name}": own[id(tensor)] for name, tensor in _tensors(self.objective) if id(tensor) in own
        }
        module: nn.Module = self
        module.register_state_dict_post_hook(_leave_shared_out)
        module.register_load_state_dict_pre_hook(_put_shared_in)

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._hidden.teacher

    def forward(self, batch: Any = None, **inputs: Any) -> dict[str, Tensor]:
        """One pass.

        Args:
            batch: see the class.
            **inputs: in place of it, what a mapping would hold.

        Returns:
            "loss", a scalar with a graph; "logits" [N, K] or [N, T, V] without one; "loss/NAME", every term's
            unweighted value without a graph.

        Raises:
            InputError: a batch that is none, or, in training, a method that moves and was not told where training is.
        """
        found = read_batch(inputs if batch is None else batch, self.views)
        if not self.training:
            return self._alone(found)
        self._check_told()
        hidden = self._hidden
        if self.student is not hidden.student:
            raise PcdistillError(
                "this is a copy of a distiller, whose hooks stayed with the original; use its .student"
            )
        if _device(hidden.teacher) != _device(self.student):
            hidden.teacher.to(_device(self.student))
        student: Any
        teacher: Any
        if hidden.tapped is not None:
            index = found.index if self.objective.needs_index else None
            student = hidden.tapped.run_student(found.inputs, index)
            logits, teacher = student.logits, hidden.tapped.run_teacher(found.inputs)
        else:
            logits = student = _run(self.student, found.inputs)
            teacher = hidden.run_teacher(found.inputs) if self.objective.needs_teacher else None
        if logits.ndim == 3:
            rows = rows_that_count(logits, found.target, next_token=self.next_token)
            student, teacher = rows.logits(logits), None if teacher is None else hidden.select(rows.logits(teacher))
            return {**self.objective(student, teacher, rows.target(found.target)), "logits": logits.detach()}
        labelled = labelled_rows(found.target) if self._partly or found.target.device.type == "cpu" else None
        return {**self.objective(student, teacher, found.target, labelled), "logits": logits.detach()}

    def set_progress(self, epoch: float, epochs: int) -> None:
        """Tell the losses where training is, before a step: warm-ups, moving weights and curricula follow it.

        Args:
            epoch: epochs done, from 0, with the fraction of the one under way.
            epochs: length of the training.
        """
        if not (0 <= epoch <= epochs and epochs > 0):
            raise InputError(f"set_progress: epoch must be from 0 to epochs, got {epoch} of {epochs}")
        self.objective.set_progress(progress=epoch / epochs, epoch=epoch, total_epochs=epochs)
        self._told = True

    def close(self) -> None:
        """Take the hooks out of both models; the student may then be pickled. Nothing can be trained after it."""
        if self._hidden.tapped is not None:
            self._hidden.tapped.remove()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        """The teacher goes along with `to`, `cuda`, `bfloat16` and their kind."""
        parts: tuple[Any, Any] = self._hidden.teacher, super()
        for part in parts:
            part._apply(fn, recurse)
        return self

    def _alone(self, batch: "Inputs") -> dict[str, Tensor]:
        """The student's logits and the labels' loss, as any classifier's evaluation has them."""
        logits = _run(self.student, batch.inputs)
        target = batch.target
        flat = logits.float()
        if logits.ndim == 3:
            rows = rows_that_count(logits, target, next_token=self.next_token)
            flat, target = rows.logits(flat), rows.target(target)
        loss = F.cross_entropy(flat, target, reduction="sum" if target.ndim == 1 else "mean")
        if target.ndim == 1:  # by hand: the mean over no rows is no number
            loss = loss / (target != UNLABELLED).sum().clamp(min=1)
        return {"loss": loss, "logits": logits.detach()}

    def _check_told(self) -> None:
        if not self._told and self.objective.moving:
            raise InputError(
                f"{', '.join(self.objective.moving)} changes over training: call set_progress(epoch, epochs) before "
                "each step"
            )

    def _look(self, student: nn.Module, teacher: Teacher, seen: "Inputs") -> int:
        """K, after a pass of both models over the example."""
        with first_pass("student", seen.inputs), _evaluating(student), torch.no_grad():
            own = _run(student, seen.inputs)
        with first_pass("teacher", seen.inputs):
            theirs = _run_teacher(teacher, seen.inputs)
        for name, logits in (("student", own), ("teacher", theirs)):
            if logits.ndim not in (2, 3) or not bool(logits.isfinite().all()):
                raise InputError(
                    f"the {name} must give finite logits [N, K], or [N, T, V] of tokens, got {list(logits.shape)} on "
                    "the example"
                )
        theirs = teacher.select(theirs) if theirs.ndim == 2 else theirs
        size = own.shape[-1]
        classes = theirs.shape[-1] if teacher.class_map is None or theirs.ndim == 2 else len(teacher.class_map)
        if own.shape[:-1] != theirs.shape[:-1] or classes != size:
            raise InputError(
                f"the student gives logits {list(own.shape)} and the teacher {list(theirs.shape)} on the example; they "
                "must be over the same classes: pcdistill.Teacher(model, class_map=...) matches them"
            )
        if own.ndim == 3:
            rows_that_count(own, seen.target, next_token=self.next_token)
        elif len(seen.target) != len(own):
            raise InputError(f"the example has {len(own)} inputs and {len(seen.target)} labels")
        _check_labels(seen.target, size)
        return size


class _Hidden:
    """What a distiller holds without owning: in no state dict, optimiser or distributed wrapper, shared by copies."""

    def __init__(self, student: nn.Module, teacher: Teacher, tapped: Tapped | None) -> None:
        self.student, self.teacher, self.tapped = student, teacher, tapped

    def run_teacher(self, inputs: Any) -> Tensor:
        """Logits [N, K] over the student's classes; those of tokens as they come, for most of them are left out."""
        logits = _run_teacher(self.teacher, inputs)
        return self.select(logits) if logits.ndim == 2 else logits

    def select(self, logits: Tensor) -> Tensor:
        """The columns of the student's classes."""
        return self.teacher.select(logits)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hidden":
        return self


@dataclass(frozen=True)
class _OneBatch:
    """The training data as far as one batch and its owner tell: what :func:`tap` looks at."""

    batch: Batch
    classes: range
    labels: Tensor | None

    @property
    def train(self) -> "_OneBatch":
        return self

    @property
    def num_samples(self) -> int | None:
        return None if self.labels is None else len(self.labels)

    def epoch(self, epoch: int) -> Any:
        return iter([self.batch])


def _recipe(
    student: nn.Module,
    teacher: nn.Module,
    method: str | None,
    losses: Sequence[Mapping[str, Any]] | None,
    features: Mapping[str, Sequence[str]] | None,
) -> Recipe:
    """The terms, checked, with the strengths that `pcdistill distill` gives the method."""
    named = {owner: list(names) for owner, names in (features or {}).items()}
    if set(named) - {"student", "teacher"}:
        raise InputError(f'features must have the keys "student" and "teacher", got {", ".join(named)}')
    default = load_recipe("default").to_dict()
    tree = {
        "method": method or default["method"],
        "methods": default["methods"],
        "losses": [dict(term) for term in losses or ()],
        "student": {"name": type(student).__name__, "features": named.get("student")},
        "teacher": {"name": type(teacher).__name__, "features": named.get("teacher")},
        "data": {"name": LOADERS},
    }
    return make_recipe(tree, "Distiller()")


def _tap(
    recipe: Recipe,
    student: nn.Module,
    teacher: Teacher,
    seen: Inputs,
    labels: Sequence[int] | Tensor | None,
    num_classes: int,
) -> Tapped | None:
    """Both models with their features shown, where a term compares them."""
    kinds = {term.method: method_kind(term.method, f"losses.{i}") for i, term in enumerate(recipe.losses)}
    if "pyramids" in kinds.values():
        raise InputError('losses: these compare detectors; use pcdistill.distill(task="detection", ...)')
    featured = [name for name, kind in kinds.items() if kind == "features"]
    if not featured:
        return None
    if not isinstance(seen.inputs, Tensor):
        raise InputError(f"{featured[0]} compares feature maps of images; inputs by name can be distilled by logits")
    known = None if labels is None else torch.as_tensor(labels)
    for i, term in enumerate(recipe.losses):
        memory = term.method in METHODS and term_needs(term, f"losses.{i}").index
        if memory and (known is None or seen.index is None):
            raise InputError(
                f"{term.method} remembers every training sample: give batches (images, target, index), and labels, "
                "the classes of all samples"
            )
    batch = Batch(seen.inputs, seen.target, seen.index)
    return tap(recipe, student, teacher, _OneBatch(batch, range(num_classes), known))


def _run(model: nn.Module, inputs: Any) -> Tensor:
    return logits_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))


@torch.no_grad()
def _run_teacher(teacher: Teacher, inputs: Any) -> Tensor:
    """Logits before classes are selected."""
    return _run(teacher.model, inputs if isinstance(inputs, dict) else teacher.prepare(inputs))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _leave_shared_out(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module._shared:
        state.pop(prefix + name, None)


def _put_shared_in(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, of in module._shared.items():
        if prefix + of in state:
            state.setdefault(prefix + name, state[prefix + of])


def _not_the_student(teacher: nn.Module, student: nn.Module) -> nn.Module:
    if teacher is student:
        raise InputError("student and teacher are one module, and the teacher is frozen; give the student a copy")
    return teacher


def _check_labels(target: Tensor, num_classes: int) -> None:
    if target.is_floating_point():
        return
    wrong = target[(target != UNLABELLED) & ((target < 0) | (target >= num_classes))]
    if len(wrong):
        raise InputError(f"the example has the label {int(wrong[0])}, and the student {num_classes} outputs, from 0")


def _device(module: nn.Module) -> torch.device:
    found = next(iter(module.parameters()), None)
    return torch.device("cpu") if found is None else found.device


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every part is in its own mode again after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
