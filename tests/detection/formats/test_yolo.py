"""YOLO files that are damaged or of another kind, and the ways that tools write them."""

import pytest
from hypothesis import HealthCheck, example, given, settings

from pcdistill.detection.formats import read_set
from pcdistill.detection.formats.yolo import label_file
from pcdistill.errors import InputError
from tests.detection import exports
from tests.faults import annotations

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return annotations.write_yolo(tmp_path_factory.mktemp("yolo"))


@pytest.fixture(scope="module")
def sound_labels(tmp_path_factory):
    return annotations.write_yolo_labels(tmp_path_factory.mktemp("labels"))


@FUZZ
@given(data=annotations.yolo_files())
@example(data=b"path: ~.\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
def test_a_damaged_yaml_is_read_or_refused(sound, data):
    place, file = sound
    file.write_bytes(data)
    annotations.outcome(place, "yolo")


@FUZZ
@given(data=annotations.yolo_labels())
def test_a_damaged_label_file_is_read_or_refused(sound_labels, data):
    place, file = sound_labels
    file.write_bytes(data)
    annotations.outcome(place, "yolo")


def read(folder, yaml="train: images/train\nval: images/val\nnames: [cat, dog]\n", one=None):
    place, file = annotations.write_yolo_labels(folder)
    place.write_text(yaml)
    if one is not None:
        file.write_text(one)
    return read_set(place)


def boxes(found, stem="one"):
    (record,) = [record for record in found.splits["train"] if record.path.stem == stem]
    return record.boxes.tolist()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("2 0.5 0.5 0.1 0.1", r"line 1 names class '2', which is not among the names \(0, 1\)"),
        ("0.5 0.5 0.5 0.1 0.1", "line 1 names class '0.5'"),
        ("cat 0.5 0.5 0.1 0.1", "line 1 must be numbers: class, centre x"),
        ("0 32 16 10 10", "line 1: 32 is no part of an image; YOLO's boxes are divided by width and height"),
        ("0 0.5 0.5 0.1", "line 1 must be a class and 4 numbers, or the points of a polygon; it has 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "it has 6 numbers"),
    ],
)
def test_lines_that_are_no_boxes_are_refused_by_file_and_line(line, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence) as caught:
        read(tmp_path, one=line)
    assert "one.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("", "not a YOLO data file"),
        ("a: [", "not valid YAML"),
        ("[" * 1500, "nested deeper than 40 levels"),
        ("train: images/train\n", "names must be a list of classes or number: class, got None"),
        ("train: images/train\nnames: {a: b}\n", "names: 'a' must be the number of a class"),
        ("train: images/train\nnames: [cat, cat]\n", "the class 'cat' occurs twice in names"),
        ("train: images/train\nnames: [[cat]]\n", r"names: 0 must be text, got \['cat'\]"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3\n", "nc is '3', and names has 2 classes"),
        ("train: images/none\nnames: [cat, dog]\n", "train: 'images/none' is neither a folder nor a list of images"),
        ("train: {a: b}\nnames: [cat, dog]\n", "train must be a folder, a list of folders or a .txt file"),
        ("val: images/val\nnames: [cat, dog]\n", "has no training split, only val"),
        (
            "train: images/train\nnames: &a [cat, *a]\n",
            r"line 2: not valid YAML: \*a stands within itself",
        ),
    ],
)
def test_yaml_that_is_no_data_file_is_refused(yaml, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence) as caught:
        read(tmp_path, yaml)
    assert "data.yaml" in str(caught.value)


def test_no_object_is_made_from_yaml(tmp_path):
    marker = tmp_path / "made"
    with pytest.raises(InputError):
        read(tmp_path, f"train: images/train\nnames: !!python/object/apply:pathlib.Path.touch [{marker}]\nnc: 2\n")
    assert not marker.exists()


def test_names_are_text_as_written(tmp_path):
    assert read(tmp_path, "train: images/train\nnames: [no, 1.0]\n").classes == ("no", "1.0")


def test_names_by_number_may_have_gaps(tmp_path):
    found = read(tmp_path, "train: images/train\nnames: {7: dog, 0: cat, 1: cow}\n")
    assert (found.classes, found.category_ids) == (("cat", "cow", "dog"), (0, 1, 7))


def test_boxes_over_the_edge_are_cut_and_empty_ones_left_out(tmp_path):
    found = read(tmp_path, one="0 0.0 0.5 0.5 0.5\n1 0.5 0.5 0 0.1\n1 nan 0.5 0.1 0.1\n\n")
    assert boxes(found) == [[0, 8, 16, 24]]
    assert "left out 2 boxes" in " ".join(note.text for note in found.notes)


def test_keypoints_stand_behind_the_box(tmp_path):
    yaml = "train: images/train\nnames: [cat, dog]\nkpt_shape: [1, 3]\n"
    for stem in exports.SETS["train"]:
        exports.picture(tmp_path / "images" / "train" / f"{stem}.jpg", [])
    assert boxes(read(tmp_path, yaml, one="0 0.5 0.5 0.5 0.5 0.1 0.1 2")) == [[16, 8, 48, 24]]


def test_a_split_without_any_label_file_is_refused(tmp_path):
    place, _ = annotations.write_yolo_labels(tmp_path)
    (tmp_path / "labels" / "train").rename(tmp_path / "labels" / "else")
    with pytest.raises(InputError, match="none of the 4 images of train has a label file; looked in .*labels/train"):
        read_set(place)
    (tmp_path / "labels" / "else").rename(tmp_path / "labels" / "train")
    (tmp_path / "labels" / "train" / "three.txt").unlink()
    (note,) = read_set(place).notes
    assert "1 of 4 images of train have no label file" in note.text


def test_labels_lie_in_labels_for_images(tmp_path):
    assert (
        label_file(tmp_path / "images" / "a" / "images" / "x.y.jpg") == tmp_path / "images" / "a" / "labels" / "x.y.txt"
    )
    assert label_file(tmp_path / "x.jpg") == tmp_path / "x.txt"
