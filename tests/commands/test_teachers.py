"""Teachers of a run: trained first under their own name, from weights of other classes, or there by a cache alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from pcdistill.classification.task import Classification
from pcdistill.cli import main
from pcdistill.commands.teachers import comes_from_cache, teacher_file, training_of
from pcdistill.errors import InputError
from pcdistill.models import build_model, save_weights
from pcdistill.recipe import TeacherConfig, load_recipe


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ([], "teacher.safetensors"),
        (["student.safetensors"], "student.safetensors"),
        (["teacher.safetensors"], "teacher.safetensors"),
    ],
)
def test_a_teachers_file_is_called_so_but_in_folders_of_earlier_versions(tmp_path, files, name):
    for file in files:
        (tmp_path / file).touch()
    assert teacher_file(tmp_path).name == name


@pytest.mark.parametrize("said", [{}, {"file": "teacher.safetensors"}])
def test_a_file_that_was_taken_away_keeps_its_name(tmp_path, said):
    (tmp_path / "result.json").write_text(json.dumps({"status": "done", **said}))
    assert teacher_file(tmp_path).name == said.get("file", "student.safetensors")


def four_classes() -> SimpleNamespace:
    return SimpleNamespace(classes=["a", "b", "c", "d"], in_channels=1, image_size=8, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("named", [True, False])
def test_weights_of_other_classes_are_trained_on_where_that_is_allowed(tmp_path, named):
    file = tmp_path / "ten.safetensors"
    model = build_model("cifar/resnet8", num_classes=10, in_channels=1)
    save_weights(model, file, {"classes": [str(i) for i in range(10)]} if named else {})
    recipe = load_recipe("digits", values={"teacher.name": "cifar/resnet8", "teacher.weights": str(file)})
    task, data = Classification(), four_classes()
    assert training_of(recipe, 0, task, data) is None
    with pytest.raises(InputError, match="--allow mismatched-weights"):
        task.teacher(recipe.teacher, model, data, ())
    trained = training_of(replace(recipe, allow=("mismatched-weights",)), 0, task, data)
    assert trained is not None
    assert (trained.student.weights, trained.method, trained.train.epochs) == (str(file), "none", 20)
    own = SimpleNamespace(**{**vars(data), "classes": [str(i) for i in range(10)]})
    assert training_of(replace(recipe, allow=("mismatched-weights",)), 0, task, own) is None


def test_a_teacher_is_there_by_its_cache_alone_only_if_nothing_says_where_its_weights_are():
    assert comes_from_cache(TeacherConfig(cache="C"))
    assert not comes_from_cache(TeacherConfig(cache="C", epochs=1))
    assert not comes_from_cache(TeacherConfig(cache="C", pretrained=True))
    assert not comes_from_cache(TeacherConfig(cache="C", weights="w.safetensors"))


def photographs(path):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 4
    x = (rng.integers(0, 60, (80, 8, 8)) + 20 * y[:, None, None]).clip(0, 255).astype(np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20], classes=np.array(["a", "b", "c", "d"]))
    return path


@pytest.mark.slow
def test_from_a_trained_teacher_over_its_cache_to_a_student_that_needs_no_teacher(tmp_path, capsys):
    data = ["--data", str(photographs(tmp_path / "d.npz")), "--batch-size", "16", "--allow", "weak-teacher"]
    pair = ["--teacher", "cifar/resnet8", "--student", "cifar/resnet8", "--epochs", "1"]
    main(["distill", *data, *pair, "--teacher-epochs", "2", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr()
    weights = tmp_path / "run" / "teacher" / "teacher.safetensors"
    assert f"--teacher cifar/resnet8 --teacher-weights {weights}" in printed.out
    assert "is trained first (2 epochs)" in printed.err
    assert load_file(weights)
    cache = tmp_path / "mein Cache"
    main(["cache", *data, *pair[:2], "--teacher-weights", str(weights), "--epochs", "1", "--out", str(cache)])
    weights.unlink()  # nothing but the cache is left of the teacher
    capsys.readouterr()
    alone = ["distill", *data, *pair[2:], "--teacher-cache", str(cache), "--out", str(tmp_path / "two"), "--json"]
    main(alone)
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"]["name"] == "cifar/resnet8"
    assert 0 <= found["teacher"]["test"]["top1"] <= 100
    assert found["losses"][1]["temperature"] == 4.0
    main(alone)  # done: nothing is trained
    assert "nothing was trained" in capsys.readouterr().err
    main([*alone[:-3], "--method", "fitnet", "--out", str(tmp_path / "three"), "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["teacher"]["cache"] == str(cache)
    with pytest.raises(SystemExit):
        main([*alone[:-3], "--method", "fitnet", "--out", str(tmp_path / "three")])
    assert "teacher.cache holds logits alone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_other_classes_is_trained_on_this_data(tmp_path, capsys):
    data = ["--data", str(photographs(tmp_path / "d.npz")), "--batch-size", "16", "--allow", "weak-teacher"]
    file = tmp_path / "ten.safetensors"
    save_file(build_model("cifar/resnet8", num_classes=10, in_channels=1).state_dict(), file)
    argv = [
        "distill",
        *data,
        "--teacher",
        "cifar/resnet8",
        "--teacher-weights",
        str(file),
        "--student",
        "cifar/resnet8",
    ]
    argv += ["--epochs", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(argv)
    assert "with --teacher-epochs N --allow mismatched-weights" in capsys.readouterr().err
    main([*argv, "--teacher-epochs", "1", "--allow", "mismatched-weights"])
    assert "is trained first (1 epochs)" in capsys.readouterr().err
    assert (tmp_path / "run" / "teacher" / "teacher.safetensors").is_file()
