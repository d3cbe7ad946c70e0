"""Detection on the command line: the main job on a folder of coloured squares, a kill and a resume, the mistakes."""

import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pcdistill import cli
from pcdistill.detection.detectors.build import build_detector
from pcdistill.engine.loop import Trainer
from pcdistill.models import read_metadata, save_weights
from tests.detection.families import HUB
from tests.processes import finished, program

COLORS = {3: (220, 40, 40), 7: (40, 200, 60), 12: (50, 60, 230)}  # category ids with gaps
NAMES = {3: "red", 7: "green", 12: "blue"}


def call(*argv) -> None:
    cli.main([str(part) for part in argv])


def error_of(capsys, *argv) -> str:
    """The one sentence that a wrong input gives, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """A COCO folder: coloured squares on grey noise; every fifth image is empty."""
    root = tmp_path_factory.mktemp("squares")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 12), ("test", 12)):
        tree = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k, "name": name} for k, name in NAMES.items()],
        }
        for i in range(count):
            pixels = rng.integers(100, 156, (64, 64, 3)).astype(np.uint8)
            tree["images"].append({"id": i, "file_name": f"{split}{i}.png", "width": 64, "height": 64})
            for _ in range(0 if i % 5 == 4 else 2):
                kind, side = int(rng.choice(list(NAMES))), int(rng.integers(14, 26))
                x, y = (int(v) for v in rng.integers(0, 64 - side, 2))
                pixels[y : y + side, x : x + side] = COLORS[kind]
                box = {"image_id": i, "category_id": kind, "bbox": [x, y, side, side], "area": side * side}
                tree["annotations"].append({"id": len(tree["annotations"]) + 1, "iscrowd": 0, **box})
            Image.fromarray(pixels).save(root / "images" / f"{split}{i}.png")
        (root / f"{split}.json").write_text(json.dumps(tree))
    return root


@pytest.fixture(scope="module")
def teacher(squares, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    call(
        *("train", "digits-detection", "--data", squares, "--model", "fasterrcnn/tiny8", "--epochs", "10"),
        *("--batch-size", "4", "--image-size", "64", "--out", out, "--quiet"),
    )
    return out


@pytest.fixture(scope="module")
def beginner(squares, tmp_path_factory) -> Path:
    """A teacher that has hardly learnt, for what fails before anybody asks it."""
    out = tmp_path_factory.mktemp("beginner")
    model = build_detector("fasterrcnn/tiny8", num_classes=3)
    save_weights(model, out / "student.safetensors", {"classes": [*NAMES.values()]})
    return out


def settings(squares, teacher=None, student="fasterrcnn/tiny4", epochs=2):
    weights = () if teacher is None else ("--teacher-weights", teacher / "student.safetensors")
    return (
        *("digits-detection", "--data", squares, "--teacher", "fasterrcnn/tiny8", *weights),
        *("--student", student, "--epochs", epochs, "--batch-size", "8", "--image-size", "64", "--quiet"),
        *("--allow", "weak-teacher", "--set", "methods={}", "--set", "detection.top_k=20"),
    )


PCD = "losses=[{method: detector}, {method: pcd, stages: 2, temperature: 1}]"


@pytest.mark.slow
def test_a_detector_learns_and_its_folder_is_complete(squares, teacher, monkeypatch):
    result = json.loads((teacher / "result.json").read_text())
    assert result["metric"] == "map"
    assert result["best"]["test"]["map"] > 10
    assert set(result["best"]["test"]["per_class"]) == {"red", "green", "blue"}
    assert read_metadata(teacher / "student.safetensors")["classes"] == ["red", "green", "blue"]
    samples = np.load(teacher / "samples.npz")
    assert samples["image_0"].shape == (64, 64, 3)
    assert "teacher_0_boxes" not in samples
    card = (teacher / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(teacher)
    known: dict = {}
    exec(code.replace("photo.jpg", str(squares / "images" / "test0.png")), known)  # what the card tells its reader
    weights = load_file("student.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in known["student"].model.state_dict().items())
    assert set(known["found"]) == {"boxes", "labels", "scores"}
    page = (teacher / "report.html").read_text()
    assert "AP (%)" in page
    assert "student: 2 boxes" in page


@pytest.mark.slow
def test_distill_evaluate_and_the_same_command_again(squares, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    command = ("distill", *settings(squares, teacher), "--method", "dfmsd", "--out", out)
    call(*command)
    shown = capsys.readouterr().out
    assert "test AP" in shown
    result = json.loads((out / "result.json").read_text())
    assert result["teacher"]["test"]["map"] > 10
    page = (out / "report.html").read_text()
    assert 'aria-label="student: ' in page
    assert "masks of DFMSD" in page
    header = (out / "metrics.csv").read_text().splitlines()[0]
    for column in ("train/detector", "train/dfmsd", "train/box_reg", "val/map", "val/map_50"):
        assert column in header
    before = load_file(out / "student.safetensors")
    call(*command)
    after = load_file(out / "student.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    call("evaluate", out)
    values = json.loads(capsys.readouterr().out)
    assert values["map"] == pytest.approx(result["best"]["test"]["map"])
    assert values["samples"] == 12
    call("evaluate", out, "--split", "val")
    assert json.loads(capsys.readouterr().out)["map"] == pytest.approx(result["best"]["val"]["map"])
    call(
        *("evaluate", "--data", f"coco:{squares}", "--model", "fasterrcnn/tiny4", "--image-size", "64"),
        *("--weights", out / "student.safetensors"),
    )
    assert json.loads(capsys.readouterr().out)["per_class"] == values["per_class"]


REAL_TIME = json.dumps({"num_denoising": 10, **HUB["rt_detr"]})


@pytest.mark.slow
@pytest.mark.parametrize("student", ["retinanet/tiny4", "fcos/tiny4", "ssd/tiny4", "hf/rt_detr"])
def test_students_learn_features_and_logits_of_a_teacher_of_another_family(squares, teacher, tmp_path, student, capsys):
    own = ("--set", f"student.kwargs={REAL_TIME}") if student.startswith("hf/") else ()
    for method in ("pkd", "kd"):
        command = ("distill", *settings(squares, teacher, student, 1), "--method", method, *own)
        call(*command, "--out", tmp_path / method, "--set", "detection.boxes=giou")
        assert "student" in capsys.readouterr().out
        header = (tmp_path / method / "metrics.csv").read_text().splitlines()[0]
        assert f"train/{method}" in header
        assert "train/boxes" in header
        assert 'aria-label="student: ' in (tmp_path / method / "report.html").read_text()
    call("evaluate", tmp_path / "kd")
    values = json.loads(capsys.readouterr().out)
    result = json.loads((tmp_path / "kd" / "result.json").read_text())
    assert values["map"] == pytest.approx(result["best"]["test"]["map"])


@pytest.mark.slow
def test_a_set_prediction_teacher_is_trained_first_and_teaches(squares, tmp_path, capsys):
    command = ("distill", *settings(squares, epochs=1), "--teacher", "hf/rt_detr", "--teacher-epochs", "1")
    out = tmp_path / "run"
    call(*command, "--set", f"teacher.kwargs={REAL_TIME}", "--method", "kd", "--out", out)
    assert json.loads((out / "result.json").read_text())["teacher"]["name"] == "hf/rt_detr"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(squares, teacher, tmp_path, monkeypatch):
    command = ("distill", *settings(squares, teacher), "--method", "pcd", "--set", PCD, "--set", "train.ema=0.5")
    command = (*command, "--set", "train.checkpoint_seconds=0")
    call(*command, "--out", tmp_path / "whole")
    calm = Trainer.save_if_due

    def die(self):
        calm(self)
        if self.step == 8:  # in the second epoch
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "save_if_due", die)
    with pytest.raises(RuntimeError, match="killed"):
        call(*command, "--out", tmp_path / "cut")
    monkeypatch.undo()
    call(*command, "--out", tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(squares, teacher, tmp_path, capsys):
    """Every process sees its share of the images; AP is of them all, and each image counts once."""
    out = tmp_path / "on-2"
    command = ("distill", *settings(squares, teacher), "--device", "cpu", "--set", PCD, "--out", out)
    finished(program(*command, processes=2))
    result = json.loads((out / "result.json").read_text())
    alone = json.loads((teacher / "result.json").read_text())["best"]
    for split in ("val", "test"):
        assert alone[split]["map"] > 30
        for key, value in alone[split].items():
            assert result["teacher"][split][key] == pytest.approx(value, abs=0.01), (split, key)
    call("evaluate", out)
    assert json.loads(capsys.readouterr().out)["map"] == pytest.approx(result["best"]["test"]["map"], abs=0.1)


@pytest.mark.slow
def test_compare_prints_ap_and_draws_every_method(squares, tmp_path, capsys):
    out = tmp_path / "comparison"
    call(
        *("compare", *settings(squares, epochs=1), "--teacher-epochs", "6", "--methods", "none,kd,fpn-fitnet"),
        *("--seeds", "2", "--out", out),
    )
    table = capsys.readouterr().out
    assert "test AP, best epoch" in table
    for row in ("teacher: fasterrcnn/tiny8", "none", "kd", "fpn-fitnet"):
        assert row in table
    page = (out / "report.html").read_text()
    for name in ("truth", "teacher", "none", "kd", "fpn-fitnet"):
        assert page.count(f'aria-label="{name}: ') == 6
    assert "best/test/map_50" in (out / "results.csv").read_text().splitlines()[0]


WRONG = [
    (["--method", "kd", "--student", "fasterrcnn/tinny"], "unknown backbone"),
    (["--method", "kd", "--student", "fastrcnn/tiny"], 'unknown detector "fastrcnn/tiny"'),
    (
        ["--method", "kd", "--set", "student.kwargs={fpn_chanels: 3}"],
        'no option "fpn_chanels"; did you mean "fpn_channels"',
    ),
    (["--set", "losses=[{method: detector}, {method: at}]"], "at compares features of classifiers"),
    (["--set", "losses=[{method: detector}, {method: ce}]"], "the detector's own losses hold its cross-entropy"),
    (["--set", "losses=[{method: kd}]"], 'a detector needs the term "detector"'),
    (["--set", "losses=[{method: detector}, {method: pcd, stages: 3}]"], "stages"),
    (
        ["--set", "losses=[{method: detector}, {method: mlkd}]"],
        "a term compares two views of each image, which detectors do not have",
    ),
    (["--set", "losses=[{method: detector}, {method: dfmsd, maskin: both}]"], 'no option "maskin"'),
    (["--set", "losses=[{method: detector}, {method: pkd, strides: [64]}]"], "no level of stride 64"),
    (["--set", "detection.topk=3"], 'unknown key "detection.topk"; did you mean "top_k"'),
    (["--method", "kd", "--set", "detection.boxes=l2"], "detection.boxes: input should be 'none', 'l1' or 'giou'"),
    (["--method", "kd", "--student", "fcos/tiny4", "--set", "detection.pairing=anchors"], "have no anchors in common"),
    (["--method", "kd", "--set", "detection.adapters=[nowhere.py:Mine]"], "detection.adapters.0: file nowhere.py does"),
    (["--set", "data.mixup=0.2"], "mixup, cutmix and a second view are for classifiers"),
    (["--method", "kd", "--set", "train.channels_last=true"], "a strided 1x1 convolution of fewer than 16"),
    (["--set", "train.compile=true"], "train.compile is for classifiers"),
    (["--set", "data.augment=rotate"], 'unknown "rotate"'),
    (["--data", "coco:nowhere"], "data folder nowhere does not exist"),
]


OFTEN = [*WRONG[::2], *(pytest.param(*one, marks=pytest.mark.slow) for one in WRONG[1::2])]


@pytest.mark.parametrize(("change", "sentence"), OFTEN, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_wrong_values_are_named_before_anything_is_trained(squares, beginner, tmp_path, capsys, change, sentence):
    out = tmp_path / "run"
    text = error_of(capsys, "distill", *settings(squares, beginner), "--out", out, *change)
    assert sentence in text
    assert not (out / "metrics.csv").exists()


OWN = """
from pcdistill.detection.detectors.build import build_detector

