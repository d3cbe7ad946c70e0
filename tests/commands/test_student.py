"""A student out of its folder: in our hands, in timm's, in transformers', and by the code on its card."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from pcdistill import models, report
from pcdistill.commands.export import Export, export
from pcdistill.commands.student import open_student
from pcdistill.errors import InputError
from tests.commands.folders import NAMES, class_folders, finished_run

ON_CARDS = (
    ("timm/resnet10t", 64, "timm"),
    ("timm/vit_tiny_patch16_224", 32, "timm"),
    ("torchvision/shufflenet_v2_x0_5", 48, "torchvision"),
    ("torchvision/vit_b_32", 64, "torchvision"),
    ("cifar/resnet8", 32, "onnxruntime"),
)


def made(tmp_path, name, size, kwargs=None):
    root = class_folders(tmp_path / "Meine Bilder")
    student, data = finished_run(tmp_path / "run", name, root, image_size=size, kwargs=kwargs)
    return student, data, root


def run_the_cards_code(run, photo):
    """What the card's code for production prints, in a process that cannot import pcdistill."""
    card = report.write_model_card(run)
    code = re.search(r"## In production.*?```python\n(.*?)```", card, re.DOTALL).group(1)
    assert "pcdistill." not in code
    assert "import pcdistill" not in code
    photo.rename(run / "photo.jpg")
    script = "import sys; sys.modules['pcdistill'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=run, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return card, done.stdout


def test_timms_config_says_the_students_own_pre_processing(tmp_path):
    timm = pytest.importorskip("timm")
    student, data, _ = made(tmp_path, "timm/resnet10t", 64)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    images = next(iter(data.val.epoch(0))).images
    with torch.no_grad():
        torch.testing.assert_close(model(images), student(images))
    for config in (model.pretrained_cfg, student.pretrained_cfg):
        assert config["num_classes"] == 3
        assert list(config["label_names"]) == list(NAMES)
        assert tuple(config["input_size"]) == (3, 64, 64)
        assert tuple(config["mean"]) == data.mean
    resolved = timm.data.resolve_model_data_config(model)
    steps = timm.data.create_transform(**resolved).transforms
    assert resolved["interpolation"] == "bilinear"
    assert (steps[0].size, tuple(steps[1].size)) == (round(64 * 256 / 224), (64, 64))
    assert not student.pretrained_cfg.get("hf_hub_id")


@pytest.mark.parametrize("size", [31, 64, 90, 160, 224, 299])
def test_timm_scales_the_short_side_as_evaluation_does(size):
    import math

    from pcdistill.data.augment import short_side
    from pcdistill.models.own_config import own_config

    model = torch.nn.Identity()
    model.pretrained_cfg = {"architecture": "x"}
    metadata = {"classes": ["a"], "mean": [0.5], "std": [0.5], "image_size": size, "short_side": short_side(size)}
    config = own_config(model, metadata)
    assert math.floor(size / config["crop_pct"]) == short_side(size)


def test_a_cifar_model_tells_what_timms_tools_ask(tmp_path):
    student, data, _ = made(tmp_path, "cifar/wrn_16_1", 32)
    fresh = models.build_model("cifar/resnet8", num_classes=7, in_channels=1, image_size=28)
    assert (fresh.in_chans, fresh.num_classes, fresh.pretrained_cfg["input_size"]) == (1, 7, (1, 28, 28))
    assert "mean" not in fresh.pretrained_cfg  # nobody knows yet
    assert student.pretrained_cfg["mean"] == data.mean
    loaded = models.build_model(
        "cifar/wrn_16_1", num_classes=None, image_size=32, weights=tmp_path / "run" / "student.safetensors"
    )
    assert loaded.pretrained_cfg == student.pretrained_cfg


@pytest.mark.slow
def test_a_hugging_face_student_loads_by_automodel_and_by_us_without_its_hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(tmp_path / "zoo")
    student, data, root = made(tmp_path, f"hf/{tmp_path / 'zoo'}", 32)
    (tmp_path / "zoo" / "config.json").unlink()  # the run's folder is enough
    images = next(iter(data.val.epoch(0))).images
    auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        wanted = student(images)
        torch.testing.assert_close(auto(images).logits, wanted)
        torch.testing.assert_close(open_student(tmp_path / "run").model(images), wanted)
    assert auto.config.id2label == dict(enumerate(NAMES))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.size["shortest_edge"] == round(32 * 256 / 224)
    assert list(processor.image_mean) == pytest.approx(list(data.mean))
    photo = root / "val" / NAMES[1] / "bild 0.png"
    wanted = _answer(tmp_path, photo)
    _, printed = run_the_cards_code(tmp_path / "run", photo)
    assert _same(printed, wanted)


def _answer(tmp_path, photo):
    """Class and probability by evaluation's own reading."""
    student = open_student(tmp_path / "run")
    with torch.no_grad():
        probabilities = student.model(student.read(str(photo))[0][None]).softmax(1)[0]
    return student.classes[int(probabilities.argmax())], float(probabilities.max())


def _same(printed, wanted):
    name, _, value = printed.strip().rpartition(" ")
    return name == wanted[0] and float(value) == pytest.approx(wanted[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "package"), ON_CARDS, ids=[name for name, *_ in ON_CARDS])
def test_the_cards_code_for_production_needs_no_pcdistill_and_gives_what_evaluation_gives(
    tmp_path, name, size, package
):
    pytest.importorskip(package)
    _, _, root = made(tmp_path, name, size)
    if package == "onnxruntime":
        export(tmp_path / "run", Export("onnx"), print)
    photo = root / "val" / NAMES[2] / "bild 1.png"
    wanted = _answer(tmp_path, photo)
    card, printed = run_the_cards_code(tmp_path / "run", photo)
    assert package in card
    assert _same(printed, wanted)


@pytest.mark.slow
def test_the_cards_code_for_a_grey_student_and_for_a_detector(tmp_path):
    pytest.importorskip("onnxruntime")
    finished_run(tmp_path / "run", "cifar/resnet8")
    export(tmp_path / "run", Export("onnx"), print)
    photo = tmp_path / "zwei.png"
    pixels = torch.randint(0, 256, (30, 20, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(photo)
    wanted = _answer(tmp_path, photo)
    assert _same(run_the_cards_code(tmp_path / "run", photo)[1], wanted)

    options = {"box_score_thresh": 0.3}
    _, data = finished_run(
        tmp_path / "d", "fasterrcnn/tiny", "digits-detection", task="detection", image_size=96, kwargs=options
    )
    export(tmp_path / "d", Export("onnx"), print)
    large, _ = data.val.split.sample(0)
    Image.fromarray(large.permute(1, 2, 0).numpy()).resize((192, 192)).save(photo)
    student = open_student(tmp_path / "d")
    image, _ = student.read(str(photo))
    with torch.no_grad():
        (found,) = student.model([image])
    printed = run_the_cards_code(tmp_path / "d", photo)[1].splitlines()
    kept = found["scores"] >= 0.3
    assert len(printed) == int(kept.sum()) > 0
    for line, box in zip(printed, (2 * found["boxes"][kept]).tolist(), strict=True):
        assert json.loads(line[line.index("[") :]) == pytest.approx(box, abs=1e-2)


def test_a_run_from_python_is_refused(tmp_path):
    finished_run(tmp_path, "cifar/resnet8")
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("name: digits", "name: loaders"))
    with pytest.raises(InputError, match="was made from Python"):
        open_student(tmp_path)
