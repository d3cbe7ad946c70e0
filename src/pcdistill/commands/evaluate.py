"""`pcdistill evaluate`: the metrics of a run's student, or of any model with weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pcdistill import models
from pcdistill.commands.folder import read_recipe
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import task_of
from pcdistill.engine.placement import make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.models.heads import with_head
from pcdistill.recipe import ALONE, LOADERS, Recipe, load_recipe, make_recipe, recipe_for


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


def evaluate_model(recipe: Recipe, weights: str | None, *, split: str = "test") -> dict[str, Any]:
    """The task's metrics of `recipe.student` with weights on a split of the recipe's data.

    Raises:
        InputError: there is no such split, or the weights do not fit.
    """
    accelerator = make_accelerator(recipe.train)
    task = task_of(recipe)
    recipe = replace(recipe, data=replace(recipe.data, unlabelled=None))
    data = open_data(task, recipe, accelerator)
    batches = task.splits(data).get(split)
    if batches is None:
        raise InputError(f"the data {recipe.data.name} has no {split} split; use --split val")
    bare = replace(recipe.student, weights=None, pretrained=recipe.student.pretrained and weights is None)
    model = task.student(replace(recipe, student=bare), data)
    if weights is not None:
        model = with_head(model, weights)
        models.load_weights(model, weights)
    model.to(accelerator.device)
    values = task.evaluate(model, batches, data, make_placement(task.train_config(recipe), accelerator))
    return {
        "model": recipe.student.name,
        "weights": weights,
        "data": recipe.data.name,
        "split": split,
        **values,
        "samples": int(values["samples"]),
        **task.info(model, data),
    }
