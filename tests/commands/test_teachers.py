"""Teachers of a run: trained first under their own name, from weights of other classes, or there by a cache alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pcdistill.classification.task import Classification
from pcdistill.cli import main
from pcdistill.commands.session import Session, run
from pcdistill.commands.teachers import comes_from_cache, teacher_file, teacher_recipe, training_of
from pcdistill.errors import InputError
from pcdistill.models import build_model, save_weights
from pcdistill.recipe import TeacherConfig, load_recipe
from tests.models.server import Server

CENTRES = torch.tensor([30.0, 50.0, 70.0, 90.0]) / 255


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
    assert not comes_from_cache(TeacherConfig("mine.py:predict", cache="C", call=True))
    assert not comes_from_cache(TeacherConfig("http://host/v2/models/net", cache="C"))
    assert comes_from_cache(TeacherConfig("host/v2/models/net", cache="C"))  # how a run names it by its cache alone


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


# Answers by the mean brightness, in which the four classes of `photographs` differ; it counts its calls.
BRIGHTNESS = """
from pathlib import Path

import torch

def predict(images):
    with (Path(__file__).parent / "calls").open("a") as file:
        file.write(f"{len(images)}\\n")
    centres = torch.tensor([30.0, 50.0, 70.0, 90.0]) / 255
    return -200 * (images.mean(dim=(1, 2, 3))[:, None] - centres) ** 2
"""
TOLD = ["--set", "teacher.mean=[0,0,0]", "--set", "teacher.std=[1,1,1]"]


def asked(folder):
    """How many images the function was called with, since the last look."""
    file = folder / "calls"
    found = sum(map(int, file.read_text().split())) if file.exists() else 0
    file.unlink(missing_ok=True)
    return found


@pytest.mark.slow
def test_a_function_teaches_and_its_cache_is_asked_in_its_place(tmp_path, capsys):
    data = ["--data", str(photographs(tmp_path / "d.npz")), "--batch-size", "16", "--epochs", "1", "--device", "cpu"]
    file = tmp_path / "mine.py"
    file.write_text(BRIGHTNESS)
    teacher = ["--teacher", f"{file}:predict", "--teacher-call", "True", *TOLD]
    student = ["--student", "cifar/resnet8", "--method", "kd"]
    main(["distill", *data, *teacher, *student, "--out", str(tmp_path / "live")])
    live = asked(tmp_path)
    result = json.loads((tmp_path / "live" / "result.json").read_text())
    assert result["teacher"]["val"]["top1"] > 90
    assert "is asked for its logits" in capsys.readouterr().err
    main(["cache", *data, *teacher, "--out", str(tmp_path / "cache")])
    asked(tmp_path)
    cached = ["--teacher-cache", str(tmp_path / "cache")]
    main(["distill", *data, *teacher, *student, *cached, "--out", str(tmp_path / "cached")])
    assert asked(tmp_path) == live - 64  # the training batches of one epoch
    main(["distill", *data, *student, *cached, "--out", str(tmp_path / "alone")])
    assert asked(tmp_path) == 0
    file.write_text(BRIGHTNESS + "# changed\n")
    with pytest.raises(SystemExit):
        main(["distill", *data, *teacher, *student, *cached, "--out", str(tmp_path / "changed")])
    assert "comes from another teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "fitnet"}, r"fitnet compares features, and the teacher .* gives logits alone"),
        ({"student.head": "teacher"}, r"student.head: the teacher .* gives logits alone"),
    ],
)
@pytest.mark.parametrize("name", ["mine.py:predict", "http://localhost:1/v2/models/net"])
def test_what_needs_more_than_logits_is_refused_before_anything_is_asked(values, sentence, name):
    call = not name.startswith("http")
    recipe = load_recipe("digits", values={"teacher.name": name, "teacher.call": call, **values})
    assert recipe.teacher.outside
    with pytest.raises(InputError, match=sentence):
        Session(recipe).prepare()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"teacher.call": True, "teacher.name": "cifar/resnet8"}, "teacher.call: needs a name of the form"),
        (
            {"teacher.name": "http://host/m", "teacher.weights": "w.pt"},
            "teacher.weights: has no effect on http://host/m",
        ),
        (
            {"teacher.call": True, "teacher.name": "m.py:f", "teacher.features": ["a"]},
            "teacher.features: has no effect on m.py:f",
        ),
        ({"teacher.name": "http://host/m", "task": "detection"}, "is asked for logits, and detection has none"),
    ],
)
def test_keys_that_do_not_fit_a_teacher_that_is_asked_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        load_recipe("digits", values=values)


def test_an_endpoint_is_no_student():
    with pytest.raises(InputError, match="is an endpoint, which can only be the teacher of a classifier"):
        build_model("https://host/v2/models/net", num_classes=2)


def test_a_function_without_teacher_call_is_told_of_it():
    recipe = load_recipe(None, values={"teacher.name": "mine.py:predict"})
    with pytest.raises(InputError, match=r"teacher.call true \(--teacher-call True\) if it is called with images"):
        teacher_recipe(recipe)


@pytest.mark.slow
def test_an_endpoint_teaches_alone_and_beside_a_function(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    server.model["outputs"][0]["shape"] = [-1, 4]
    monkeypatch.setattr(server, "logits", lambda x: -200 * (x.mean(dim=(1, 2, 3))[:, None] - CENTRES) ** 2)
    file = tmp_path / "mine.py"
    file.write_text(BRIGHTNESS)
    normal = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    own = {"name": f"{file}:predict", "call": True, **normal}
    served = {"name": server.url, **normal}
    common = {
        "data.name": str(photographs(tmp_path / "d.npz")),
        "data.batch_size": 16,
        "student.name": "cifar/resnet8",
        "train.epochs": 1,
        "train.device": "cpu",
        "method": "kd",
    }
    try:
        for number, teachers in enumerate([{"teacher": served}, {"teachers": [own, served]}]):
            result = run(load_recipe(None, values={**common, **teachers}), tmp_path / str(number))
            assert result.summary["teacher"]["val"]["top1"] > 90
            assert "parameters" not in result.summary["teacher"]
    finally:
        server.close()
