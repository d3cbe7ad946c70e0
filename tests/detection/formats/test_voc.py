"""VOC files that are damaged or meant to harm, and the ways that tools write them."""

import pytest
from hypothesis import HealthCheck, given, settings

from pcdistill.detection.formats import read_set
from pcdistill.errors import InputError
from tests.detection import exports
from tests.faults import annotations

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
BOMB = (
    """<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>"""
)
OUTSIDE = """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return annotations.write_voc(tmp_path_factory.mktemp("voc"))


@pytest.mark.slow
@FUZZ
@given(data=annotations.voc_files())
def test_a_damaged_file_is_read_or_refused(sound, data):
    place, file = sound
    file.write_bytes(data)
    annotations.outcome(place, "voc")


def one(folder, text):
    exports.pictures(folder, {"one": []})
    (folder / "one.xml").write_text(text)
    return read_set(folder / "one.xml")


@pytest.mark.parametrize("text", [BOMB, OUTSIDE], ids=["entities", "a file"])
def test_document_types_are_refused(text, tmp_path):
    with pytest.raises(InputError, match="one.xml: not a VOC annotation: it declares a document type"):
        one(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("<name>cat</name>", "", "<name> is missing"),
        ("<name>cat</name>", "<name> </name>", "object 0: <name> must be text"),
        ("<xmin>5</xmin>", "<xmin>left</xmin>", "'left' is no number"),
        ("<width>64</width>", "<width>-64</width>", "'-64' is no number of pixels"),
        ("<width>64</width>", "<width>65</width>", "is 64 x 32 pixels, its annotation says 65 x 32"),
    ],
)
def test_hostile_values_are_refused_by_file(old, new, sentence, tmp_path):
    text = exports.xml_text(exports.SETS["train"]["one"])
    assert old in text
    with pytest.raises(InputError, match=sentence) as caught:
        one(tmp_path, text.replace(old, new))
    assert "one.xml" in str(caught.value)


def test_a_single_file_is_a_set_of_one_image(tmp_path):
    found = one(tmp_path, exports.xml_text(exports.SETS["train"]["one"]))
    assert found.splits["train"][0].boxes.tolist() == [[4, 2, 20, 12], [32, 8, 64, 32]]
    assert found.origins == {"train": "one.xml"}


@pytest.mark.parametrize("text", ["<html/>", "<svg xmlns='http://www.w3.org/2000/svg'><g/></svg>"])
def test_another_kind_of_xml_is_refused(text, tmp_path):
    with pytest.raises(InputError, match=r"one.xml: not a VOC annotation: it begins with <(html|svg)>, not with <ann"):
        one(tmp_path, text)


def test_a_namespace_changes_nothing(tmp_path):
    text = exports.xml_text(exports.SETS["train"]["one"])
    assert "<annotation>" in text
    found = one(tmp_path, text.replace("<annotation>", '<annotation xmlns="http://example.org/voc">'))
    assert found.splits["train"][0].boxes.tolist() == [[4, 2, 20, 12], [32, 8, 64, 32]]


def test_a_hidden_file_beside_is_passed_over(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "._one.xml").write_bytes(b"\0\5\x16\7")
    exports.pictures(tmp_path / "JPEGImages", {"one": []})
    exports.write_xml(tmp_path / "Annotations" / "one.xml", exports.SETS["train"]["one"])
    assert len(read_set(tmp_path).splits["train"]) == 1


def test_an_image_that_is_listed_twice_counts_once(tmp_path):
    exports.voc_official(tmp_path)
    listing = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "train.txt"
    names = listing.read_text().splitlines()
    listing.write_text("\n".join([*names, names[0], f"{names[0]}.jpg"]))
    assert [record.path.stem for record in read_set(tmp_path).splits["train"]] == names


@pytest.mark.parametrize(("text", "crowd"), [("1", 1), ("True", 1), ("0", 0), ("Unspecified", 0), ("", 0)])
def test_difficult_as_number_or_text(text, crowd, tmp_path):
    found = one(tmp_path, exports.xml_text([("cat", 4, 2, 20, 12)], difficult=text))
    assert found.splits["train"][0].iscrowd.tolist() == [crowd]


def test_the_image_of_the_files_own_name_counts(tmp_path):
    exports.pictures(tmp_path, {"two": []})
    found = one(tmp_path, exports.xml_text([("cat", 4, 2, 20, 12)], filename="two.jpg"))
    assert found.splits["train"][0].name == "one.jpg"
    assert "name another image than the one of their own name" in " ".join(note.text for note in found.notes)


def test_a_list_without_train_is_trainval_less_val(tmp_path):
    exports.voc_official(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "train.txt").unlink()
    found = read_set(tmp_path)
    assert {record.path.stem for record in found.splits["train"]} == set(exports.SETS["train"])


def test_a_listed_image_without_xml_is_empty_for_cvat_and_refused_elsewhere(tmp_path):
    exports.voc_cvat(tmp_path / "cvat")
    assert "1 images have no xml file" in " ".join(note.text for note in read_set(tmp_path / "cvat").notes)
    exports.voc_official(tmp_path / "voc")
    (tmp_path / "voc" / "VOCdevkit" / "VOC2007" / "Annotations" / "three.xml").unlink()
    with pytest.raises(InputError, match="the image list names three, but"):
        read_set(tmp_path / "voc")
