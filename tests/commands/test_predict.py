"""Predictions on files: what evaluation would say, in every format, and files that cannot be read."""

import csv
import io
import json
import math
import shutil

import pytest
import torch
from PIL import Image

from pcdistill import cli
from pcdistill.commands.predict import Predict, find_files, predict
from pcdistill.commands.student import open_student
from pcdistill.errors import InputError
from tests.commands.folders import NAMES, class_folders, finished_run


def classifier(tmp_path):
    root = class_folders(tmp_path / "Meine Bilder")
    student, data = finished_run(tmp_path / "run", "cifar/resnet8", root, image_size=32)
    return student, data, root


def detector(tmp_path, **options):
    return finished_run(
        tmp_path / "run", "fasterrcnn/tiny", "digits-detection", task="detection", image_size=96, kwargs=options
    )


def drawn_digits(tmp_path, data, count=3):
    """Images of the data as files."""
    folder = tmp_path / "Bilder für heute"
    folder.mkdir()
    for i in range(count):
        pixels, _ = data.val.split.sample(i)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:04d} ä.png")
    return folder


def test_a_classifier_says_of_files_what_evaluation_computes(tmp_path):
    student, data, root = classifier(tmp_path)
    rows = list(csv.DictReader(io.StringIO(predict(tmp_path / "run", [str(root / "val")], Predict(top_k=3)))))
    with torch.no_grad():
        logits = torch.cat([student(batch.images) for batch in data.val.epoch(0)])
    best, labels = logits.softmax(1).sort(dim=1, descending=True)
    assert [row["file"] for row in rows] == [f"{name}/bild {i}.png" for name in NAMES for i in range(4)]
    assert [row["class"] for row in rows] == [data.classes[label] for label in labels[:, 0].tolist()]
    assert [row["class_3"] for row in rows] == [data.classes[label] for label in labels[:, 2].tolist()]
    got = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(got, best[:, 0], rtol=0, atol=1e-4)


def test_json_and_drawn_images(tmp_path):
    _, _, root = classifier(tmp_path)
    files = [str(root / "train" / NAMES[2] / "bild 7.png"), str(root / "test" / NAMES[0])]
    out = tmp_path / "neu" / "answers.json"
    said = predict(tmp_path / "run", files, Predict("json", out=out, draw=tmp_path / "drawn"))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert said == f"written: {out}, 5 images"
    assert [one["file"] for one in found] == ["bild 7.png", *(f"bild {i}.png" for i in range(4))]
    assert all(0 < one["predictions"][0]["probability"] <= 1 for one in found)
    with Image.open(tmp_path / "drawn" / "bild 3.png") as picture:
        assert picture.height > picture.width * 0.5
        assert picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 255, 255)


