"""From a recipe to models that are checked: weights that fit, classes that match, a teacher that can teach."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pcdistill import models
from pcdistill.classification.answers import write_answers
from pcdistill.classification.data import Data, build_data
from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.classification.features import tap
from pcdistill.classification.findings import classification_findings
from pcdistill.classification.metrics import evaluate, near_chance, top1_metric
from pcdistill.classification.passed import check_own_student
from pcdistill.data.findings import Findings
from pcdistill.data.finite import problem_of
from pcdistill.data.loader import SplitBatches, Stream
from pcdistill.data.preprocess import Preprocess
from pcdistill.data.readers import ItemReader
from pcdistill.distillation.cache_store import read_state
from pcdistill.distillation.folding import fold_batchnorm
from pcdistill.distillation.head import copy_head
from pcdistill.distillation.objective import (
    build_objective,
    check_losses,
    fitted_terms,
    method_kind,
    term_needs,
    views_of,
)
from pcdistill.distillation.passed import first_pass
from pcdistill.distillation.teacher import Stats, Teacher, TeacherEnsemble, align_classes, members_of
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Metric
from pcdistill.engine.modes import held_in_eval
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError
from pcdistill.models.fetching import advising
from pcdistill.models.heads import with_head
from pcdistill.models.names import is_endpoint, is_user_code
from pcdistill.models.outside import CalledModel, OutsideModel
from pcdistill.models.served import ServedModel
from pcdistill.recipe import DataConfig, ModelConfig, Recipe, TeacherConfig, TrainConfig

GATE_SAMPLES = 2048


class Classification:
    """Top-1 of images with one class each: a :class:`pcdistill.commands.tasks.Task`."""

    metric, label = "top1", "top-1"

    def data(self, recipe: Recipe, accelerator: Accelerator) -> Data:
        config = recipe.data
        if config.name == "digits-detection" or config.name.startswith(("coco:", "voc:", "yolo:")):
            raise InputError(f"data: {config.name} holds boxes; set task: detection, or name the recipe detection")
        unlabelled = config.unlabelled_batch or config.batch_size
        micro = replace(
            config,
            batch_size=config.batch_size // recipe.train.accumulate,
            unlabelled_batch=unlabelled // recipe.train.accumulate,
            unlabelled=config.unlabelled if recipe.distils else None,  # the labels' losses have no use for them
            views=views_of(recipe),
        )
        shares = recipe.train.accumulate * accelerator.num_processes
        if micro.unlabelled is not None and unlabelled % shares:
            raise InputError(
                f"data.unlabelled_batch {unlabelled} must be divisible by train.accumulate x processes = {shares}"
            )
        seed = stream_seed(recipe)
        return build_data(micro, Stream(seed, accelerator.process_index, accelerator.num_processes, accelerator.device))

    def check(self, recipe: Recipe, data: Any) -> None:
        check_losses(recipe, len(data.classes))
        if recipe.distils and recipe.data.unlabelled is not None:
            check_unlabelled(recipe)
        if recipe.distils and len(recipe.all_teachers) > 1:
            check_several_teachers(recipe)
        if recipe.distils:
            check_logits_alone(recipe)

    def train_config(self, recipe: Recipe) -> TrainConfig:
        return recipe.train

    def watch(self, recipe: Recipe, data: Any) -> Metric:
        return top1_metric(len(data.classes), recipe.optim.lr)

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        with advising("student" if recipe.all_teachers else "model"):
            return build_student(recipe.student, classes=data.classes, data=data, allow=recipe.allow)

    def try_student(self, recipe: Recipe, student: nn.Module, data: Any) -> None:
        if is_user_code(recipe.student.name):
            images = torch.zeros(2, data.in_channels, data.image_size, data.image_size)
            check_own_student(student, images, len(data.classes), recipe.student.name)

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        size = data.image_size
        if isinstance(model, TeacherEnsemble):
            found = [self.info(member, data) for member in members_of(model)]
            return {key: sum(one[key] for one in found) for key in found[0] if all(key in one for one in found)}
        if isinstance(model, Teacher):
            model, size = model.model, model.image_size or size
        if isinstance(model, OutsideModel):
            return {}  # nobody tells its size
        return models.model_info(model, size, in_channels=data.in_channels)

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        return knows_classes(config, data)

    def other_classes(self, config: TeacherConfig, data: Any) -> bool:
        return other_classes(config, data)

    def teacher(self, config: TeacherConfig, student: nn.Module | None, data: Any, allow: Sequence[str]) -> Teacher:
        return build_teacher(config, data=data, allow=allow)

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        placement: Placement,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]:
        return check_teacher(
            teacher, student, data.val, placement, num_classes=len(data.classes), allow=allow, console=console
        )

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any, placement: Placement) -> nn.Module:
        return build_distiller(recipe, student, teacher, data=data, placement=placement)

    def evaluate(self, model: nn.Module, batches: Any, data: Any, placement: Placement) -> dict[str, Any]:
        found = evaluate(model, batches.epoch(0), placement)
        if not found["finite"]:
            _refuse_bad_inputs(batches)
        return {key: found[key] for key in ("top1", "top5", "loss", "samples")}

    def splits(self, data: Any) -> dict[str, Any]:
        return {"test": data.test, "val": data.val, "train": data.train_eval}

    def outputs(self, data: Any) -> int:
        return len(data.classes)

    def conditions(self, data: Any) -> dict[str, Any]:
        return {}

    def metadata(self, data: Any) -> dict[str, Any]:
        files = isinstance(data.val, SplitBatches) and isinstance(data.val.reader, ItemReader)
        shown = Preprocess.evaluation(data.image_size, data.mean, data.std, files=files)
        return {"classes": list(data.classes), **shown.metadata()}

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any, placement: Placement) -> None:
        """What other libraries need to load the student, and what the page says of its answers."""
        models.save_config(student, out, self.metadata(data))
        write_answers(out, student, distiller.teacher, data, placement)

    def findings(self, config: DataConfig, samples: int) -> Findings:
        return classification_findings(config, samples)

    def model_names(self) -> list[str]:
        return models.list_models()


def check_unlabelled(recipe: Recipe) -> None:
    """Raise InputError unless a term learns from images without labels."""
    needs = [term_needs(term, f"losses.{i}") for i, term in enumerate(recipe.losses)]
    if not any(need.teacher and not need.labels for need in needs):
        raise InputError(
            f"data.unlabelled: every term of {recipe.method} reads labels, so these images would teach it nothing; "
            "take a method that does not (kd, dist or pcd, for example), or leave data.unlabelled out"
        )


def check_several_teachers(recipe: Recipe) -> None:
    """Raise InputError for what needs one teacher."""
    for i, term in enumerate(recipe.losses):
        if method_kind(term.method, f"losses.{i}") != "logits":
            raise InputError(
                f"losses.{i}: {term.method} compares features with one teacher's, and there are "
                f"{len(recipe.teachers)}; name one teacher, or take a method on logits"
            )
    if recipe.student.head == "teacher":
        raise InputError("student.head: there are several teachers, so there is no one head to copy; set it to own")


def check_logits_alone(recipe: Recipe) -> None:
    """Raise InputError for what needs more than logits of a teacher that is asked for them, or is in parts."""
    for teacher in recipe.all_teachers:
        if not teacher.outside and not teacher.shard:
            continue
        name = f"{teacher.name}, split by teacher.shard," if teacher.shard else teacher.name
        for i, term in enumerate(recipe.losses):
            if (kind := method_kind(term.method, f"losses.{i}")) != "logits":
                raise InputError(
                    f"losses.{i}: {term.method} compares {kind}, and the teacher {name} gives logits alone; "
                    "take a method on logits (kd, dist or pcd, for example)"
                )
        if recipe.student.head == "teacher":
            raise InputError(
                f"student.head: the teacher {name} gives logits alone, so there is no head to copy; set it to own"
            )


def build_student(config: ModelConfig, *, classes: Sequence[str], data: Any, allow: Iterable[str] = ()) -> nn.Module:
    """The student, with an output for every class of the data."""
    model = models.build_model(
        config.name,
        num_classes=len(classes),
        in_channels=data.in_channels,
        image_size=data.image_size,
        pretrained=config.pretrained,
        kwargs=config.kwargs,
    )
    if config.weights is not None:
        model = with_head(model, config.weights)
        models.load_weights(model, config.weights, allow_mismatch="mismatched-weights" in allow)
    return model


def knows_classes(config: TeacherConfig, data: Any) -> bool:
    """Whether a pretrained teacher can be used as it is: its own classes cover the data's."""
    if config.outside:
        return True
    if config.weights is not None or not config.pretrained:
        return False
    if is_user_code(config.name):  # the user says that the function gives a trained model
        return True
    named = _pretrained(config, data)[1]
    return named is not None and set(data.classes) <= set(named)


