"""`--print-config`: the resolved recipe, after a check against its data."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from pcdistill.commands.header import recipe_text
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import Task, task_of
from pcdistill.engine.console import Console
from pcdistill.engine.placement import make_accelerator
from pcdistill.errors import PcdistillError
from pcdistill.recipe import Recipe

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}  # of data that may not be there yet


def printed_recipe(recipe: Recipe, console: Console) -> str:
    """The text of a recipe that was checked against its data, as far as they can be opened.

    Raises:
        InputError: a loss does not fit the data's classes.
    """
    task = task_of(recipe)
    data = _data(recipe, task, console)
    if data is not None:
        task.check(recipe, data)
    return recipe_text(recipe, None if data is None else task.outputs(data))


def _data(recipe: Recipe, task: Task, console: Console) -> Any:
    """The data, or what is known of their classes; None where that is nothing."""
    labelled = replace(recipe, data=replace(recipe.data, unlabelled=None))
    try:
        return open_data(task, labelled, make_accelerator(recipe.train))
    except (PcdistillError, OSError) as error:
        if recipe.data.name in CLASSES:
            return SimpleNamespace(classes=range(CLASSES[recipe.data.name]))
        console.warn(f"the losses were not checked against the data's classes: {error}")
        return None
