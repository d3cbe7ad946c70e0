"""The model card: what made the student, and lines that load it."""

import re
import sys

import pytest
import yaml

from pcdistill.report import write_model_card
from tests.report.runs import make_result, make_run


def card(run):
    text = write_model_card(run)
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_the_card_says_what_made_the_student(tmp_path):
    front, body = card(make_run(tmp_path))
    assert front["library_name"] == "pcdistill"
    assert {"pcdistill", "knowledge-distillation", "pcd"} <= set(front["tags"])
    result = front["model-index"][0]["results"][0]
    assert result["dataset"]["split"] == "test"
    assert {"type": "accuracy", "name": "top-1 (%)", "value": 91.0} in result["metrics"]
    for part in (
        "cifar/resnet8",
        "cifar/resnet20",
        "digits",
        "abc1234",
        "pcdistill distill --data digits",
        "method: pcd",
    ):
        assert part in body
    for value in ("91.00", "90.50", "92.00", "91.50"):
        assert value in body
    assert "student, best epoch (3), in this file" in body


def test_the_card_of_a_student_trained_alone_and_of_an_unfinished_run(tmp_path):
    front, body = card(make_run(tmp_path / "alone", result=make_result("none")))
    assert "trained alone" in body
    assert "knowledge-distillation" not in front["tags"]
    front, body = card(make_run(tmp_path / "cut", result=False))
    assert "not finished" in body
    assert "model-index" not in front


def test_text_that_would_break_the_card_cannot(tmp_path):
    environment = {"command": "a\n```\n# not a heading\n```", "commit": "x"}
    front, body = card(make_run(tmp_path, result=make_result("---\n<b>", notes=["<script>"]), environment=environment))
    assert front["tags"][-1] == "--- <b>"
    assert "<script>" not in body
    assert "````\na\n```\n" in body


def test_the_cards_three_lines_load_the_student(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from pcdistill import models

    student = models.build_model("cifar/resnet8", num_classes=10, in_channels=1).eval()
    metadata = {"model": "cifar/resnet8", "classes": [str(i) for i in range(10)], "mean": [0.3], "std": [0.4]}
    models.save_weights(student, tmp_path / "student.safetensors", metadata)
    code = re.search(r"```python\n(.*?)```", write_model_card(make_run(tmp_path)), re.DOTALL).group(1)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    scope = {"images": images}
    exec(code, scope)
    torch.testing.assert_close(scope["logits"], student(images))
    assert "mean [0.3] and std [0.4]" in code


def test_the_front_matter_names_license_base_and_data_where_they_are_known(tmp_path):
    front, _ = card(make_run(tmp_path / "scratch"))
    assert front["license"] == "unknown"
    assert "base_model" not in front
    assert "datasets" not in front
    recipe = {"student": {"name": "timm/resnet18.a1_in1k", "pretrained": True}, "data": {"name": "cifar10"}}
    result = make_result(student={"name": "timm/resnet18.a1_in1k"}, data="cifar10")
    run = make_run(tmp_path / "timm", result=result, recipe=recipe)
    (run / "config.json").write_text('{"pretrained_cfg": {"license": "apache-2.0"}}')
    front, _ = card(run)
    assert (front["license"], front["base_model"]) == ("apache-2.0", "timm/resnet18.a1_in1k")
    assert front["datasets"] == ["uoft-cs/cifar10"]
    assert front["library_name"] == "timm"


def test_without_huggingface_hub_the_front_matter_is_the_same(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    front, body = card(run)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert card(run) == (front, body)
