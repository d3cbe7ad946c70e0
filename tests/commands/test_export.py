"""Exported students: each form gives what the student gives, and says how it reads its images."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill import models
from pcdistill.commands.export import Export, export
from pcdistill.commands.student import open_student
from pcdistill.errors import InputError
from tests.commands.folders import NAMES, class_folders, finished_run

TEN = (  # of three zoos: convolutions, attention, squeeze and excitation, shuffles, another input channel
    ("cifar/resnet8", "digits", None),
    ("cifar/vgg8", "folders", 32),
    ("cifar/shufflenetv2", "folders", 32),
    ("cifar/wrn_16_1", "digits", None),
    ("timm/resnet10t", "folders", 64),
    ("timm/mobilenetv3_small_050", "folders", 64),
    ("timm/vit_tiny_patch16_224", "folders", 32),
    ("torchvision/resnet18", "folders", 48),
    ("torchvision/squeezenet1_1", "folders", 64),
    ("torchvision/shufflenet_v2_x0_5", "folders", 64),
)


def made(tmp_path, name, data, size):
    root = "digits" if data == "digits" else class_folders(tmp_path / "Meine Bilder")
    return finished_run(tmp_path / "run", name, root, image_size=size)


def held_out(data):
    return torch.cat([batch.images for batch in data.val.epoch(0)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "size"), TEN, ids=[name for name, *_ in TEN])
def test_ten_models_of_three_zoos_give_in_onnx_what_they_give(tmp_path, name, data, size):
    onnxruntime = pytest.importorskip("onnxruntime")
    student, found = made(tmp_path, name, data, size)
    said = []
    export(tmp_path / "run", Export("onnx"), said.append)
    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "export" / "student.onnx"))
    images = held_out(found)
    for part in (images[:1], images[:5]):  # any batch
        with torch.no_grad():
            wanted = student(part)
        (got,) = session.run(None, {"images": part.numpy()})
        assert np.abs(got - wanted.numpy()).max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    about = json.loads((tmp_path / "run" / "export" / "student.onnx.json").read_text(encoding="utf-8"))
    inside = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert inside["classes"] == about["classes"] == list(found.classes)
    assert inside["preprocess"] == about["preprocess"]
    assert about["compared"]["student"] == about["compared"]["exported"]
    assert "largest difference: logits" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("cifar/resnet8", "torch-export"),
        ("timm/vit_tiny_patch16_224", "torch-export"),
        ("torchvision/resnet18", "safetensors"),
        ("timm/resnet10t", "timm"),
        ("timm/vit_tiny_patch16_224", "timm"),
        ("timm/resnet10t", "hf"),
    ],
)
def test_other_forms_give_what_the_student_gives(tmp_path, name, form):
    if form == "hf":
        pytest.importorskip("transformers")
    made(tmp_path, name, "folders", 32)
    said = []
    export(tmp_path / "run", Export(form), said.append)
    assert "on 12 validation images" in said[-1]
    difference = float(said[-1].rpartition("logits ")[2])
    assert difference < 1e-5


@pytest.mark.slow
def test_int8_says_what_it_costs_and_keeps_the_metadata(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    made(tmp_path, "cifar/resnet8", "folders", 32)
    said = []
    export(tmp_path / "run", Export("onnx", int8=True), said.append)
    assert said[-1].startswith("int8 costs")
    folder = tmp_path / "run" / "export"
    assert (folder / "student.int8.onnx").stat().st_size < 0.6 * (folder / "student.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(folder / "student.int8.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(NAMES)
    assert session.run(None, {"images": np.zeros((3, 3, 32, 32), np.float32)})[0].shape == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn/tiny", "retinanet/tiny", "fcos/tiny"])
def test_a_detector_finds_in_onnx_what_it_finds(tmp_path, name, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pcdistill.commands.export.CHECKED_ONE_BY_ONE", 3)
    options = {} if name == "fasterrcnn/tiny" else {"score_thresh": 0.0, "detections_per_img": 20}
    finished_run(tmp_path / "run", name, "digits-detection", task="detection", image_size=96, kwargs=options)
    said = []
    export(tmp_path / "run", Export("onnx"), said.append)
    about = json.loads((tmp_path / "run" / "export" / "student.onnx.json").read_text(encoding="utf-8"))
    compared = about["compared"]
    assert compared["boxes"]["student"] == compared["boxes"]["exported"] > 0
    assert compared["largest_difference"]["scores"] < 1e-5
    assert about["category_ids"] == [int(name) for name in about["classes"]]  # the data's own: the digits

    from pcdistill.commands.onnx_files import OnnxDetector

    student, onnx = open_student(tmp_path / "run").model, OnnxDetector(tmp_path / "run" / "export" / "student.onnx")
    image = torch.rand(3, 70, 90)  # another size than the one that was traced
    (one,), (other,) = onnx([image]), student([image])
    torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
    assert one["labels"].tolist() == other["labels"].tolist()


@pytest.mark.slow
def test_without_data_the_export_says_that_it_was_not_compared(tmp_path):
    made(tmp_path, "cifar/resnet8", "folders", 32)
    (tmp_path / "Meine Bilder").rename(tmp_path / "andere")
    said = []
    export(tmp_path / "run", Export("safetensors"), said.append)
    assert "not compared" in said[0]
    assert "--check" in said[0]
    export(tmp_path / "run", Export("safetensors", check=str(tmp_path / "andere")), said.append)
    assert "test images of" in said[-1]


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Export("timm"), "timm builds models of its own alone"),
        (Export("hf"), "transformers builds models of hf/ and timm/"),
        (Export("torch-export", int8=True), "--int8 is for --to onnx"),
        (Export("safetensors", check="digits"), "the classes of digits are not those of the student"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(tmp_path, plan, sentence):
    made(tmp_path, "cifar/resnet8", "folders", 32)
    with pytest.raises(InputError, match=sentence):
        export(tmp_path / "run", plan, print)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
def test_a_folder_in_the_files_place_is_no_traceback(tmp_path, form):
    made(tmp_path, "cifar/resnet8", "folders", 32)
    (tmp_path / "there").mkdir()
    with pytest.raises((InputError, OSError)):
        export(tmp_path / "run", Export(form, out=tmp_path / "there"), print)
    assert not list((tmp_path / "there").iterdir())


def test_a_missing_package_is_named_before_anything(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(
        InputError, match=r"ONNX needs onnxscript, which is not installed: pip install 'pcdistill\[export\]'"
    ):
        export(tmp_path / "nowhere", Export("onnx"), print)


def test_a_folder_that_is_no_run_and_an_unfinished_one(tmp_path):
    with pytest.raises(InputError, match="not a run's folder"):
        open_student(tmp_path)
    finished_run(tmp_path, "cifar/resnet8")
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(InputError, match="the run is not finished"):
        open_student(tmp_path)


def test_a_student_reads_an_image_as_evaluation_does(tmp_path):
    _, data = made(tmp_path, "cifar/resnet8", "folders", 32)
    student = open_student(tmp_path / "run")
    images = held_out(data)
    paths = data.val.reader.task.items.paths
    for i in (0, 5, 11):
        image, size = student.read(paths[int(data.val.reader.rows[i])])
        torch.testing.assert_close(image, images[i], rtol=0, atol=1e-6)
        with Image.open(paths[int(data.val.reader.rows[i])]) as picture:
            assert size == picture.size[::-1]


def test_a_run_of_before_the_pre_processing_was_written_asks_its_data(tmp_path):
    student, _ = finished_run(tmp_path, "cifar/resnet8")
    old = {"model": "cifar/resnet8", "classes": [str(i) for i in range(10)], "mean": [0.3], "std": [0.4]}
    models.save_weights(student, tmp_path / "student.safetensors", old)
    found = open_student(tmp_path)
    assert found.preprocess.size == 8
    assert found.preprocess.mean == (0.3,)
    assert found.preprocess.short is None
