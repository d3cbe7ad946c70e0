"""Runs' folders as a finished run leaves them, made without training, and images on disk."""

import numpy as np
import torch
from PIL import Image

from pcdistill import models
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import task_of
from pcdistill.engine.placement import make_accelerator
from pcdistill.recipe import make_recipe

NAMES = ("birne", "kirsche 2", "Äpfel süß")


def class_folders(root, per_class=12, seed=0):
    """A folder train/ of three classes and val/ and test/ beside it: noise around a colour of the class."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", per_class), ("val", 4), ("test", 4)):
        for label, name in enumerate(NAMES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = (int(side) for side in rng.integers(30, 60, 2))
                pixels = rng.integers(0, 120, (height, width, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"bild {i}.png")
    return root


def finished_run(out, name, data="digits", *, task="classification", image_size=None, kwargs=None, seed=0):
    """A run's folder with recipe.yaml and student.safetensors; gives the student and its data too."""
    out.mkdir(parents=True, exist_ok=True)
    tree = {
        "task": task,
        "method": "none",
        "student": {"name": name, "kwargs": kwargs or {}},
        "data": {"name": str(data), "image_size": image_size, "workers": 0},
        "train": {"device": "cpu"},
    }
    recipe = make_recipe(tree)
    accelerator, of_task = make_accelerator(recipe.train), task_of(recipe)
    found = open_data(of_task, recipe, accelerator)
    torch.manual_seed(seed)
    student = of_task.student(recipe, found)
    for module in student.modules():  # statistics of a network that has seen something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
    for key, parameter in student.named_parameters():  # a detector's scores start all but equal
        if "cls_logits.weight" in key or "cls_score.weight" in key:
            parameter.data *= 50
    student.eval()
    models.save_weights(student, out / "student.safetensors", {"model": name, **of_task.metadata(found)})
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if task == "classification":
        models.save_config(student, out, of_task.metadata(found))
    return student, found
