"""What a command takes where the user names nothing: models by the size of the images, and a folder. Needs no torch."""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pcdistill import __version__
from pcdistill.data import DATASETS
from pcdistill.errors import InputError
from pcdistill.files import home_followed
from pcdistill.models.names import is_user_code
from pcdistill.recipe import RECIPES, Recipe, TeacherConfig, make_recipe

SMALL = 64  # pixels: up to here the networks for CIFAR's images of 32 pixels do
PHOTOGRAPHS = {"student.name": "timm/resnet18", "teacher.name": "timm/resnet50"}
SIDES = {"digits": 8, "cifar10": 32, "cifar100": 32}
SIDES_TORCHVISION = {  # those of torchvision whose images are small
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST", "QMNIST", "EMNIST"), 28),
    **dict.fromkeys(("CIFAR10", "CIFAR100", "SVHN"), 32),
    "USPS": 16,
}
FOLDER_SIDE = 224
DECIDE_NOTHING = ("checkpoint_seconds", "trackers", "device")  # keys of train


def data_argument(text: str | None) -> bool:
    """Whether what stands in the place of a recipe names data: a folder, an .npz file, or data with a name."""
    if text is None or text.endswith((".yaml", ".yml")) or (RECIPES / f"{text}.yaml").exists():
        return False
    named = text in DATASETS or text.startswith(("coco:", "voc:", "yolo:", "wds:", "hf:", "torchvision/"))
    return named or text.endswith(".npz") or home_followed(text).is_dir()


def models_by_size(data: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Recipe keys of the models for images that are larger than those of CIFAR; {} where the recipe's own do.

    Args:
        data: as `data.name` has it.
        given: dotted keys that the user named; a model that is named, or has weights, is left as it is.
    """
    side = given.get("data.image_size") or image_side(data)
    if not isinstance(side, int) or side <= SMALL:
        return {}
    stands = {key.split(".")[0] for key in given if key in ("student.name", "teacher.name", "teacher.cache")}
    return {key: name for key, name in PHOTOGRAPHS.items() if key.split(".")[0] not in stands}


def image_side(data: str) -> int | None:
    """The side in pixels that images of classification data have in a run; None where it is not known."""
    if data in SIDES:
        return SIDES[data]
    if data.startswith(("wds:", "hf:")):
        return FOLDER_SIDE
    if data.startswith("torchvision/"):
        return SIDES_TORCHVISION.get(data.removeprefix("torchvision/"), FOLDER_SIDE)
    path = home_followed(data)
    if path.suffix == ".npz":
        return _npz_side(path)
    return FOLDER_SIDE if data == "imagenet" or path.is_dir() else None


def _npz_side(path: Path) -> int | None:
    """Of the array x_train, out of its header."""
    from numpy.lib import format as npy

    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        with archive.open("x_train.npy") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape = read(file)[0]
        return min(shape[1:3]) if len(shape) in (3, 4) else None
    return None


STUDENTS = "compare-students"


def default_folder(recipe: Recipe, command: str) -> Path:
    """Where a command writes when no folder is named.

    `command` is its name, or STUDENTS for a comparison of several. The folder's says data, student and method. Where
    one of this name holds something else, six digits of the recipe follow: so another try has another folder, and the
    same command finds its own again.
    """
    root, name = Path("runs"), _clean(_name(recipe, command))
    plain, own = root / name, root / f"{name}-{_digits(recipe, command)}"
    if own.is_dir():
        return own
    earlier = root / _earlier_name(recipe, command)
    found = (one for one in (plain, earlier) if one.is_dir() and _holds(one, recipe, command))
    return next(found, own if plain.is_dir() else plain)


def _name(recipe: Recipe, command: str) -> str:
    data = Path(recipe.data.name).stem
    if command == "cache":
        return f"cache-{data}-seed{recipe.train.seed}"
    if command == STUDENTS:
        return f"{STUDENTS}-{data}"
    name = f"{command}-{data}-{_short(recipe.student.name)}"
    return f"{name}-{method_folder(recipe.method)}-seed{recipe.train.seed}" if command == "distill" else name


def _earlier_name(recipe: Recipe, command: str) -> str:
    """As it was before names were cleaned."""
    return _name(recipe, command).replace(method_folder(recipe.method), recipe.method)


def _short(model: str) -> str:
    return model.rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def _clean(name: str) -> str:
    """Without what a shell, another system or a URL takes for something else."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "run"


def method_folder(method: str) -> str:
    """A method's name as a folder; of a user's `path/to/file.py:Class` all parts, as two classes may share a name."""
    if not is_user_code(method):
        return method
    path, _, name = method.rpartition(":")
    return _clean(f"{path.removesuffix('.py')}.{name}")[-100:].lstrip("-.")


def _digits(recipe: Recipe, command: str) -> str:
    if command in ("train", "distill"):
        return recipe.digest()[:6]
    plain = json.dumps(_shared(recipe.to_dict(), command), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:6]


def _holds(folder: Path, recipe: Recipe, command: str) -> bool:
    """Whether a folder holds what the command makes of the recipe, or nothing that tells."""
    if command in ("train", "distill"):
        found = _recipe_in(folder / "recipe.yaml")
        return found is None or found.digest() == recipe.digest()
    tree = _tree_in(folder, command)
    return tree is None or _shared(tree, command, folder) == _shared(recipe.to_dict(), command, folder)


def _recipe_in(file: Path) -> Recipe | None:
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, InputError):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        return make_recipe(tree) if isinstance(tree, dict) else None
    return None