def fails(module, args):
    if module.training:
        raise KeyError("no such thing")

def detector(num_classes):
    model = build_detector("fasterrcnn/tiny4", num_classes=num_classes)
    model.backbone.register_forward_pre_hook(fails)
    return model
"""


def test_a_detector_of_the_users_own_that_cannot_be_trained_is_named_before_the_teacher_is_trained(
    squares, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    student = f"{tmp_path / 'own.py'}:detector"
    text = error_of(capsys, "distill", *settings(squares, student=student), "--out", tmp_path / "run")
    assert "own.py:detector cannot be trained on images [[3, 64, 64], [3, 64, 64]] (KeyError: 'no such thing')" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_cards_code_gives_the_ap_that_was_reported(squares, tmp_path, monkeypatch):
    """Beside pycocotools, in the files' own pixels; images are scaled down in training, which a card must do alike."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    slow = pytest.importorskip("pycocotools.cocoeval").COCOeval
    root, rng = tmp_path / "large", np.random.default_rng(1)
    (root / "images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        tree = json.loads((squares / f"{split}.json").read_text())
        for image in tree["images"]:
            name, wide = image["file_name"], 160 + 40 * (image["id"] % 2)  # two shapes, so that batches are padded
            small = np.asarray(Image.open(squares / "images" / name))
            pixels = small.repeat(4, 0).repeat(4, 1)[:, : wide + 56].astype(int)
            pixels = (
                (pixels + rng.integers(-90, 90, pixels.shape)).clip(0, 255).astype(np.uint8)
            )  # aliases unless smoothed
            Image.fromarray(pixels).save(root / "images" / name)
            image.update(width=pixels.shape[1], height=pixels.shape[0])
        for box in tree["annotations"]:
            box.update(bbox=[4 * v for v in box["bbox"]], area=16 * box["area"])
        sizes = {image["id"]: image["width"] for image in tree["images"]}
        tree["annotations"] = [b for b in tree["annotations"] if sum(b["bbox"][::2]) <= sizes[b["image_id"]]]
        (root / f"{split}.json").write_text(json.dumps(tree))
    out = tmp_path / "run"
    call(
        *("train", "digits-detection", "--data", root, "--model", "fasterrcnn/tiny8", "--epochs", "8", "--quiet"),
        *("--batch-size", "4", "--image-size", "64", "--out", out, "--set", "train.keep=last"),
    )
    result = json.loads((out / "result.json").read_text())["last"]["test"]
    card = (out / "README.md").read_text()
    assert "AP small, medium and large count in pixels of images whose longer side was scaled down to 64" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    truth = coco(root / "test.json")
    found = []
    for image in truth.dataset["images"]:
        known: dict = {}
        exec(code.replace("photo.jpg", str(root / "images" / image["file_name"])), known)
        for box, label, score in zip(
            *(known["found"][key].tolist() for key in ("boxes", "labels", "scores")), strict=True
        ):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            category = list(NAMES)[label - 1]
            found.append({"image_id": image["id"], "category_id": category, "bbox": xywh, "score": score})
    evaluation = slow(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    assert result["map"] > 5
    assert 100 * precision[precision > -1].mean() == pytest.approx(result["map"], abs=0.3)


@pytest.mark.slow
def test_weights_of_other_classes_are_not_evaluated(squares, teacher, tmp_path, capsys):
    with_others = tmp_path / "other"
    with_others.mkdir()
    (with_others / "images").symlink_to(squares / "images")
    orders = {"cyan": {**NAMES, 7: "cyan"}, "turned": {3: "green", 7: "red", 12: "blue"}}
    right = json.loads((teacher / "result.json").read_text())["best"]["test"]["map"]
    for what, names in orders.items():
        for split in ("train", "val", "test"):
            tree = json.loads((squares / f"{split}.json").read_text())
            tree["categories"] = [{"id": k, "name": name} for k, name in names.items()]
            if what == "turned":  # the same boxes under the same names, with other numbers
                turn = {3: 7, 7: 3, 12: 12}
                tree["annotations"] = [{**b, "category_id": turn[b["category_id"]]} for b in tree["annotations"]]
            (with_others / f"{split}.json").write_text(json.dumps(tree))
        command = ("evaluate", teacher, "--data", f"coco:{with_others}")
        if what == "cyan":
            text = error_of(capsys, *command)
            assert "do not know 1 of the 3 classes" in text
            assert "cyan; they know red, green, blue" in text
        else:
            call(*command)
            assert json.loads(capsys.readouterr().out)["map"] == pytest.approx(right, abs=0.01)


def test_every_method_of_a_comparison_is_tried_before_the_first_is_trained(squares, tmp_path, capsys):
    out = tmp_path / "comparison"
    command = ("compare", *settings(squares), "--teacher-epochs", "1", "--seeds", "1", "--out", out, "--methods")
    text = error_of(capsys, *command, "none,kd,at,mlkd,pkd", "--set", "student.kwargs={fpn_channels: 8}")
    assert "at: losses" in text
    assert "; mlkd: losses" in text
    assert not list(out.glob("*/*.csv"))
    assert not (out / "teacher").exists()


@pytest.mark.slow
def test_pcd_cuts_its_stages_to_few_classes_and_says_so(squares, teacher, tmp_path, capsys):
    command = [part for part in settings(squares, teacher, epochs=1) if part not in ("--quiet", "methods={}")]
    del command[command.index("--set")]
    call("distill", *command, "--method", "pcd", "--out", tmp_path / "run")
    told = capsys.readouterr().err
    assert "pcd: S is 2, not 3: logits of 4 classes allow no more" in told
    assert "student fasterrcnn/tiny4: starts from random weights" in told
    assert "teacher fasterrcnn/tiny8: starts from the weights in" in told
    assert "val: 12 images; val.json" in told


@pytest.mark.parametrize("student", ["fasterrcnn/resnet18", "fcos/timm/resnet18", "torchvision/retinanet_resnet50_fpn"])
def test_weights_that_cannot_be_fetched_are_one_sentence(squares, tmp_path, capsys, monkeypatch, student):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    with pytest.raises(SystemExit) as stop:
        call("train", "detection", "--data", f"coco:{squares}", "--model", student, "--out", tmp_path / "run")
    text = capsys.readouterr().err
    assert stop.value.code == 1
    assert "could not be fetched: <urlopen error no network>; without a network" in text
    assert "Traceback" not in text


def test_a_json_that_names_a_missing_file_is_refused(squares, beginner, tmp_path, capsys):
    tree = json.loads((squares / "train.json").read_text())
    tree["images"][5]["file_name"] = "gone.png"
    for name in ("val.json", "test.json", "images"):
        (tmp_path / name).symlink_to(squares / name)
    (tmp_path / "train.json").write_text(json.dumps(tree))
    text = error_of(capsys, "distill", *settings(tmp_path, beginner), "--method", "kd", "--out", tmp_path / "run")
    assert "1 of its 48 images are missing" in text
    assert "gone.png" in text


@pytest.mark.slow
def test_a_teacher_with_other_categories_is_refused_and_one_with_more_is_selected(squares, teacher, tmp_path, capsys):
    weights = load_file(teacher / "student.safetensors")
    other = tmp_path / "other.safetensors"
    metadata = {"format": "pt", "pcdistill": json.dumps({"classes": ["red", "cyan", "blue"]})}
    save_file(weights, other, metadata=metadata)
    run = ("distill", *settings(squares), "--method", "kd", "--teacher-weights", other)
    text = error_of(capsys, *run, "--out", tmp_path / "a")
    assert "the teacher does not know 1 of the data's 3 classes: green" in text
    order = tmp_path / "order.safetensors"  # the same classes, renumbered: matched by name
    renamed = {"format": "pt", "pcdistill": json.dumps({"classes": ["blue", "red", "green"]})}
    save_file(weights, order, metadata=renamed)
    call("distill", *settings(squares, epochs=1), "--method", "kd", "--teacher-weights", order, "--out", tmp_path / "b")
    found = json.loads((tmp_path / "b" / "result.json").read_text())["teacher"]["test"]["per_class"]
    right = json.loads((teacher / "result.json").read_text())["best"]["test"]["per_class"]
    assert max(found.values()) < max(right.values())  # it calls red what it learnt as blue


def test_a_weak_teacher_stops_the_run(squares, tmp_path, capsys):
    torch.manual_seed(0)
    weights = tmp_path / "fresh.safetensors"
    fresh = build_detector("fasterrcnn/tiny8", num_classes=3)
    save_weights(fresh, weights, {"classes": ["red", "green", "blue"]})
    command = ["distill", *settings(squares, epochs=1), "--teacher-weights", weights, "--method", "kd"]
    at = command.index("--allow")
    del command[at : at + 2]
    text = error_of(capsys, *command, "--out", tmp_path / "run")
    assert "the teacher finds next to nothing on held-out images (AP50" in text
    assert "--allow weak-teacher" in text


def test_boxes_are_no_data_for_a_classifier(tmp_path, capsys):
    text = error_of(capsys, "train", "digits", "--data", "digits-detection", "--out", tmp_path / "run", "--quiet")
    assert "digits-detection holds boxes; set task: detection" in text


@pytest.mark.slow
def test_a_detection_loss_on_a_classifier_is_refused(tmp_path, capsys):
    text = error_of(
        *(capsys, "distill", "--data", "digits", "--teacher", "cifar/resnet8", "--student", "cifar/resnet8"),
        *("--teacher-epochs", "1", "--method", "pkd", "--out", tmp_path / "run", "--quiet", "--epochs", "1"),
    )
    assert "detection" in text
