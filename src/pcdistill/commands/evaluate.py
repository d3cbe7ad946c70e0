"""`pcdistill evaluate`: the metrics of a run's student, or of any model with weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcdistill import models
from pcdistill.commands.folder import read_recipe
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import Task, task_of
from pcdistill.engine.placement import make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.models.heads import with_head
from pcdistill.recipe import ALONE, LOADERS, Recipe, TeacherConfig, load_recipe, make_recipe, recipe_for


def evaluation_recipe(run: Path | None, values: Mapping[str, Any], words: Mapping[str, str] | None = None) -> Recipe:
    """Model and data to evaluate: a run's, or those that are named.

    Args:
        run: a run's folder.
        values: dotted keys of a recipe that stand for the run's.
        words: those keys to what the user typed, which messages name.

    Raises:
        InputError: the folder holds no run, or without a folder, model or data are not named.
    """
    if run is None:
        if "student.name" not in values or "data.name" not in values:
            raise InputError("name a run's folder, or --data and --model (with --weights)")
        return load_recipe(recipe_for(values["data.name"]), values={**values, "method": ALONE}, words=words)
    tree = read_recipe(run).to_dict()
    if tree["data"]["name"] == LOADERS:
        raise InputError(f"{run} was made from Python, with modules and loaders that a command cannot build again")
    for key, value in values.items():
        group, name = key.split(".")
        tree[group][name] = value
    return make_recipe(tree, words=words)


def evaluation_text(found: Mapping[str, Any]) -> str:
    """The metrics in words, with the number of images that they are of."""
    split = {"test": "test", "val": "validation", "train": "training"}[found["split"]]
    names = {"top1": "top-1", "top5": "top-5", "map": "AP", "map_50": "AP50"}
    said = ", ".join(f"{name} {found[key]:.2f} %" for key, name in names.items() if key in found)
    note = f" ({found['note']})" if "note" in found else ""
    return f"{found['model']}: {said} of {found['samples']:,} {split} images{note}"


def evaluate_model(recipe: Recipe, weights: str | None, *, split: str | None = None) -> dict[str, Any]:
    """The task's metrics of `recipe.student` with weights on a split of the recipe's data.

    Where the weights know the data's classes in another order, or more than them, they are matched by name.

    Args:
        recipe: data and model.
        weights: a file, or None for the model as it is.
        split: test, val or train; None is the test split, or where the data have none validation, which "note" says.

    Raises:
        InputError: there is no such split, the weights do not fit, or they do not know the data's classes.
    """
    accelerator = make_accelerator(recipe.train)
    task = task_of(recipe)
    recipe = replace(recipe, data=replace(recipe.data, unlabelled=None))
    data = open_data(task, recipe, accelerator)
    splits, note = task.splits(data), {}
    if split is None:
        split = "test" if splits.get("test") is not None else "val"
        if split == "val":
            note = {"note": "the data have no test split: these are the validation images"}
    batches = splits.get(split)
    if batches is None:
        known = ", ".join(name for name, found in splits.items() if found is not None)
        raise InputError(f"the data {recipe.data.name} has no {split} split; it has {known} (--split)")
    model = _with_weights(recipe, weights, data, task)
    model.to(accelerator.device)
    values = task.evaluate(model, batches, data, make_placement(task.train_config(recipe), accelerator))
    return {
        "model": recipe.student.name,
        "weights": weights,
        "data": recipe.data.name,
        "split": split,
        **note,
        **values,
        **task.conditions(data),
        "samples": int(values["samples"]),
        **task.info(model, data),
    }


def _with_weights(recipe: Recipe, weights: str | None, data: Any, task: Task) -> Any:
    """The recipe's student with weights, over the data's classes."""
    config = recipe.student
    facts: dict[str, Any] = {"name": config.name, "kwargs": config.kwargs, "features": config.features}
    known = None if weights is None else models.read_metadata(weights).get("classes")
    if known and list(known) != list(data.classes):
        missing = [name for name in data.classes if name not in known]
        if missing:
            raise InputError(
                f"the weights in {weights} do not know {len(missing)} of the {len(data.classes)} classes of "
                f"{recipe.data.name}: {_few(missing)}; they know {_few(known)}; evaluate on data of their classes"
            )
        return task.teacher(TeacherConfig(**facts, weights=weights), None, data, recipe.allow)
    own = TeacherConfig(**facts, pretrained=config.pretrained)
    if weights is None and config.pretrained and task.knows_classes(own, data):
        return task.teacher(own, None, data, recipe.allow)
    bare = replace(config, weights=None, pretrained=config.pretrained and weights is None)
    model = task.student(replace(recipe, student=bare), data)
    if weights is not None:
        model = with_head(model, weights)
        models.load_weights(model, weights)
    return model


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