def other_classes(config: TeacherConfig, data: Any) -> bool:
    """Whether a weights file is of other classes than the data's, by its names or by the shape of its head."""
    assert config.weights is not None
    named = config.classes or models.read_classes(config.weights)
    if named is not None:
        return not set(data.classes) <= set(named)
    return misfit(_for_weights(config, data, len(data.classes)), config.weights) is not None


def misfit(model: nn.Module, weights: str) -> str | None:
    """The head of a file of other classes, "fc.weight [1000, 512] in the file, [4, 512] in the model"; None if it fits.

    What fits is loaded. Raises InputError for a file in which other tensors differ too.
    """
    report = models.load_weights(model, weights, allow_mismatch=True)
    other = set(report.missing) | set(report.unexpected)
    rows = {text.split()[0].rpartition(".")[0] for text in report.misshapen}
    shown = sorted(report.misshapen, key=lambda text: not text.split()[0].endswith("weight"))
    return shown[0] if len(rows) == 1 and not other else None


def _for_weights(config: TeacherConfig, data: Any, num_classes: int) -> nn.Module:
    """The teacher without weights, with so many outputs."""
    return models.build_model(
        config.name,
        num_classes=num_classes,
        in_channels=data.in_channels,
        image_size=config.image_size or data.image_size,
        kwargs=config.kwargs,
    )


