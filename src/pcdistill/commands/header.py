"""What a run is about to do, in a few lines, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pcdistill.commands.tasks import task_of
from pcdistill.distillation.objective import resolved_terms, short_name
from pcdistill.engine.placement import PRECISIONS
from pcdistill.models.names import is_user_code
from pcdistill.recipe import ALONE, LOADERS, ModelConfig, Recipe, TeacherConfig
from pcdistill.report import count, term_text

FEW_STEPS = 10  # an epoch of fewer updates teaches little
MOST_NAMES = 4  # of classes that are shown


@dataclass(frozen=True)
class Told:
    """A model of the run.

    Attributes:
        role: "student" or "teacher".
        name: as the recipe has it.
        starts: where its weights come from, in words.
        facts: "parameters" and, of classifiers, "macs".
    """

    role: str
    name: str
    starts: str
    facts: dict[str, Any]


def header(recipe: Recipe, data: Any, models: Sequence[Told], accelerator: Accelerator, out: Path | None) -> list[str]:
    """The lines: data and splits, models, method with all its options, training, device, folder."""
    steps = -(-len(data.train) // recipe.train.accumulate)
    return [
        *data_lines(recipe, data, steps),
        *(model_line(one) for one in models),
        f"method  {method_line(recipe, task_of(recipe).outputs(data))}",
        f"train   {training_line(recipe, steps)}; {device_line(accelerator)}",
        *([f"folder  {out}"] if out is not None else []),
    ]


def data_lines(recipe: Recipe, data: Any, steps: int) -> list[str]:
    """The data, the images of each split and where they come from, and steps that are few."""
    names = [str(name) for name in data.classes[:MOST_NAMES]]
    shown = ", ".join(names) + (", ..." if len(data.classes) > MOST_NAMES else "")
    size = getattr(data, "image_size", None)
    channels = getattr(data, "in_channels", 3)
    images = f"; images {channels} x {size} x {size}" if size and recipe.task != "detection" else ""
    name = "your loaders" if recipe.data.name == LOADERS else recipe.data.name
    lines = [f"data    {name}: {len(data.classes)} classes ({shown}){images}"]
    origins = getattr(data, "origins", {})
    for split in ("train", "val", "test"):
        batches = getattr(data, split)
        if batches is None:
            lines.append(f"        {split}: none; the results are of the validation images")
            continue
        samples = getattr(batches, "num_samples", None)
        amount = f"{samples:,} images" if samples is not None else f"{len(batches)} batches"
        lines.append(f"        {split}: " + "; ".join(filter(None, [amount, origins.get(split)])))
    if steps < FEW_STEPS and recipe.data.name != LOADERS:
        lines.append(f"        {few_steps(recipe, data, steps)}")
    return lines


def few_steps(recipe: Recipe, data: Any, steps: int) -> str:
    """A hint where an epoch has few steps: a batch size that gives more, or more epochs."""
    samples = getattr(data.train, "num_samples", None) or 0
    smaller = 1 << max((samples // (2 * FEW_STEPS)).bit_length() - 1, 0)
    how = f"--batch-size {smaller} or more --epochs give" if smaller < recipe.data.batch_size else "more --epochs give"
    return f"hint: only {steps} step{'s' if steps > 1 else ''} an epoch; {how} the student more to learn from"


def model_line(told: Told) -> str:
    """One model: its name, where its weights come from, and its size."""
    size = [f"{count(told.facts['parameters'])} parameters"] if "parameters" in told.facts else []
    size += [f"{count(told.facts['macs'])} multiply-adds an image"] if "macs" in told.facts else []
    return f"{told.role} {told.name}: {told.starts}" + (f"; {', '.join(size)}" if size else "").replace("\u00a0", " ")


def method_line(recipe: Recipe, outputs: int) -> str:
    """The method and its terms with every option."""
    if recipe.method == ALONE:
        return "none: the labels alone"
    return f"{short_name(recipe.method)}: " + " + ".join(
        term_text(shown(term)) for term in resolved_terms(recipe, outputs)
    )


def shown(term: dict[str, Any]) -> dict[str, Any]:
    """A term without the options that guard its arithmetic."""
    return {key: value for key, value in term.items() if key not in ("eps", "reduction")}


def training_line(recipe: Recipe, steps: int) -> str:
    """Length and optimiser."""
    optim = recipe.optim
    warm = f", warm-up {optim.warmup_epochs:g}" if optim.warmup_epochs else ""
    epochs, of = recipe.train.epochs, f" of {recipe.data.batch_size} images" if recipe.data.name != LOADERS else ""
    length = f"{epochs} epoch{'s' if epochs > 1 else ''} of {steps} step{'s' if steps > 1 else ''}{of}"
    return f"{length}; {optim.name}, rate {optim.lr:g}, {optim.schedule}{warm}"


def device_line(accelerator: Accelerator) -> str:
    """Where it runs, and in which precision."""
    device = str(accelerator.device)
    if accelerator.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    if accelerator.device.type == "cpu":
        device += f" ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{device}, {PRECISIONS[accelerator.mixed_precision]}{processes}"


def recipe_text(recipe: Recipe, outputs: int | None = None) -> str:
    """YAML; the comments at its end say what the losses' options are that the recipe does not name.

    Args:
        recipe: to be written.
        outputs: how many logits the losses see, where that is known.
    """
    terms = "".join(f"#   {term_text(term)}\n" for term in resolved_terms(recipe, outputs))
    return f"{recipe.to_yaml()}# The losses with all their options, defaults included:\n{terms}"


def starts_from(config: ModelConfig, task: str) -> str:
    """Which weights a model starts from, in words."""
    if config.weights is not None:
        return f"starts from the weights in {config.weights}"
    if isinstance(config, TeacherConfig) and config.outside:
        return "is asked for its logits"
    if not config.pretrained:
        return "starts from random weights"
    if is_user_code(config.name):
        return "starts trained, from its own function"
    zoo, _, backbone = config.name.partition("/")
    if task == "detection" and zoo not in ("torchvision", "hf"):
        zoo = "timm" if backbone.startswith("timm/") else "torchvision"
        return f"starts from {zoo}'s pretrained weights in its backbone, and random ones in the rest"
    return f"starts from {zoo}'s pretrained weights"
