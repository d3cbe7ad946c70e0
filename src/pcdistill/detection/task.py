"""From a recipe to detectors that are checked: data with boxes, classes that match, logits that can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pcdistill import models
from pcdistill.data.findings import Findings
from pcdistill.data.loader import Stream
from pcdistill.detection.data import DetectionBatch, DetectionData, build_detection_data
from pcdistill.detection.detectors.build import build_detector, comes_whole, list_detectors, pretrained_classes
from pcdistill.detection.detectors.pairing import PairingOptions
from pcdistill.detection.detectors.table import adapter_of, register_user_adapters
from pcdistill.detection.distiller import DetectionDistiller, DetectionObjective
from pcdistill.detection.findings import detection_findings
from pcdistill.detection.metrics import coco_tool, evaluate_detection
from pcdistill.detection.samples import write_samples
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.objective import (
    build_objective,
    check_losses,
    fitted_terms,
    import_user_object,
    method_kind,
    views_of,
)
from pcdistill.distillation.passed import check_modules
from pcdistill.distillation.unused import as_it_is
from pcdistill.engine.console import Console
from pcdistill.engine.loop import Metric
from pcdistill.engine.modes import evaluating, held_in_eval
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError, PcdistillError, what_failed
from pcdistill.losses import Pyramid
from pcdistill.methods import METHODS
from pcdistill.models.fetching import advising, within_reach
from pcdistill.models.names import is_user_code
from pcdistill.recipe import DataConfig, ModelConfig, Recipe, TeacherConfig, TrainConfig
from pcdistill.report._format import sizes_in

GATE_SAMPLES = 200
TRIED = 2  # images in the pass before training
WEAK_AP50 = 5.0  # percent: a teacher below this finds next to nothing


class Detection:
    """COCO mAP of images with boxes: a :class:`pcdistill.commands.tasks.Task`."""

    metric, label = "map", "AP"

    def data(self, recipe: Recipe, accelerator: Accelerator) -> DetectionData:
        return detection_data(recipe, accelerator)

    def check(self, recipe: Recipe, data: Any) -> None:
        coco_tool()
        check_detection_losses(recipe, len(data.classes))

    def train_config(self, recipe: Recipe) -> TrainConfig:
        """channels_last only where it is asked for: RoI pooling would copy every level back."""
        return replace(recipe.train, channels_last=bool(recipe.train.channels_last))

    def watch(self, recipe: Recipe, data: Any) -> Metric:
        return Metric(self.metric)

    def student(self, recipe: Recipe, data: Any) -> nn.Module:
        with advising("student" if recipe.all_teachers else "model"), within_reach():
            return build_student_detector(recipe, data)

    def try_student(self, recipe: Recipe, student: nn.Module, data: Any) -> None:
        if is_user_code(recipe.student.name):
            check_own_detector(student, next(data.train.epoch(0)), recipe.student.name)

    def info(self, model: nn.Module, data: Any) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def knows_classes(self, config: TeacherConfig, data: Any) -> bool:
        with advising("teacher"), within_reach():
            return knows_detection_classes(config, data)

    def other_classes(self, config: TeacherConfig, data: Any) -> bool:
        named = config.classes or (models.read_classes(config.weights) if config.weights else None)
        return named is not None and not set(data.classes) <= set(named)

    def teacher(
        self, config: TeacherConfig, student: nn.Module | None, data: Any, allow: Sequence[str]
    ) -> TeacherDetector:
        with advising("teacher"), within_reach():
            return build_teacher_detector(config, student, data, allow)

    def gate(
        self,
        teacher: Any,
        student: nn.Module | None,
        data: Any,
        placement: Placement,
        allow: Sequence[str],
        console: Console,
    ) -> dict[str, Any]:
        return check_teacher_detector(teacher, student, data, placement, allow=allow, console=console)

    def distiller(self, recipe: Recipe, student: nn.Module, teacher: Any, data: Any, placement: Placement) -> nn.Module:
        return build_detection_distiller(recipe, student, teacher, data)

    def evaluate(self, model: nn.Module, batches: Any, data: Any, placement: Placement) -> dict[str, Any]:
        return evaluate_detection(model, batches.epoch(0), placement, classes=data.classes, find=finder_of(model))

    def splits(self, data: Any) -> dict[str, Any]:
        return {"test": data.test, "val": data.val}

    def outputs(self, data: Any) -> int:
        return len(data.classes) + 1

    def conditions(self, data: Any) -> dict[str, Any]:
        return {"sizes_in": sizes_in(data.image_size)}

    def metadata(self, data: Any) -> dict[str, Any]:
        ids = getattr(data, "category_ids", ())  # the data's own, where its format has such
        own = {"category_ids": list(ids)} if ids else {}
        return {"classes": list(data.classes), "task": "detection", "image_size": data.image_size, **own}

    def finish(self, out: Path, distiller: Any, student: nn.Module, data: Any, placement: Placement) -> None:
        """samples.npz, whose images the page shows."""
        write_samples(out / "samples.npz", distiller, student, data)

    def findings(self, config: DataConfig, samples: int) -> Findings:
        return detection_findings(config, samples)

    def model_names(self) -> list[str]:
        return list_detectors()


def detection_data(recipe: Recipe, accelerator: Accelerator) -> DetectionData:
    """The recipe's data, this process's share. A batch of it is one micro-batch of gradient accumulation."""
    config = recipe.data
    if config.mixup > 0 or config.cutmix > 0 or (config.views or 1) > 1:
        raise InputError(
            "data: mixup, cutmix and a second view are for classifiers; leave them out for task: detection"
        )
    if recipe.teachers or config.unlabelled is not None or recipe.student.head != "own":
        raise InputError("teachers, data.unlabelled and student.head are for classifiers; leave them out for detection")
    if recipe.train.compile:
        raise InputError("train.compile is for classifiers: detectors are called part by part, which it does not reach")
    micro = replace(config, batch_size=config.batch_size // recipe.train.accumulate)
    register_user_adapters(recipe.detection.adapters)
    return build_detection_data(
        micro, Stream(recipe.train.seed, accelerator.process_index, accelerator.num_processes, accelerator.device)
    )


def check_detection_losses(recipe: Recipe, num_classes: int) -> None:
    """Every term must fit detectors, and every logit term its [R, K + 1] logits, before anything is trained.

    Raises:
        InputError: with the term's name and what is wrong with it.
    """
    for i, term in enumerate(recipe.losses):
        kind = method_kind(term.method, f"losses.{i}")
        if term.method == "ce":
            raise InputError(f"losses.{i}: ce: the detector's own losses hold its cross-entropy; leave this term out")
        if kind == "features":
            known = ", ".join(name for name, m in METHODS.items() if m.kind == "pyramids" and name != "detector")
            raise InputError(f"losses.{i}: {term.method} compares features of classifiers; for detectors: {known}")
    if views_of(recipe) > 1:
        raise InputError(
            "losses: a term compares two views of each image, which detectors do not have; use its one-view form"
        )
    if not any(term.method == "detector" for term in recipe.losses):
        raise InputError('losses: a detector needs the term "detector", its own losses; without it, it learns no boxes')
    check_losses(recipe, num_classes + 1)


def finder_of(model: nn.Module) -> Callable[[Sequence[Tensor]], Any]:
    """What finds a detector's boxes in images: a teacher itself, or what says that it does; else its adapter."""
    itself = isinstance(model, TeacherDetector) or getattr(model, "finds_boxes", False)
    return model if itself else adapter_of(model).predict