def _pretrained(config: TeacherConfig, data: Any) -> tuple[nn.Module, list[str] | None]:
    """The zoo's model with its own head, and the names of its outputs in the form that the data uses."""
    with advising("teacher"):
        model = models.build_model(
            config.name, num_classes=None, in_channels=data.in_channels, pretrained=True, kwargs=config.kwargs
        )
    if config.classes is not None:
        return model, list(config.classes)
    wnids = all(re.fullmatch(r"n\d{8}", name) for name in data.classes)
    return model, models.class_names(model, config.name, wnids=wnids)


def build_teacher(config: TeacherConfig, *, data: Any, allow: Iterable[str] = ()) -> Teacher:
    """The teacher, its outputs matched to the data's classes by name where its weights name them.

    Raises:
        InputError: the classes cannot be matched, or the weights do not fit.
    """
    named: list[str] | None = list(config.classes) if config.classes is not None else None
    if config.outside:
        num_classes = len(named) if named is not None else len(data.classes)
        kind = ServedModel if is_endpoint(config.name) else CalledModel
        model: nn.Module = kind(config.name, num_classes, config.kwargs)
    elif config.pretrained and config.weights is None and not is_user_code(config.name):
        model, named = _pretrained(config, data)
    else:
        if named is None and config.weights is not None:
            named = models.read_classes(config.weights)
        num_classes = len(named) if named is not None else len(data.classes)
        model = _for_weights(config, data, num_classes)
    if config.weights is not None:
        model = with_head(model, config.weights)
        load_teacher_weights(model, config.weights, num_classes, allow)
    return wrap_teacher(model, config, data=data, named=named, allow=allow)


