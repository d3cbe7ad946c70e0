"""`pcdistill check-data`: what it says of sound and of doubtful data, of both tasks; its page and its JSON."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from pcdistill.cli import main
from pcdistill.commands.check_data import check_data, default_page, task_for
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig
from tests.detection import exports


def check(name, task=None, samples=6, **config):
    return check_data(DataConfig(name, **config), task, samples)


@pytest.fixture
def folders(tmp_path):
    """Class folders with one picture in train and in test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "test" / "dog" / "again.png").write_bytes((tmp_path / "train" / "dog" / "3.png").read_bytes())
    return tmp_path


def test_a_detection_set_is_counted_split_by_split(tmp_path):
    found = check(exports.coco_official(tmp_path))
    train, val, test = found.splits
    assert (train.name, train.images, train.counts, train.empty) == ("train", 4, {"cat": 2, "dog": 2}, 1)
    assert (val.images, val.counts, test.counts) == (2, {"cat": 1, "dog": 1}, {"cat": 1, "dog": 0})
    assert train.origin == "annotations/instances_train2017.json"
    assert found.warnings == ["test (annotations/instances_test2017.json): no box has the class dog"]
    assert not found.repaired
    assert not found.left_out


def test_what_reading_repaired_and_left_out_is_said(tmp_path):
    found = check(exports.coco_roboflow(tmp_path), val_fraction=0.25)
    assert any("'animals'" in text for text in found.left_out)
    assert "25% of the training images, set aside" in {split.name: split.origin for split in found.splits}["val"]
    found = check(exports.coco_gaps(tmp_path / "gaps"))
    assert any("images without width and height" in text for text in found.repaired)


def test_one_image_in_two_splits_is_found_by_its_contents(tmp_path, folders):
    name = exports.yolo_ultralytics(tmp_path / "yolo")
    images = tmp_path / "yolo" / "set" / "images"
    (images / "test" / "seven.jpg").write_bytes((images / "train" / "one.jpg").read_bytes())
    (warning,) = [text for text in check(name).warnings if "are in" in text]
    assert warning.startswith("1 images are in train and in test")
    (warning,) = [text for text in check(str(folders), val_fraction=0.2).warnings if "are in" in text]
    assert "are in train and in test" in warning or "are in val and in test" in warning
    assert "again.png" in warning


def test_one_image_in_two_splits_of_an_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    labels = np.arange(24) % 2
    test = np.concatenate([images[3:4], 255 - images[:4]])
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=test, y_test=labels[:5])
    found = check(str(tmp_path / "d.npz"))
    assert sum("in test, the first is" in text for text in found.warnings) == 1
    assert (found.task, found.format, [split.images for split in found.splits]) == (
        "classification",
        "arrays",
        [22, 2, 5],
    )