def test_files_that_cannot_be_read_are_named_at_the_end_and_the_rest_is_predicted(tmp_path, capsys):
    _, _, root = classifier(tmp_path)
    (root / "val" / "birne" / "kaputt.png").write_bytes(b"no picture")
    argv = ["predict", str(tmp_path / "run"), str(root / "val"), str(tmp_path / "gibt es nicht.jpg")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 + 12
    assert "2 of 14 files could not be read" in printed.err
    assert "kaputt.png" in printed.err
    assert "gibt es nicht.jpg" in printed.err


@pytest.mark.slow
def test_a_detectors_boxes_are_those_of_evaluation_in_every_format(tmp_path):
    student, data = detector(tmp_path, box_score_thresh=0.0)
    folder = drawn_digits(tmp_path, data)
    with torch.no_grad():
        wanted = student([data.val.split.sample(0)[0].float() / 255])[0]
    coco = json.loads(predict(tmp_path / "run", [str(folder)], Predict("coco")))
    first = [one for one in coco if one["file_name"] == "0000 ä.png"]
    assert len(first) == len(wanted["boxes"]) > 0
    x0, y0, x1, y1 = wanted["boxes"][0].tolist()
    assert first[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=2e-3)
    ids = open_student(tmp_path / "run").categories
    assert first[0]["category_id"] == ids[int(wanted["labels"][0]) - 1]
    rows = list(csv.DictReader(io.StringIO(predict(tmp_path / "run", [str(folder)], Predict(score=0.0)))))
    assert len(rows) == len(coco)
    assert float(rows[0]["x1"]) == pytest.approx(x1, abs=1e-2)
    out, drawn = tmp_path / "labels", tmp_path / "drawn"
    predict(tmp_path / "run", [str(folder)], Predict("yolo", out=out, draw=drawn, score=0.0))
    lines = (out / "0000 ä.txt").read_text().splitlines()
    label, x, y, width, height, score = lines[0].split()
    assert (out / "classes.txt").read_text().splitlines() == list(data.classes)
    assert int(label) == int(wanted["labels"][0]) - 1
    assert [float(v) * 96 for v in (x, y, width, height)] == pytest.approx(
        [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], abs=1e-3
    )
    assert float(score) == pytest.approx(float(wanted["scores"][0]), abs=1e-5)
    assert len(list(drawn.iterdir())) == 3


@pytest.mark.slow
def test_boxes_are_in_pixels_of_the_file_whatever_the_detector_reads(tmp_path):
    student, data = detector(tmp_path, box_score_thresh=0.0)
    folder = drawn_digits(tmp_path, data, count=1)
    (file,) = folder.iterdir()
    with Image.open(file) as picture:
        picture.resize((960, 480)).save(tmp_path / "000123.png")
    found = json.loads(predict(tmp_path / "run", [str(tmp_path / "000123.png")], Predict("coco")))
    image, size = open_student(tmp_path / "run").read(str(tmp_path / "000123.png"))
    assert (list(image.shape), size) == ([3, 48, 96], (480, 960))
    with torch.no_grad():
        wanted = student([image])[0]["boxes"] * 10
    assert found[0]["image_id"] == 123
    assert found[0]["bbox"][:2] == pytest.approx(wanted[0, :2].tolist(), abs=1e-2)


@pytest.mark.slow
def test_the_datas_own_category_ids_are_written(tmp_path):
    from pcdistill import models

    student, data = detector(tmp_path, box_score_thresh=0.0)
    metadata = models.read_metadata(tmp_path / "run" / "student.safetensors")
    ids = [10 * i + 7 for i in range(len(data.classes))]
    models.save_weights(student, tmp_path / "run" / "student.safetensors", {**metadata, "category_ids": ids})
    folder = drawn_digits(tmp_path, data, count=1)
    found = json.loads(predict(tmp_path / "run", [str(folder)], Predict("coco")))
    assert {one["category_id"] for one in found} <= set(ids)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (Predict("coco"), "--format coco is not for a classifier; take csv or json"),
        (Predict(top_k=0), "--top-k must be 1 or more"),
        (Predict(score=math.nan), "--score must be from 0 to 1, got nan"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, plan, sentence):
    _, _, root = classifier(tmp_path)
    with pytest.raises(InputError, match=sentence):
        predict(tmp_path / "run", [str(root)], plan)


@pytest.mark.slow
def test_formats_of_a_detector(tmp_path):
    detector(tmp_path)
    for plan, sentence in ((Predict("json"), "is not for a detector"), (Predict("yolo"), "name their folder")):
        with pytest.raises(InputError, match=sentence):
            predict(tmp_path / "run", [str(tmp_path)], plan)


def test_folders_are_searched_and_an_empty_one_is_named(tmp_path):
    (tmp_path / "a b" / "ü").mkdir(parents=True)
    with pytest.raises(InputError, match="no image in"):
        find_files([str(tmp_path)])
    for name in ("z.JPG", "ü/a.png", "ü/.hidden.png", "notes.txt"):
        (tmp_path / "a b" / name).write_bytes(b"")
    assert [file.name for file in find_files([str(tmp_path / "a b")])] == ["z.JPG", "ü/a.png"]


@pytest.mark.slow
def test_two_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    _, data = detector(tmp_path)
    folder = drawn_digits(tmp_path, data, count=1)
    shutil.copytree(folder, tmp_path / "b")
    with pytest.raises(InputError, match="would be written under one name"):
        predict(tmp_path / "run", [str(folder), str(tmp_path / "b")], Predict("yolo", out=tmp_path / "labels"))