def _tree_in(folder: Path, command: str) -> dict[str, Any] | None:
    """The recipe that a comparison, a search or a cache was made of; None where that is not written yet."""
    with suppress(OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        if command == "cache":
            return dict(json.loads((folder / "cache.json").read_text(encoding="utf-8"))["recipe"])
        if command == "tune":
            lines = (folder / "study.log").read_text(encoding="utf-8").splitlines()
            attributes = (json.loads(line).get("user_attr") or {} for line in lines)
            return next((dict(one["tree"]) for one in attributes if "tree" in one), None)
        above = "*/*" if command == STUDENTS else "*"
        for file in (
            *folder.glob(f"{above}/seed-*/recipe.yaml"),
            *folder.glob(f"{above}/strength-*/seed-*/recipe.yaml"),
        ):
            if (found := _recipe_in(file)) is not None:
                return found.to_dict()
    return None


def _shared(tree: dict[str, Any], command: str, folder: Path | None = None) -> dict[str, Any]:
    """What all runs of a folder have in common."""
    free = ("method", "losses", "methods")
    shared = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items() if key not in free}
    shared["train"] = {key: value for key, value in tree["train"].items() if key not in DECIDE_NOTHING}
    shared["data"].pop("seed", None)
    if command in ("compare", STUDENTS):
        shared["train"].pop("seed", None)
    if command == STUDENTS:
        del shared["student"]
    if "teachers" in shared:
        shared["teachers"] = [dict(one) for one in shared["teachers"]]
    for teacher in [*shared.get("teachers", ()), *([shared["teacher"]] if shared.get("teacher") else [])]:
        teacher.pop("cache", None)
        if folder is not None and folder in Path(teacher.get("weights") or "").parents:  # trained for the folder
            teacher.update(weights=None)
        if teacher.get("weights") is None:
            teacher.pop("pretrained", None)
    return shared


def by_cache_alone(recipe: Recipe) -> Recipe:
    """The recipe with the teacher that its cache is of, whose stored logits are all that is needed of it."""
    teacher = recipe.teacher
    if teacher is None or teacher.cache is None or teacher.weights is not None:
        return recipe
    from pcdistill.distillation.cache_files import cache_folder  # not for those who have no cache

    known: dict[str, Any] = {}
    with suppress(OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, InputError):
        text = cache_folder(str(recipe.with_caches_of_seed().all_teachers[0].cache)).text("cache.json")
        kept = json.loads(text)["recipe"]["teacher"]
        # Without its scheme an endpoint is a name alone: nobody is to ask it.
        known = {"name": re.sub("^https?://", "", kept["name"]), "kwargs": kept["kwargs"]}
    return replace(recipe, teacher=TeacherConfig(cache=teacher.cache, **known))


def first_line(command: str, recipe: Recipe) -> str:
    """What is going to be done, before anything that takes time is loaded."""
    teachers = " and ".join(teacher.name for teacher in recipe.all_teachers)
    pair = f"{teachers} -> {recipe.student.name}" if teachers else recipe.student.name
    if command == "cache":
        pair = teachers
    return f"pcdistill {__version__}: {command}, {recipe.data.name}, {pair}; loading PyTorch"
