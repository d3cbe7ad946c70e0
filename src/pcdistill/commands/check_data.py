"""`pcdistill check-data`: what a data set holds, what was repaired or left out, and what looks wrong."""

import re
from pathlib import Path

from pcdistill.commands.tasks import TASKS
from pcdistill.data.findings import Findings, SplitFacts
from pcdistill.errors import InputError
from pcdistill.files import home_followed
from pcdistill.recipe import DataConfig, recipe_for

BOXES = ("coco:", "voc:", "yolo:")
# In a folder whose name says nothing: what only a detection set has.
SIGNS = (
    *("data.yaml", "train.json", "labels.json", "result.json", "_annotations.coco.json", "classes.txt"),
    *("annotations", "Annotations", "VOCdevkit", "train/_annotations.coco.json", "train/labels.json"),
)
MOST_CLASSES = 30  # in the text; the page and --json have all


def check_data(config: DataConfig, task: str | None, samples: int) -> Findings:
    """Read data as a training would, and look at it.

    Args:
        config: the data, by name.
        task: "classification" or "detection"; None guesses by the name and by what the folder holds.
        samples: images to look at, over all splits.

    Raises:
        InputError: what a training would be refused for.
    """
    if samples < 0:
        raise InputError(f"--samples must be 0 or more, got {samples}")
    return TASKS[task or task_for(config.name)]().findings(config, samples)


def task_for(name: str) -> str:
    """The task that data is for, by its name and by what lies in the folder."""
    if name.startswith(BOXES) or recipe_for(name) == "digits-detection":
        return "detection"
    path = home_followed(name)
    if path.suffix.lower() in (".json", ".xml", ".yaml", ".yml"):
        return "detection"
    boxes = path.is_dir() and (any((path / sign).exists() for sign in SIGNS) or any(path.glob("train/*.xml")))
    return "detection" if boxes else "classification"


def default_page(name: str) -> Path:
    """Where the page is written if nothing else is said."""
    return Path("runs") / f"check-data-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[-60:] or 'data'}.html"


def findings_text(found: Findings) -> str:
    """What was found, for the console."""
    what = found.format if found.task == "detection" else f"classes by {found.format}"
    lines = [f"{found.data}: {found.task}, {what}, {len(found.classes)} classes"]
    for split in found.splits:
        boxes = f", {sum(split.counts.values())} boxes, {split.empty} images without" if split.empty is not None else ""
        lines.append(f"  {split.name:<6} {split.images} images{boxes}; from {split.origin}")
    lines += ["", *_table(found.classes, found.splits)]
    for title, notes in (("repaired", found.repaired), ("left out", found.left_out), ("warning", found.warnings)):
        lines += [f"{title}: {note}" for note in notes]
    if not (found.repaired or found.left_out or found.warnings):
        lines.append("nothing was repaired or left out, and nothing looks wrong")
    return "\n".join(lines)


def _table(classes: list[str], splits: list[SplitFacts]) -> list[str]:
    shown = classes[:MOST_CLASSES]
    width = max(len(name) for name in [*shown, "class"])
    lines = [f"  {'class':<{width}} " + " ".join(f"{split.name:>8}" for split in splits)]
    for name in shown:
        lines.append(f"  {name:<{width}} " + " ".join(f"{split.counts[name]:>8}" for split in splits))
    if len(classes) > len(shown):
        lines.append(f"  and {len(classes) - len(shown)} more")
    return [*lines, ""]