def test_classes_with_few_images_and_a_lacking_test_split_are_told(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=np.arange(24) % 4 // 3)
    first, second = check(str(tmp_path / "d.npz")).warnings
    assert "there is no test split" in first
    assert second == "classes with fewer than 10 training images: 1 (5)"


def test_a_set_too_small_for_splits_is_still_looked_at(tmp_path):
    exports.pictures(tmp_path, {"one": []})
    exports.write_xml(tmp_path / "one.xml", exports.SETS["train"]["one"])
    found = check(f"voc:{tmp_path / 'one.xml'}")
    assert [split.name for split in found.splits] == ["train"]
    assert "too few to set" in found.warnings[-1]


def test_what_a_training_refuses_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check(f"coco:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="--samples must be 0 or more"):
        check("digits", samples=-1)
    with pytest.raises(SystemExit) as caught:
        main(["check-data", f"yolo:{tmp_path / 'data.yaml'}"])
    assert caught.value.code == 2


def test_pictures_are_decoded_as_a_training_decodes_them(tmp_path):
    """A damaged one, one beyond Pillow's limit, 32-bit numbers, and arrays that are not square: its own sentences."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            grey = np.full((16, 16), 20000 * (name == "dog"), np.uint16)
            Image.fromarray(grey).save(tmp_path / "data" / name / f"{i}.png")
    dogs = [one for one in check(str(tmp_path / "data")).samples if one.label == "dog"]
    for one in dogs:  # 16 bits: not white, as in Pillow's own conversion
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.picture))))
        assert abs(shown.astype(float) - (20000 >> 8)).max() < 4
    whole = (tmp_path / "data" / "dog" / "0.png").read_bytes()
    damaged = tmp_path / "data" / "dog" / "0.png"
    ppm = b"P6 20000 20000 255 " + bytes(30)
    float32 = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(float32, "TIFF")
    for content, says in (
        (whole[:41], "cannot be read"),
        (ppm, "exceeds limit"),
        (float32.getvalue(), "black and white of its 32-bit numbers are not known"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(InputError, match=rf"the image .*0\.png cannot be read.*{says}|{says}") as caught:
            check(str(tmp_path / "data"), samples=100)
        assert "\n" not in str(caught.value)
    arrays = {"x_train": np.zeros((8, 6, 8, 3), np.uint8), "y_train": np.arange(8) % 2}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="the images are 6 x 8; give data.image_size"):
        check(str(tmp_path / "a.npz"))


def test_an_upright_picture_is_turned_once(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            exif = Image.Exif()
            exif[274] = 6
            Image.new("RGB", (40, 20)).save(tmp_path / name / f"{i}.jpg", exif=exif)
    assert {one.size for one in check(str(tmp_path)).samples} == {(160, 320)}


@pytest.mark.parametrize("export", exports.EXPORTS, ids=str)
def test_the_task_is_seen_without_being_named(export, tmp_path):
    assert task_for(exports.EXPORTS[export](tmp_path)) == "detection"
    assert task_for(str(tmp_path)) == "detection" or export in ("voc_labelimg_beside", "yolo_ultralytics")


def test_classification_is_what_is_left(folders):
    assert task_for(str(folders)) == task_for("digits") == task_for("x.npz") == "classification"
    assert task_for("digits-detection") == "detection"


class Loads(html.parser.HTMLParser):
    """Everything that a page would load, and its tags."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href") and not value.startswith("data:image/")]


def test_the_page_has_boxes_loads_nothing_and_escapes_names(tmp_path, capsys):
    tree = exports.coco_tree(exports.everything())
    tree["categories"][0]["name"] = "<script>alert(1)</script>"
    exports.pictures(tmp_path / "images", exports.everything())
    exports.write_json(tmp_path / "train.json", tree)
    page = tmp_path / "out" / "page.html"
    main(["check-data", f"coco:{tmp_path}", "--out", str(page), "--val-fraction", "0.2"])
    text = page.read_text()
    assert f"written: {page}" in capsys.readouterr().out
    seen = Loads()
    seen.feed(text)
    assert not seen.loads
    assert "script" not in seen.tags
    assert seen.tags.count("image") >= 6
    assert seen.tags.count("rect") >= 6
    assert "http" not in text


def test_json_has_everything_but_the_pictures(tmp_path, capsys):
    page = tmp_path / "page.html"
    main(["check-data", exports.voc_cvat(tmp_path), "--json", "--out", str(page), "--samples", "3"])
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(page)
    assert (found["task"], found["format"], found["classes"]) == ("detection", "VOC", ["cat", "dog"])
    assert {split["name"] for split in found["splits"]} == {"train", "val", "test"}
    assert found["repaired"]
    assert "samples" not in found


def test_classification_page_shows_classes(folders):
    main(["check-data", str(folders), "--out", str(folders / "page.html"), "--val-fraction", "0.2"])
    seen = Loads()
    seen.feed((folders / "page.html").read_text())
    assert seen.tags.count("image") == 4 + 3 + 4  # validation has no more than three
    assert not seen.loads


def test_the_page_has_a_name_of_the_data():
    assert default_page("coco:/a/b c").name == "check-data-coco-a-b-c.html"
    assert default_page("///").name == "check-data-data.html"


def test_a_page_without_samples(tmp_path):
    assert check(exports.coco_official(tmp_path), samples=0).samples == []
    assert check("digits", samples=0).samples == []
    assert len(check("digits", samples=4).samples) == 6  # as many of every split