def load_teacher_weights(model: nn.Module, weights: str, num_classes: int, allow: Iterable[str]) -> None:
    """Load a teacher's weights, all of them unless mismatched-weights is allowed.

    Raises:
        InputError: they do not fit; of a file of other classes the sentence says how to train it on these.
    """
    try:
        models.load_weights(model, weights, allow_mismatch="mismatched-weights" in allow)
    except InputError:
        head = misfit(model, weights)
        if head is None:
            raise
        raise InputError(
            f"{weights} is of other classes than the data's {num_classes} ({head}); train it on this data first with "
            "--teacher-epochs N --allow mismatched-weights"
        ) from None


def wrap_teacher(
    model: nn.Module, config: TeacherConfig, *, data: Any, named: Sequence[str] | None, allow: Iterable[str] = ()
) -> Teacher:
    """Give a model the data's class order and its own input's statistics."""
    class_map = None
    in_order = "class-order" in allow and len(named or ()) == len(data.classes)
    if named is not None and list(named) != list(data.classes) and not in_order:
        class_map = align_classes(named, data.classes)
    stats: Stats | None = None
    image_size = config.image_size
    if config.mean is not None and config.std is not None:
        stats = (config.mean, config.std)
    elif config.pretrained and config.weights is None and not config.outside:
        found = models.input_stats(model, config.name)
        if found is not None:
            stats = (found[0], found[1])
            image_size = image_size or found[2]
    elif config.weights is not None:
        stats = models.read_stats(config.weights, data.in_channels)  # our own files say how images were normalised
    return Teacher(
        model,
        class_map=class_map,
        student_stats=(data.mean, data.std),
        teacher_stats=stats,
        image_size=image_size,
        precision=config.precision,
        batch_size=config.batch_size,
    )


def check_teacher(
    teacher: Teacher,
    student: nn.Module | None,
    batches: Any,
    placement: Placement,
    *,
    num_classes: int,
    allow: Iterable[str] = (),
    console: Console | None = None,
) -> dict[str, float]:
    """The teacher gate: evaluate the teacher on held-out batches before any time is spent on training.

    Args:
        teacher: over the data's classes.
        student: a student that has weights already, to compare with; None for a fresh one.
        batches: the held-out split; its `epoch(0)` gives the batches.
        placement: where to compute.
        num_classes: C; chance is 100 / C percent.
        allow: "weak-teacher" turns a weak teacher into a warning.
        console: where warnings go.

    Raises:
        InputError: outputs that do not fit the classes, logits that are not finite, accuracy near chance, or below
            the student's.
    """
    first = next(iter(batches.epoch(0)))
    placement = Placement(placement.accelerator)  # as they come: the teacher's memory format is chosen after the gate
    images = placement.images(first.images[:2])
    with first_pass("teacher", images), placement.accelerator.autocast():
        logits = teacher(images)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise InputError(
            f"the teacher gives logits {list(logits.shape[1:])} per image and the data has {num_classes} classes; "
            "name the teacher's classes (teacher.classes) so that they can be matched, or train it on this data"
        )
    result = evaluate(teacher, batches.epoch(0), placement, limit=GATE_SAMPLES)
    if not result["finite"]:
        _refuse_bad_inputs(batches)
        raise InputError(
            "the teacher's logits are NaN or infinite on held-out images; check that its weights are loaded and its "
            "input normalisation (teacher.mean, teacher.std) is right"
        )
    weak = weakness(result, num_classes)
    if weak is None and student is not None:
        own = evaluate(student, batches.epoch(0), placement, limit=GATE_SAMPLES)
        if own["top1"] > result["top1"]:
            weak = (
                f"the teacher has {result['top1']:.1f} % top-1 on held-out images, less than the student's "
                f"{own['top1']:.1f} %"
            )
    if weak is not None:
        advice = (
            f"{weak}; check that its weights are loaded, its input normalisation and resolution, and the order of its "
            "classes, or go on with --allow weak-teacher"
        )
        if "weak-teacher" not in allow:
            raise InputError(advice)
        (console or Console(quiet=True)).warn(advice)
    return result


def _refuse_bad_inputs(batches: Any) -> None:
    """Raise if the held-out images themselves are not finite: then no model is to blame."""
    for number, batch in enumerate(batches.epoch(0)):
        problem = problem_of(batch)
        if problem is not None:
            raise InputError(f"held-out batch {number + 1} of {len(batches)}: {problem}")


