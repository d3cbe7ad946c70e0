"""Every shape that tools export is read to the same boxes; ids, names and origins are kept; EXIF turns images."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from pcdistill.detection.data import open_set
from pcdistill.detection.formats import read_set
from pcdistill.detection.formats.images import ImageSize, oriented
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig
from tests.detection import exports
from tests.detection.exports import CLASSES, EXPORTS, TRUTH


def read(name):
    return open_set(DataConfig(name, val_fraction=0.25))


def boxes_of(found):
    """What was read, by the image's name without folders and extension."""
    return {
        record.path.stem: sorted(
            (found.classes[label - 1], *box)
            for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
        )
        for records in found.splits.values()
        for record in records
    }


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_every_export_is_read_to_the_same_boxes(export, tmp_path):
    found = read(EXPORTS[export](tmp_path))
    read_boxes = boxes_of(found)
    read_boxes.pop("edge", None)
    assert read_boxes == TRUTH
    assert found.classes == CLASSES
    assert len(found.category_ids) == len(CLASSES)
    assert set(found.splits) == set(found.origins) == {"train", "val", "test"}
    for records in found.splits.values():
        for record in records:
            assert (record.width, record.height) == (exports.WIDTH, exports.HEIGHT)
            assert record.iscrowd.sum() == 0
            sides = record.boxes[:, 2:] - record.boxes[:, :2]
            assert record.area.tolist() == sides.prod(1).tolist()


@pytest.mark.parametrize(
    "export", ["coco_official", "coco_cvat_splits", "voc_official", "yolo_ultralytics", "yolo_lists"]
)
def test_splits_are_those_of_the_files(export, tmp_path):
    found = read(EXPORTS[export](tmp_path))
    for split, images in exports.SETS.items():
        assert {record.path.stem for record in found.splits[split]} == set(images)
        assert "set aside" not in found.origins[split]
        assert split in found.origins[split]


@pytest.mark.parametrize("export", ["coco_roboflow", "voc_trainval", "yolo_roboflow", "coco_cvat"])
def test_splits_that_are_made_are_said_to_be(export, tmp_path):
    found = read(EXPORTS[export](tmp_path))
    made = [origin for origin in found.origins.values() if "set aside" in origin or "there is no test split" in origin]
    assert len(made) == (1 if export == "voc_trainval" else 2)


def test_the_datas_own_ids_and_names_are_kept(tmp_path):
    found = read(exports.coco_label_studio_windows(tmp_path / "windows"))
    assert {r.name for r in found.splits["train"]} <= {f"images\\{stem}.jpg" for stem in TRUTH}
    found = read(exports.coco_text_ids(tmp_path / "text"))
    assert found.category_ids == ("1", "2")
    assert all(record.own_id.startswith("image-") for record in found.splits["train"])
    found = read(exports.coco_huge_ids(tmp_path / "huge"))
    assert all(record.own_id >= 2**70 > 2**63 > record.image_id for record in found.splits["train"])
    found = read(exports.coco_official(tmp_path / "official"))
    assert [record.own_id for record in found.splits["train"]] == [0, 1, 2, 3]
    assert read(exports.coco_label_studio(tmp_path / "studio")).category_ids == (0, 1)
    assert read(exports.coco_roboflow(tmp_path / "flow")).category_ids == (1, 2)
    found = read(exports.yolo_ultralytics(tmp_path / "yolo"))
    assert (found.category_ids, found.splits["val"][0].name) == ((0, 1), "images/val/five.jpg")
    assert read(exports.voc_cvat(tmp_path / "voc")).category_ids == (1, 2)


@pytest.mark.parametrize("export", ["coco_official", "voc_roboflow", "yolo_label_studio"])
def test_the_format_is_recognised_without_being_named(export, tmp_path):
    name = EXPORTS[export](tmp_path)
    assert boxes_of(read(name.partition(":")[2])) == TRUTH


# EXIF


def turned_set(folder, orientation, *, annotated, boxes):
    """One image stored as EXIF says and seen as 64 x 32, with boxes [x, y, w, h]; `annotated` is the size."""
    seen = np.full((32, 64, 3), 40, dtype=np.uint8)
    seen[4:16, 4:20] = 255
    picture = Image.fromarray(seen)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = picture if undo is None else picture.transpose(undo)
    exif = Image.Exif()
    exif[274] = orientation
    folder.mkdir(parents=True)
    stored.save(folder / "0.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(folder / "0.png")).size == (64, 32)
    tree = {
        "images": [{"id": 0, "file_name": "0.png", "width": annotated[0], "height": annotated[1]}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [{"id": i, "image_id": 0, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
    }
    (folder / "train.json").write_text(json.dumps(tree))
    return read_set(folder).splits["train"][0], read_set(folder).notes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_on_the_image_as_it_is_seen(orientation, tmp_path):
    record, notes = turned_set(tmp_path / "a", orientation, annotated=(64, 32), boxes=[[4, 4, 16, 12]])
    assert (record.width, record.height, record.boxes.tolist()) == (64, 32, [[4, 4, 20, 16]])
    assert not notes


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_stored_size_with_boxes_on_the_seen_image(orientation, tmp_path):
    record, notes = turned_set(tmp_path / "a", orientation, annotated=(32, 64), boxes=[[4, 4, 16, 12]])
    assert (record.width, record.height, record.boxes.tolist()) == (64, 32, [[4, 4, 20, 16]])
    assert "annotated with the size before; the boxes were taken to be on the image as it is seen" in notes[0].text


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_that_fit_the_stored_pixels_alone_are_turned(orientation, tmp_path):
    size = ImageSize((32, 64), (64, 32), orientation)
    on_stored = {5: [4, 4, 12, 16], 6: [4, 44, 12, 16], 7: [16, 44, 12, 16], 8: [16, 4, 12, 16]}[orientation]
    tall = [2, 40, 4, 20]  # reaches to row 60, which the seen image has not
    if orientation in (5, 8):
        tall = [2, 30, 4, 20]
    record, notes = turned_set(tmp_path / "a", orientation, annotated=(32, 64), boxes=[on_stored, tall])
    x, y, w, h = on_stored
    expected = oriented(np.array([[x, y, x + w, y + h]], dtype=float), size)
    assert record.boxes[0].tolist() == expected[0].tolist()
    assert "were turned with them" in notes[0].text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_boxes_is_turning_pixels(orientation):
    stored = np.zeros((24, 40), dtype=np.uint8)
    stored[3:9, 5:21] = 255
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[274] = orientation
    seen = np.array(ImageOps.exif_transpose(picture))
    size = ImageSize((40, 24), (seen.shape[1], seen.shape[0]), orientation)
    x0, y0, x1, y1 = oriented(np.array([[5.0, 3, 21, 9]]), size)[0].astype(int)
    assert seen[y0:y1, x0:x1].min() == 255
    assert (seen == 255).sum() == (y1 - y0) * (x1 - x0)


def test_another_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="is 64 x 32 pixels, its annotation says 63 x 32"):
        turned_set(tmp_path / "a", 6, annotated=(63, 32), boxes=[[4, 4, 16, 12]])
