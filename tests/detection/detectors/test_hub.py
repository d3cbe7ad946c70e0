"""Detectors of transformers by name: kinds, folders, options, and one sentence for each mistake."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pcdistill.detection.detectors.build import build_detector, comes_whole, list_detectors, pretrained_classes
from pcdistill.detection.detectors.hub import hub_kinds, is_kind
from pcdistill.detection.detectors.set_prediction import SetPrediction
from pcdistill.errors import InputError
from pcdistill.models import load_weights, save_weights
from pcdistill.recipe import load_recipe
from tests.detection.families import HUB, batch_of, detector

NAMES = {0: "cat", 1: "N/A", 2: "dog", 3: "N/A"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as the hub has it, with a processor of its own."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = detector("rt_detr", num_classes=4).inner
    model.config.id2label = NAMES
    model.config.label2id = {"cat": 0, "dog": 2}
    model.save_pretrained(path)
    facts = {"size": {"height": 96, "width": 96}, "do_normalize": False, "image_processor_type": "RTDetrImageProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(facts))
    return path


def test_a_folder_gives_weights_classes_size_and_normalisation(folder):
    name = f"hf/{folder}"
    model = build_detector(name, num_classes=None, pretrained=True)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.inner.state_dict().items() if key in weights)
    assert pretrained_classes(name) == ("cat", "N/A 2", "dog", "N/A 4")
    assert SetPrediction(model).outputs == 5
    assert (model.min_size, model.square) == (96, True)
    assert model.stats == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert comes_whole(name)


def test_a_folder_in_the_users_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    name = f"hf/~/{folder.name}"
    assert pretrained_classes(name) == ("cat", "N/A 2", "dog", "N/A 4")
    assert build_detector(name, num_classes=None, pretrained=True).min_size == 96
    assert comes_whole(name)


def test_with_other_classes_all_but_the_heads_is_kept(folder):
    model = build_detector(f"hf/{folder}", num_classes=2, pretrained=True, kwargs={"min_size": 64})
    weights = load_file(folder / "model.safetensors")
    state = model.inner.state_dict()
    changed = {key for key, value in state.items() if key in weights and value.shape != weights[key].shape}
    assert changed
    assert all("class_embed" in key or "score" in key or "class" in key for key in changed)
    assert all(torch.equal(state[key], weights[key]) for key in weights if key not in changed and key in state)
    assert SetPrediction(model).outputs == 3
    assert model.min_size == 64


def test_a_folder_without_pretrained_gives_its_configuration_alone(folder):
    torch.manual_seed(1)
    model = build_detector(f"hf/{folder}", num_classes=3)
    weights = load_file(folder / "model.safetensors")
    assert any(
        key in weights and value.shape == weights[key].shape and not torch.equal(value, weights[key])
        for key, value in model.inner.state_dict().items()
    )
    assert SetPrediction(model).outputs == 4


@pytest.mark.parametrize("family", ["rt_detr", "d_fine"])
def test_weights_are_saved_and_loaded_tied_ones_too(family, tmp_path):
    model, other = detector(family, seed=0).eval(), detector(family, seed=1).eval()
    images = batch_of().images
    save_weights(model, tmp_path / "weights.safetensors", {"classes": ["red", "green", "blue"]})
    load_weights(other, tmp_path / "weights.safetensors")
    for own, wanted in zip(other(images), model(images), strict=True):
        assert torch.equal(own["scores"], wanted["scores"])


def test_statistics_of_random_weights_are_trained():
    kinds = {type(m).__name__ for m in detector("rt_detr").modules()}
    assert "RTDetrFrozenBatchNorm2d" not in kinds
    assert "BatchNorm2d" in kinds
    frozen = {type(m).__name__ for m in detector("rt_detr", freeze_backbone_batch_norms=True).modules()}
    assert "RTDetrFrozenBatchNorm2d" in frozen


def test_kinds_are_listed_and_have_no_classes():
    assert set(HUB) <= set(hub_kinds())
    assert {f"hf/{kind}" for kind in HUB} <= set(list_detectors())
    assert is_kind("rt_detr")
    assert not comes_whole("hf/rt_detr")
    assert not comes_whole("fasterrcnn/resnet18")


def test_a_kind_has_no_weights_to_start_from():
    with pytest.raises(InputError, match="hf/rt_detr is a kind of model and has no weights"):
        build_detector("hf/rt_detr", num_classes=3, pretrained=True)


def test_a_teacher_named_by_its_kind_is_not_taken_as_trained(tmp_path):
    assert not load_recipe("detection", ["teacher.name=hf/rt_detr"]).teacher.pretrained
    assert load_recipe("detection", ["teacher.name=hf/facebook/detr-resnet-50"]).teacher.pretrained
    assert load_recipe("detection", [f"teacher.name=hf/{tmp_path}"]).teacher.pretrained


def offline(*_, **__):
    raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")


MISTAKES = [
    ("hf/rt_detr", {"d_modl": 3}, 'hf/rt_detr has no option "d_modl"; did you mean "d_model"'),
    ("hf/rt_detr", {"d_model": "wide"}, "hf/rt_detr cannot be built: Validation error for field 'd_model'"),
    ("hf/nobody/nothing", {}, "hf/nobody/nothing is neither a folder nor a model that the hub gave; without a network"),
]


@pytest.mark.parametrize(("name", "kwargs", "sentence"), MISTAKES, ids=lambda v: str(v)[:20])
def test_mistakes_are_one_sentence(name, kwargs, sentence, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(InputError) as caught:
        build_detector(name, num_classes=3, kwargs=kwargs)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_classifier_is_no_detector(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="is a vit, which is no detector of boxes"):
        build_detector(f"hf/{tmp_path}", num_classes=3)


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pcdistill\[hf\]'"):
        build_detector("hf/rt_detr", num_classes=3)
