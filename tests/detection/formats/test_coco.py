"""COCO files of hostile types and values: read or refused in a sentence that names file and key."""

import json

import pytest
from hypothesis import HealthCheck, given, settings

from pcdistill.detection.formats import read_set
from pcdistill.errors import InputError
from tests.detection import exports
from tests.faults import annotations

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return annotations.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.mark.slow
@FUZZ
@given(data=annotations.coco_files())
def test_a_damaged_file_is_read_or_refused(sound, data):
    place, file = sound
    file.write_bytes(data)
    annotations.outcome(place, "coco")


@pytest.fixture
def tree(tmp_path):
    exports.pictures(tmp_path / "images", exports.SETS["train"])
    return exports.coco_tree(exports.SETS["train"])


def read(folder, tree):
    exports.write_json(folder / "train.json", tree)
    return read_set(folder, "coco")


def texts(found, kind):
    return [note.text for note in found.notes if note.kind == kind]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update(annotations=None), "annotations must be a list, got None"),
        (lambda t: t.update(images={"a": 1}), "images must be a list, got {'a': 1}"),
        (lambda t: t.update(categories=None), "categories must be a list, got None"),
        (lambda t: t["images"].append(None), r"images\[4\] must be an object with keys, got None"),
        (lambda t: t["annotations"].append("x"), "annotation 4 must be an object with keys, got 'x'"),
        (lambda t: t["images"][0].update(id=float("inf")), r"images\[0\].id must be a whole number or text, got inf"),
        (lambda t: t["images"][0].update(id=True), r"images\[0\].id must be a whole number or text, got True"),
        (lambda t: t["images"][0].update(id=0.5), r"images\[0\].id must be a whole number or text, got 0.5"),
        (lambda t: t["images"][0].update(file_name=3), r"images\[0\].file_name must be the name of a file, got 3"),
        (lambda t: t["images"][0].update(width=-64), r"images\[0\]: width and height must be whole numbers .* -64"),
        (lambda t: t["images"][0].update(width=10**400), "width and height must be whole numbers of pixels: 1000"),
        (lambda t: t["images"][1].update(id="0"), "image id '0' occurs twice"),
        (lambda t: t["annotations"][0].update(image_id=None), "annotation 0 must have .*; it has no image_id"),
        (lambda t: t["annotations"][0].update(image_id=[0]), r"annotation 0: image_id must be .*, got \[0\]"),
        (lambda t: t["annotations"][0].update(image_id=10**300), "annotation 0 names image_id 10000"),
        (
            lambda t: t["annotations"][0].update(category_id=float("nan")),
            "0: category_id must be .*, got nan",
        ),
        (lambda t: t["annotations"][0].update(category_id=9), r"category_id 9, which is not .* \(1, 2\)"),
        (lambda t: t["annotations"][0].update(bbox={"x": 1}), r"annotation 0 must have .*; bbox is {'x': 1}"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, "a", 4]), "annotation 0 must have .*; 'a' is no number"),
        (lambda t: t["annotations"][0].update(area=[1]), r"annotation 0 must have .*; \[1\] is no number"),
        (
            lambda t: t["annotations"][0].update(bbox=None, segmentation={"counts": "x", "size": [1, 1]}),
            "annotation 0 must have .*; it has no bbox, and a run-length segmentation",
        ),
        (lambda t: t["categories"][0].update(name=None), r"categories\[0\].name must be text, got None"),
        (
            lambda t: t["categories"][0].update(name="\ud800"),
            "train.json is not valid JSON: unexpected end of hex escape",
        ),
        (lambda t: t["categories"][0].update(name="dog"), "category name 'dog' occurs twice"),
        (lambda t: t["images"][0].update(file_name="http://x/y.jpg"), "it is an address: download the images first"),
    ],
)
def test_hostile_values_are_refused_by_file_and_key(change, sentence, tree, tmp_path):
    change(tree)
    with pytest.raises(InputError, match=sentence) as caught:
        read(tmp_path, tree)
    assert str(tmp_path / "train.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "null", "[]", "9" * 5000, '{"images": ' + "9" * 5000 + "}", "{'a'}"]
)
def test_texts_that_are_no_coco_tree_are_refused(text, tmp_path):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(InputError, match="train.json(: not in COCO format| is not valid JSON)"):
        read_set(tmp_path, "coco")


