"""The teachers of a run: which are trained first, from what, and where their files lie."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcdistill.commands.folder import read_json
from pcdistill.commands.tasks import Task
from pcdistill.distillation.cache_store import read_state
from pcdistill.errors import InputError
from pcdistill.models.names import is_user_code
from pcdistill.models.weights import STUDENT_FILE, TEACHER_FILE
from pcdistill.recipe import ALONE, ModelConfig, Recipe, TeacherConfig, make_recipe, scaled_milestones


def teacher_folder(number: int) -> str:
    """Where a run or a comparison trains its teacher; of several, the first is 0."""
    return "teacher" if number == 0 else f"teacher-{number + 1}"


def teacher_file(folder: Path) -> Path:
    """The weights of a teacher that was, or will be, trained in a folder: earlier versions called them the student's.

    The paths stand in the recipes of a comparison's runs, so the name of a file that was taken away counts too.
    """
    for name in (STUDENT_FILE, TEACHER_FILE):
        if (folder / name).exists():
            return folder / name
    result = read_json(folder / "result.json")
    return folder / (STUDENT_FILE if result and result.get("file") != TEACHER_FILE else TEACHER_FILE)


def comes_from_cache(config: TeacherConfig) -> bool:
    """Whether a teacher is there by its stored logits alone: nothing says where its weights are."""
    named = config.weights is not None or config.epochs > 0 or config.pretrained or config.outside
    return config.cache is not None and not named


def cached_facts(config: TeacherConfig) -> dict[str, Any]:
    """What a cache knows of its teacher: fingerprint, name, size, and its metrics by split where they were kept."""
    assert config.cache is not None
    state = read_state(config.cache)
    found = {"name": config.name, "val": None, "test": None, **(state.teacher or {})}
    return {**found, "fingerprint": state.info.teacher}


def without_model(config: ModelConfig) -> bool:
    """Whether a name is of a teacher that no model is built for: it is asked for logits, or they are in its cache."""
    return isinstance(config, TeacherConfig) and (config.outside or comes_from_cache(config))


def facts_without_model(config: TeacherConfig, seed: int) -> dict[str, Any]:
    """What is known of the size of a teacher that no model is built for; a cache's folder may depend on the seed."""
    if not comes_from_cache(config):
        return {}
    assert config.cache is not None
    with suppress(InputError):  # whoever reads the logits says so
        facts = cached_facts(replace(config, cache=config.cache.replace("{seed}", str(seed))))
        return {key: facts[key] for key in ("parameters", "macs") if key in facts}
    return {}


def training_of(recipe: Recipe, number: int, task: Task, data: Any) -> Recipe | None:
    """The recipe that trains a teacher first, or None when it has weights for the data's classes.

    Raises:
        InputError: it has none, and nothing says that it should be trained.
    """
    config = recipe.all_teachers[number]
    if config.weights is not None:
        if config.epochs == 0 or "mismatched-weights" not in recipe.allow:
            return None
        with torch.random.fork_rng(devices=[]):
            return _training(recipe, number) if task.other_classes(config, data) else None
    return None if task.knows_classes(config, data) else teacher_recipe(recipe, number)


def teacher_recipe(recipe: Recipe, number: int = 0) -> Recipe | None:
    """The recipe that trains a teacher first, or None when it has weights, by what the recipe says alone.

    The seed is the student's plus the teacher's number, so that several of one architecture differ.
    """
    if number >= len(recipe.all_teachers):
        return None
    config = recipe.all_teachers[number]
    if config.weights is not None or config.outside or comes_from_cache(config):
        return None
    if config.epochs == 0:
        if config.pretrained:
            return None
        own = ""
        if is_user_code(config.name):
            own = (
                ", or teacher.pretrained true if the function gives a trained model, or teacher.call true "
                "(--teacher-call True) if it is called with images and gives logits"
            )
        raise InputError(
            f"the teacher {config.name} has no weights: give teacher.weights (--teacher-weights FILE), or "
            f"teacher.epochs (--teacher-epochs N) to train it first{own}"
        )
    return _training(recipe, number)


def _training(recipe: Recipe, number: int) -> Recipe:
    config = recipe.all_teachers[number]
    tree = recipe.to_dict()
    student = {"name": config.name, "pretrained": config.pretrained, "kwargs": config.kwargs}
    if config.weights is not None:
        student.update(pretrained=False, weights=config.weights)
    tree.update(method=ALONE, losses=[], methods={}, teacher=None, teachers=[], student=student)
    tree["optim"]["milestones"] = scaled_milestones(recipe.optim.milestones, recipe.train.epochs, config.epochs)
    tree["train"].update(epochs=config.epochs, seed=recipe.train.seed + number)
    tree["data"].update(unlabelled=None, unlabelled_batch=None)
    return make_recipe(tree)