def weakness(result: dict[str, float], num_classes: int) -> str | None:
    """A sentence, if the teacher's top-1 is near chance."""
    chance = 100 / num_classes
    # Clearly above chance, and three standard errors: a split of a few images must not pass by luck.
    error = 100 * (chance / 100 * (1 - chance / 100) / result["samples"]) ** 0.5
    clear = near_chance(chance)
    if result["top1"] >= max(clear, chance + 3 * error):
        return None
    if result["top1"] >= clear:
        return (
            f"the teacher has {result['top1']:.1f} % top-1 on held-out images, but they are {result['samples']:g}, too "
            f"few to tell it from chance ({chance:.1f} %)"
        )
    return f"the teacher has {result['top1']:.1f} % top-1 on held-out images, near chance ({chance:.1f} %)"


def build_distiller(
    recipe: Recipe,
    student: nn.Module,
    teacher: Teacher | TeacherEnsemble | None,
    *,
    data: Any,
    placement: Placement,
) -> ClassificationDistiller:
    """Student, teacher and objective as one module; feature terms are built from the shapes of one batch.

    What of the student stands in eval mode while the student as a whole does not, stays so.
    """
    num_classes = len(data.classes)
    held = held_in_eval(student)
    tapped = None
    context: dict[str, Any] = {}
    kinds = {method_kind(term.method, f"losses.{i}") for i, term in enumerate(recipe.losses)}
    if "pyramids" in kinds:
        raise InputError("losses: a detection loss needs task: detection")
    if isinstance(teacher, Teacher) and recipe.student.head == "teacher":
        size = data.image_size
        copy_head(student, teacher, torch.zeros(2, data.in_channels, size, size, device=placement.device))
    cached = teacher is None and recipe.distils and any(config.cache for config in recipe.all_teachers)
    if cached and recipe.student.head == "teacher":
        raise InputError(
            "student.head: the teacher's logits come from its cache alone, so there is no head to copy; give "
            "teacher.weights too (--teacher-weights FILE), or set it to own"
        )
    if "features" in kinds:
        if not isinstance(teacher, Teacher):
            raise InputError("losses: feature losses need a teacher, and no more than one")
        tapped = tap(recipe, student, teacher, data)
        student, context = tapped.student, tapped.context
    elif teacher is not None:
        speed_up(teacher, recipe, placement, data)
    objective = build_objective(fitted_terms(recipe), num_classes=num_classes, context=context)
    if tapped is None:
        distiller = ClassificationDistiller(student, objective, teacher, cached=cached)
    else:
        tapped.adopt(objective)
        distiller = ClassificationDistiller(
            student, objective, teacher, student_taps=tapped.run_student, teacher_taps=tapped.run_teacher
        )
    distiller.hold(held)
    return distiller


def speed_up(teacher: Teacher | TeacherEnsemble, recipe: Recipe, placement: Placement, data: Any) -> None:
    """Fold and compile the teacher, as far as the recipe allows; its logits stay the same up to rounding."""
    teacher.to(placement.device)
    for member in members_of(teacher):
        if member.rounds is not None:  # its weights are in parts
            continue
        size = member.image_size or data.image_size
        example = torch.randn(2, data.in_channels, size, size, device=placement.device)
        if recipe.train.fold_teacher and member.precision == "float32":  # folded, few bits would lose more
            member.model = fold_batchnorm(member.model, example)
        placement.frozen.module(member.model)
        if recipe.train.compile and not isinstance(member.model, OutsideModel):
            placement.compile(member.model)


def stream_seed(recipe: Recipe) -> int:
    """The seed of order, augmentation and split: data.seed, else the cache's, else train.seed."""
    if recipe.data.seed is not None:
        return recipe.data.seed
    cache = next((teacher.cache for teacher in recipe.all_teachers if teacher.cache is not None), None)
    if recipe.distils and cache is not None:
        return read_state(cache).info.seed
    return recipe.train.seed
