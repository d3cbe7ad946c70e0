"""What a command takes where nothing is named: data in a recipe's place, models by size, folders of their own."""

import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pcdistill.commands.defaults import (
    STUDENTS,
    data_argument,
    default_folder,
    first_line,
    image_side,
    method_folder,
    models_by_size,
)
from pcdistill.commands.header import recipe_text
from pcdistill.recipe import ModelConfig, load_recipe


def test_a_folder_a_file_or_a_known_name_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Meine Fotos").mkdir()
    assert all(map(data_argument, ("Meine Fotos", str(tmp_path), "x.npz", "cifar10", "coco:boxes", "torchvision/SVHN")))
    assert not any(map(data_argument, (None, "default", "digits", "mine.yaml", "nowhere")))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 100, 96, 3)])
def test_the_side_of_an_arrays_images_comes_from_its_header(tmp_path, shape):
    np.savez(tmp_path / "a.npz", x_train=np.zeros(shape, np.uint8), y_train=np.zeros(4, int))
    assert image_side(str(tmp_path / "a.npz")) == min(shape[1:3])


def test_an_unreadable_file_has_no_side(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    assert image_side(str(tmp_path / "a.npz")) is None
    assert image_side(str(tmp_path / "none.npz")) is None


def test_photographs_get_networks_for_photographs(tmp_path):
    assert models_by_size(str(tmp_path), {}) == {"student.name": "timm/resnet18", "teacher.name": "timm/resnet50"}
    assert models_by_size(str(tmp_path), {"student.name": "cifar/resnet8"}) == {"teacher.name": "timm/resnet50"}
    assert models_by_size(str(tmp_path), {"teacher.cache": "C"}) == {"student.name": "timm/resnet18"}
    assert models_by_size(str(tmp_path), {"data.image_size": 32}) == {}
    assert models_by_size("cifar100", {}) == {}


def keep(folder: Path, recipe) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))


def test_another_recipe_gets_another_folder_and_each_finds_its_own_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = load_recipe("digits"), load_recipe("digits", ["train.epochs=3"])
    first = default_folder(one, "distill")
    assert first == Path("runs/distill-digits-resnet8-dist-seed0")
    keep(first, one)
    second = default_folder(other, "distill")
    assert re.fullmatch(r"distill-digits-resnet8-dist-seed0-[0-9a-f]{6}", second.name)
    keep(second, other)
    assert (default_folder(one, "distill"), default_folder(other, "distill")) == (first, second)
    (first / "recipe.yaml").unlink()
    first.rmdir()
    assert default_folder(other, "distill") == second  # though the shorter name is free now


def test_a_comparison_keeps_its_folder_for_more_methods_and_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits")
    folder = default_folder(recipe, "compare")
    weights = str(folder / "teacher" / "student.safetensors")
    trained = replace(recipe.teacher, weights=weights, pretrained=False)
    keep(folder / "kd" / "seed-1", replace(recipe, method="kd", teacher=trained, train=replace(recipe.train, seed=1)))
    assert default_folder(recipe, "compare") == folder
    assert default_folder(replace(recipe, train=replace(recipe.train, epochs=3)), "compare") != folder


def test_a_comparison_with_several_teachers_finds_its_folder_again(tmp_path, monkeypatch):
    """Though its runs name the weights of the teachers that were trained in it, and a seed's own caches."""
    monkeypatch.chdir(tmp_path)
    several = [
        {"name": "cifar/resnet8", "epochs": 1},
        {"name": "cifar/resnet14", "weights": "w.pt", "cache": "c-{seed}"},
    ]
    recipe = load_recipe("digits", values={"teachers": several, "teacher": None})
    folder = default_folder(recipe, "compare")
    weights = str(folder / "teacher" / "teacher.safetensors")
    first, second = recipe.teachers
    trained = recipe.with_teachers([replace(first, weights=weights, pretrained=False), replace(second, cache="c-1")])
    keep(folder / "kd" / "seed-1", replace(trained, method="kd", train=replace(recipe.train, seed=1)))
    assert default_folder(recipe, "compare") == folder
    other = recipe.with_teachers([first, replace(second, weights="other.pt")])
    assert default_folder(other, "compare") != folder


def test_one_student_and_several_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits")
    folder = default_folder(recipe, STUDENTS)
    assert folder == Path("runs/compare-students-digits")
    keep(folder / "cifar-resnet14" / "kd" / "seed-0", replace(recipe, student=ModelConfig("cifar/resnet14")))
    assert default_folder(recipe, STUDENTS) == folder
    assert default_folder(recipe, "compare") == Path("runs/compare-digits-resnet8")
    assert default_folder(replace(recipe, train=replace(recipe.train, epochs=3)), STUDENTS) != folder


@pytest.mark.parametrize("command", ["distill", "train", "compare", "tune", "cache"])
@pytest.mark.parametrize("name", ["coco:Meine Bilder", "a b/c:d", "Übung: eins.npz", "digits"])
def test_default_folders_have_no_character_that_needs_care(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits", values={"data.name": name, "method": "meine/kd verlust.py:Mine"})
    folder = default_folder(recipe, command)
    assert folder.parent == Path("runs")
    assert re.fullmatch(r"[\w.+-]+", folder.name)


def test_a_folder_of_an_earlier_version_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits", values={"method": "mine.py:Mine"})
    earlier = Path("runs/distill-digits-resnet8-mine.py:Mine-seed0")
    earlier.mkdir(parents=True)
    (earlier / "recipe.yaml").write_text(recipe.to_yaml())
    assert default_folder(recipe, "distill") == earlier


OWN_LOSS = st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6})?\.py:[A-Z][a-z]{0,4}", fullmatch=True)


@pytest.mark.slow
@given(st.lists(OWN_LOSS, min_size=2, unique=True))
def test_two_own_losses_of_one_class_name_have_two_folders(methods):
    by_folder = {}
    for method in methods:
        by_folder.setdefault(method_folder(method), set()).add(method.replace("/", "-"))
    assert all(len(found) == 1 for found in by_folder.values())


def test_the_first_line_names_what_is_going_to_be_done():
    said = first_line("distill", load_recipe("digits"))
    assert "distill, digits, cifar/resnet20 -> cifar/resnet8" in said