def make_detector(
    config: ModelConfig, *, num_classes: int | None, image_size: int | None, pretrained: bool
) -> nn.Module:
    """A detector by name or by `file.py:function`, which is called with num_classes and the recipe's kwargs."""
    if is_user_code(config.name):
        made: nn.Module = import_user_object(config.name, "model")(num_classes=num_classes, **config.kwargs)
        adapter_of(made)
        return made
    sizes = {} if image_size is None else {"min_size": image_size, "max_size": image_size}
    return build_detector(
        config.name, num_classes=num_classes, pretrained=pretrained, kwargs={**sizes, **config.kwargs}
    )


def check_own_detector(student: nn.Module, batch: DetectionBatch, name: str) -> None:
    """Raise InputError unless a user's own detector can be trained on a batch's first images; it is left as it is."""
    check_modules(student, None)
    few = slice(0, TRIED)
    try:
        with as_it_is(student), torch.enable_grad():
            seen = adapter_of(student.train()).student_pass(batch.images[few], batch.targets[few])
            total = torch.stack(list(seen.losses.values())).sum()
            torch.autograd.grad(total, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    except PcdistillError:
        raise
    except Exception as error:  # a user's module may raise anything
        shapes = [list(image.shape) for image in batch.images[few]]
        raise InputError(f"{name} cannot be trained on images {shapes} ({what_failed(error)})") from error


def build_student_detector(recipe: Recipe, data: DetectionData) -> nn.Module:
    """The student, with an output for every class of the data. Its images keep the size that the data gives them."""
    config = recipe.student
    student = make_detector(
        config, num_classes=len(data.classes), image_size=data.image_size, pretrained=config.pretrained
    )
    if config.weights is not None:
        models.load_weights(student, config.weights, allow_mismatch="mismatched-weights" in recipe.allow)
    return student


def knows_detection_classes(config: TeacherConfig, data: DetectionData) -> bool:
    """Whether a pretrained teacher can be used as it is: its own classes cover the data's."""
    if config.weights is not None or not config.pretrained or not comes_whole(config.name):
        return False
    return set(data.classes) <= set(config.classes or pretrained_classes(config.name))


def build_teacher_detector(
    config: TeacherConfig, student: nn.Module | None, data: DetectionData, allow: Sequence[str] = ()
) -> TeacherDetector:
    """The teacher, its classes matched to the data's by name.

    Raises:
        InputError: it does not have all of the data's classes, or its weights do not fit.
    """
    if config.mean is not None or config.std is not None:
        raise InputError(
            "teacher.mean and teacher.std: a detector normalises by itself; give kwargs image_mean, image_std"
        )
    named: list[str] | None = list(config.classes) if config.classes is not None else None
    whole = config.pretrained and config.weights is None
    if whole and not comes_whole(config.name):
        what = "no weights of its own" if config.name.startswith("hf/") else "pretrained weights for its backbone alone"
        raise InputError(
            f"the teacher {config.name} has {what}: give teacher.weights, or teacher.epochs to train it first"
        )
    if named is None and whole:
        named = list(pretrained_classes(config.name))
    if named is None and config.weights is not None:
        named = models.read_classes(config.weights)
    count = None if whole else len(named if named is not None else data.classes)
    size = config.image_size or data.image_size
    model = make_detector(config, num_classes=count, image_size=size, pretrained=whole)
    if config.weights is not None:
        models.load_weights(model, config.weights, allow_mismatch="mismatched-weights" in allow)
    return TeacherDetector(
        model, student_classes=data.classes, classes=named, student=student, image_size=config.image_size
    )


def check_teacher_detector(
    teacher: TeacherDetector,
    student: nn.Module | None,
    data: DetectionData,
    placement: Placement,
    *,
    allow: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """The teacher gate: its mAP on held-out images, before any time is spent on training.

    Raises:
        InputError: it finds next to nothing, or less than the student that it should teach.
    """
    console = console or Console(quiet=True)
    if teacher.left_out:
        console.say(f"the teacher has {teacher.left_out} classes that the data has not; they are left out")
    asked: dict[str, Any] = {"classes": data.classes, "limit": GATE_SAMPLES}
    result = evaluate_detection(teacher, data.val.epoch(0), placement, **asked)
    weak = None
    if result.get("map_50", 0.0) < WEAK_AP50:
        weak = f"the teacher finds next to nothing on held-out images (AP50 {result.get('map_50', 0.0):.1f} %)"
    elif student is not None:
        own = evaluate_detection(student, data.val.epoch(0), placement, find=finder_of(student), **asked)
        if own["map"] > result["map"]:
            better = f"less than the student's {own['map']:.1f} %"
            weak = f"the teacher has AP {result['map']:.1f} % on held-out images, {better}"
    if weak is not None:
        advice = (
            f"{weak}; check that its weights are loaded, its classes and its image size, or go on with --allow "
            "weak-teacher"
        )
        if "weak-teacher" not in allow:
            raise InputError(advice)
        console.warn(advice)
    return result


def build_detection_distiller(
    recipe: Recipe, student: nn.Module, teacher: TeacherDetector | None, data: DetectionData
) -> DetectionDistiller:
    """Student, teacher and objective as one module; losses on pyramids are built from the shapes of one batch.

    Raises:
        InputError: anchors or pyramids of the two detectors that cannot be compared.
    """
    held = held_in_eval(student)
    options = recipe.detection
    boxes = "none" if teacher is None else options.boxes
    context: dict[str, Any] = {}
    kinds = {method_kind(term.method) for term in recipe.losses if term.method != "detector"}
    if teacher is not None and kinds:
        device = next(student.parameters()).device
        teacher.to(device)
        images = [image.to(device) for image in next(iter(data.val.epoch(0))).images[:2]]
        context = {
            **observed_pyramids(student, teacher, images, needed="pyramids" in kinds),
            "n_data": data.train.num_samples,
        }
    objective = build_objective(fitted_terms(recipe), num_classes=len(data.classes) + 1, context=context)
    distiller = DetectionDistiller(
        student,
        DetectionObjective(objective.terms, boxes=boxes, boxes_weight=options.boxes_weight),
        teacher,
        pairing=PairingOptions(options.pairing, options.top_k, options.threshold),
    )
    distiller.hold(held)
    return distiller


@torch.no_grad()
def observed_pyramids(
    student: nn.Module, teacher: TeacherDetector, images: Sequence[Tensor], *, needed: bool
) -> dict[str, Pyramid]:
    """The pyramids of "student" and "teacher" of the same images, in eval mode.

    Raises:
        InputError: they are needed, and one of the two has none to show.
    """
    adapter = adapter_of(student)
    with evaluating(student):
        batch = adapter.prepare(images)
        found = {"student": adapter.observe(batch).pyramid, "teacher": teacher.observe(batch).pyramid}
    for who, model in (("student", student), ("teacher", teacher.model)):
        if needed and not found[who].levels:
            kind = type(getattr(model, "inner", model)).__name__
            raise InputError(
                f"the {who} {kind} shows no feature maps to compare; use a method on logits, or one with a pyramid"
            )
    return found