def test_what_was_repaired_is_said(tmp_path):
    exports.coco_gaps(tmp_path)
    assert len(texts(read_set(tmp_path), "repaired")) == 2  # sizes, and boxes from polygons
    exports.coco_label_studio_windows(tmp_path / "windows")
    assert "7 images were found under another spelling" in texts(read_set(tmp_path / "windows"), "repaired")[0]


def test_what_was_left_out_is_said(tmp_path):
    exports.coco_roboflow(tmp_path)
    left_out = texts(read_set(tmp_path), "left out")
    assert "the category 'animals', without boxes and above all others" in left_out[0]
    assert "the split test (test/_annotations.coco.json), which has no images" in left_out[1]


def test_a_root_category_with_boxes_stays(tmp_path):
    exports.coco_roboflow(tmp_path)
    file = tmp_path / "valid" / "_annotations.coco.json"
    tree = json.loads(file.read_text())
    tree["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(tree))
    assert read_set(tmp_path).classes == ("animals", "cat", "dog")


def test_a_root_category_of_the_same_name_as_its_only_class_is_left_out(tree, tmp_path):
    """As Roboflow writes a project that is called like its class."""
    tree["categories"] = [
        {"id": 0, "name": "cat", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cat"},
    ]
    for entry in tree["annotations"]:
        entry["category_id"] = 1
    found = read(tmp_path, tree)
    assert (found.classes, found.category_ids) == (("cat",), (1,))


def test_categories_in_another_order_are_matched_by_name(tmp_path):
    exports.coco_official(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    categories = [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}]
    file.write_text(json.dumps(exports.coco_tree(exports.SETS["val"], categories=categories)))
    found = read_set(tmp_path)
    assert [record.labels.tolist() for record in found.splits["val"]] == [[2], [1]]


def test_boxes_of_another_kind_are_warned_of(tree, tmp_path):
    for entry in tree["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]
    (warning,) = texts(read(tmp_path, tree), "warning")
    assert "boxes reach beyond their image as [x, y, width, height], and none as [x1, y1, x2, y2]" in warning
    tree = exports.coco_tree(exports.SETS["train"])
    for entry in tree["annotations"]:
        entry["bbox"] = [value / 64 for value in entry["bbox"]]
    (warning,) = texts(read(tmp_path, tree), "warning")
    assert "every box lies within the first pixel" in warning


def test_what_looks_wrong_is_warned_of(tree, tmp_path):
    tree["categories"].append({"id": 3, "name": "cow"})
    tree["annotations"].append(tree["annotations"][0])
    tree["images"].append({**tree["images"][0], "id": 99})
    warnings = " ".join(texts(read(tmp_path, tree), "warning"))
    assert "1 boxes are there twice, with the same class" in warnings
    assert "1 annotations have the id of another one" in warnings
    assert "no box has the class cow" in warnings
    assert "1 files are listed as several images" in warnings


def test_areas_that_are_none_are_replaced(tree, tmp_path):
    for entry, area in zip(tree["annotations"], (0, -4, float("inf"), 1e6), strict=True):
        entry["area"] = area
    found = read(tmp_path, tree)
    assert found.splits["train"][0].area.tolist() == [160.0, 768.0]
    assert "4 boxes without a usable area" in texts(found, "repaired")[0]


def test_files_of_several_years_are_not_mixed(tmp_path):
    exports.coco_official(tmp_path)
    exports.write_json(tmp_path / "annotations" / "instances_train2014.json", {})
    assert "instances_train2017" in read_set(tmp_path).origins["train"]


@pytest.mark.parametrize("name", ["train.txt", "train.xml"])
def test_a_file_of_another_format_is_refused(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="must be a folder or a .json file"):
        read_set(tmp_path / name, "coco")
