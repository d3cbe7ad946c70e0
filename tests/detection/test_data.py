"""Detection data: what follows from (seed, epoch, index) alone, what is mapped or dropped, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill.data.loader import Stream
from pcdistill.detection.data import DetectionBatches, augmented, build_detection_data
from pcdistill.detection.digits import draw_split
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}]


def detection_data(name, *, batch_size=8, seed=0, rank=0, world_size=1, **config):
    """Detection data by name and keys of the recipe's `data`, for one process."""
    config = DataConfig(name, batch_size=batch_size, **{"eval_batch_size": batch_size, **config})
    return build_detection_data(config, Stream(seed, rank, world_size))


def same(a, b):
    assert len(a.images) == len(b.images)
    assert torch.equal(a.index, b.index)
    for x, y in zip(a.images, b.images, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a.targets, b.targets, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder of six images per split, 60 x 40; returns the folder and its trees by split."""
    trees = {}
    (tmp_path / "images").mkdir()
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for i in range(6):
            name = f"{split}{i}.png"
            pixels = np.full((40, 60, 3), 40 * i, dtype=np.uint8)
            pixels[10:20, 5:25] = 255
            Image.fromarray(pixels).save(tmp_path / "images" / name)
            images.append({"id": 10 * i, "file_name": name, "width": 60, "height": 40})
            if i != 5:  # the last image has no box
                box = {"id": i, "image_id": 10 * i, "category_id": 17, "bbox": [5, 10, 20, 10], "iscrowd": 0}
                annotations.append({**box, "area": 150.0})
        trees[split] = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write(tmp_path, trees)
    return tmp_path, trees


def write(folder, trees):
    for split, tree in trees.items():
        (folder / f"{split}.json").write_text(json.dumps(tree))


def refuses(folder, pattern, name="coco:{}"):
    with pytest.raises(InputError, match=pattern) as caught:
        detection_data(name.format(folder), batch_size=2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# digits-detection


@pytest.mark.slow
def test_digits_are_the_same_at_every_build_and_do_not_depend_on_the_seed():
    first, second = (detection_data("digits-detection", batch_size=8, seed=seed) for seed in (0, 1))
    assert first.fingerprint == second.fingerprint
    same(next(first.test.epoch(0)), next(second.test.epoch(3)))
    draw_split.cache_clear()
    again = detection_data("digits-detection", batch_size=8)
    assert again.fingerprint == first.fingerprint
    assert (first.train.num_samples, first.val.num_samples, first.test.num_samples) == (1200, 200, 400)
    assert first.classes == tuple("0123456789")


def test_digits_have_tight_boxes_inside_the_image_and_some_images_have_none():
    pixels, boxes, digits = draw_split("val", 96)
    assert pixels.shape == (200, 3, 96, 96)
    assert pixels.dtype == torch.uint8
    assert 0 < sum(len(b) == 0 for b in boxes) < 30
    every = np.concatenate(boxes)
    assert every.min() >= 0
    assert every.max() <= 96
    assert (every[:, 2:] - every[:, :2]).min() >= 4
    assert sorted(set(np.concatenate(digits).tolist())) == list(range(10))


@pytest.mark.slow
def test_digits_of_another_size():
    data = detection_data("digits-detection", batch_size=4, image_size=64)
    assert next(data.val.epoch(0)).images[0].shape == (3, 64, 64)
    with pytest.raises(InputError, match="image_size must be at least 48"):
        detection_data("digits-detection", image_size=16)


# batches


@pytest.mark.slow
def test_batches_follow_from_seed_epoch_and_index_alone():
    data, again = (detection_data("digits-detection", batch_size=8, limit=40, seed=5) for _ in range(2))
    whole = list(data.train.epoch(2))
    assert len(whole) == len(data.train) == 5
    for a, b in zip(whole[3:], again.train.epoch(2, start=3), strict=True):
        same(a, b)
    other = next(data.train.epoch(3))
    assert not torch.equal(other.index, whole[0].index)
    assert sorted(torch.cat([b.index for b in whole]).tolist()) == list(range(40))


@pytest.mark.slow
def test_two_iterators_of_one_split_do_not_disturb_each_other():
    data = detection_data("digits-detection", batch_size=8, limit=16)
    a, b = data.train.epoch(0), data.train.epoch(1)
    first = next(a)
    next(b)
    same(first, next(data.train.epoch(0)))
    assert not torch.equal(next(a).index, first.index)


@pytest.mark.slow
def test_ranks_share_the_global_batch():
    one = detection_data("digits-detection", batch_size=8, limit=24)
    two = [detection_data("digits-detection", batch_size=8, limit=24, rank=r, world_size=2) for r in (0, 1)]
    for whole, a, b in zip(one.train.epoch(1), *(d.train.epoch(1) for d in two), strict=True):
        assert set(whole.index.tolist()) == set(a.index.tolist()) | set(b.index.tolist())
        assert len(a.index) == len(b.index) == 4
        assert torch.equal(whole.images[0], a.images[0])
        assert torch.equal(whole.images[1], b.images[0])
    seen = [i for d in two for batch in d.test.epoch(0) for i in batch.index.tolist()]
    assert sorted(seen) == list(range(400))
    with pytest.raises(InputError, match="divisible by the 3 processes"):
        detection_data("digits-detection", batch_size=8, world_size=3)


def test_workers_give_the_same_batches(coco):
    folder, _ = coco
    plain, parallel = (detection_data(f"coco:{folder}", batch_size=2, workers=w) for w in (0, 1))
    for a, b in zip(plain.train.epoch(1), parallel.train.epoch(1), strict=True):
        same(a, b)


def test_a_training_set_smaller_than_the_batch_is_one_batch(coco):
    data = detection_data(f"coco:{coco[0]}", batch_size=16, augment="none")
    assert len(data.train) == 1
    assert len(next(data.train.epoch(0)).images) == 6


# augmentation


def test_flip_moves_boxes_with_the_pixels():
    image = torch.zeros(3, 10, 20)
    image[:, 2:5, 3:9] = 1
    target = {"boxes": torch.tensor([[3.0, 2.0, 9.0, 5.0]]), "labels": torch.tensor([1])}
    seen = set()
    for seed in range(20):
        out, new = augmented(image, target, ("flip",), torch.Generator().manual_seed(seed))
        x0, y0, x1, y1 = new["boxes"][0].int().tolist()
        assert out[:, y0:y1, x0:x1].min() == 1
        assert out.sum() == image.sum()
        seen.add(x0)
    assert seen == {3, 11}


def test_crop_keeps_boxes_on_their_pixels_and_inside():
    image = torch.zeros(3, 40, 40)
    image[:, 10:14, 20:28] = 1
    target = {
        "boxes": torch.tensor([[20.0, 10.0, 28.0, 14.0]]),
        "labels": torch.tensor([1]),
        "area": torch.tensor([32.0]),
        "iscrowd": torch.tensor([0]),
        "image_id": torch.tensor([7]),
    }
    sizes, lost = set(), 0
    for seed in range(60):
        out, new = augmented(image, target, ("crop",), torch.Generator().manual_seed(seed))
        sizes.add(tuple(out.shape[1:]))
        assert min(out.shape[1:]) >= 24
        assert len({len(new[key]) for key in ("boxes", "labels", "area", "iscrowd")}) == 1
        assert new["image_id"].tolist() == [7]
        if len(new["boxes"]) == 0:
            lost += 1
            continue
        x0, y0, x1, y1 = new["boxes"][0].int().tolist()
        assert out[:, y0:y1, x0:x1].min() == 1
        assert out.sum() == 3 * (y1 - y0) * (x1 - x0)
    assert len(sizes) > 10
    assert 0 < lost < 20


def test_photometric_changes_pixels_only():
    image = torch.rand(3, 8, 8)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    out, new = augmented(image, target, ("photometric",), torch.Generator().manual_seed(0))
    assert not torch.equal(out, image)
    assert 0 <= out.min() <= out.max() <= 1
    assert new["boxes"].shape == (0, 4)


def test_unknown_augmentation_is_named(coco):
    with pytest.raises(InputError, match='unknown "filp"; did you mean "flip"'):
        detection_data(f"coco:{coco[0]}", augment="filp")


# COCO


def test_coco_boxes_ids_and_empty_images(coco):
    data = detection_data(f"coco:{coco[0]}", batch_size=6)
    assert data.classes == ("cat", "dog")
    batch = next(data.val.epoch(0))
    assert batch.targets[0]["boxes"].tolist() == [[5.0, 10.0, 25.0, 20.0]]
    assert batch.targets[0]["labels"].tolist() == [2]  # ids 3 and 17 become 1 and 2
    assert batch.targets[0]["area"].tolist() == [150.0]
    assert batch.targets[2]["image_id"].tolist() == [20]
    assert batch.targets[5]["boxes"].shape == (0, 4)
    assert batch.images[0][:, 10:20, 5:25].min() == 1
    assert batch.images[0].shape == (3, 40, 60)


def test_image_size_scales_images_and_boxes(coco):
    data = detection_data(str(coco[0]), batch_size=6, image_size=30)
    batch = next(data.val.epoch(0))
    assert batch.images[0].shape == (3, 20, 30)
    assert batch.targets[0]["boxes"].tolist() == [[2.5, 5.0, 12.5, 10.0]]
    assert batch.targets[0]["area"].tolist() == [37.5]


def test_bad_boxes_are_clipped_or_dropped_with_their_number(coco):
    folder, trees = coco
    base = {"image_id": 0, "category_id": 3, "iscrowd": 0}
    boxes = [[50, 30, 30, 30], [5, 5, 0, 10], [70, 5, 5, 5], [-9, -9, 4, 4], [5, 5, -4, 4], [float("nan"), 1, 2, 2]]
    trees["val"]["annotations"] += [{**base, "id": 100 + i, "bbox": box, "area": 1} for i, box in enumerate(boxes)]
    write(folder, trees)
    with pytest.warns(UserWarning, match="left out 5 boxes without area"):
        data = detection_data(f"coco:{folder}", batch_size=6)
    target = next(data.val.epoch(0)).targets[0]
    assert target["boxes"].tolist() == [[5.0, 10.0, 25.0, 20.0], [50.0, 30.0, 60.0, 40.0]]


def test_crowd_boxes_are_kept_for_evaluation_and_left_out_of_training(coco):
    folder, trees = coco
    for split in ("train", "val"):
        crowd = {"id": 99, "image_id": 0, "category_id": 3, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 1}
        trees[split]["annotations"].append(crowd)
    write(folder, trees)
    data = detection_data(f"coco:{folder}", batch_size=6, augment="none")
    assert next(data.val.epoch(0)).targets[0]["iscrowd"].tolist() == [0, 1]
    train = next(data.train.epoch(0))
    assert sum(len(t["boxes"]) for t in train.targets) == 5
    assert all(len(t["iscrowd"]) == len(t["labels"]) == len(t["boxes"]) for t in train.targets)


def test_missing_splits_are_taken_from_training_without_overlap(coco):
    folder, _ = coco
    (folder / "test.json").unlink()
    data = detection_data(f"coco:{folder}", batch_size=2, val_fraction=0.34)
    assert (data.train.num_samples, data.val.num_samples, data.test.num_samples) == (4, 2, 6)
    (folder / "val.json").unlink()
    first, second = (detection_data(f"coco:{folder}", batch_size=2, val_fraction=0.2, seed=s) for s in (0, 9))
    assert first.fingerprint == second.fingerprint
    splits = (first.train, first.val, first.test)
    names = [record.path.name for split in splits for record in split.split.records]
    assert sorted(names) == [f"train{i}.png" for i in range(6)]
    with pytest.raises(InputError, match="too few"):
        detection_data(f"coco:{folder}", batch_size=2, val_fraction=0.9)


def test_other_coco_layouts(coco, tmp_path):
    folder, trees = coco
    official = tmp_path / "official"
    (official / "annotations").mkdir(parents=True)
    (folder / "images").rename(official / "train2017")
    (official / "annotations" / "instances_train2017.json").write_text(json.dumps(trees["train"]))
    assert detection_data(str(official), batch_size=2).train.num_samples > 0
    exported = tmp_path / "exported"
    (exported).mkdir()
    (official / "train2017").rename(exported / "train")
    (exported / "train" / "_annotations.coco.json").write_text(json.dumps(trees["train"]))
    assert detection_data(str(exported), batch_size=2).train.num_samples > 0


def test_what_is_wrong_with_a_coco_folder_is_said_in_one_sentence(coco):
    folder, trees = coco
    good = json.dumps(trees)

    def changed(change):
        new = json.loads(good)
        change(new["train"])
        write(folder, new)

    changed(lambda t: t["images"][1].update(file_name="gone.png"))
    assert "1 of its 6 images are missing" in refuses(folder, "gone.png")
    changed(lambda t: t["annotations"][2].update(category_id=5))
    refuses(folder, r"annotation 2 names category_id 5, which is not among the categories \(3, 17\)")
    changed(lambda t: t["annotations"][2].update(image_id=5))
    refuses(folder, "annotation 2 names image_id 5")
    changed(lambda t: t["annotations"][0].update(bbox=[1, 2, 3]))
    refuses(folder, "annotation 0 must have image_id, category_id and bbox")
    changed(lambda t: t["annotations"][0].pop("bbox"))
    refuses(folder, "annotation 0 must have")
    changed(lambda t: t["images"][0].update(width=61))
    refuses(folder, "train0.png is 60 x 40 pixels, its annotation says 61 x 40")
    changed(lambda t: t.pop("categories"))
    refuses(folder, "not in COCO format: it has no categories")
    changed(lambda t: t["images"][0].pop("id"))
    refuses(folder, r"images\[0\].id must be a whole number or text, got None")
    changed(lambda t: t["images"][1].update(id=0))
    refuses(folder, "image id 0 occurs twice")
    changed(lambda t: t["categories"].append({"id": 17, "name": "cow"}))
    refuses(folder, "category id 17 occurs twice")
    changed(lambda t: t["categories"].append({"id": 18, "name": "dog"}))
    refuses(folder, "category name 'dog' occurs twice")
    changed(lambda t: t["categories"].append({"id": 20, "name": "cow"}))
    refuses(folder, "the categories of val differ from those of train: cow")
    changed(lambda t: t.update(annotations=[]))
    refuses(folder, "no training image has a usable box")
    changed(lambda t: t.update(images=[], annotations=[]))
    refuses(folder, "lists no images")
    write(folder, trees)
    (folder / "train.json").write_text(good[:100])
    refuses(folder, "train.json is not valid JSON: EOF while parsing")
    (folder / "train.json").unlink()
    refuses(folder, "no training split, only val, test")
    write(folder, trees)
    (folder / "images" / "val3.png").write_bytes(b"no image")
    refuses(folder, "val3.png cannot be read as an image")


def test_names_that_are_no_data():
    with pytest.raises(InputError, match='unknown detection data "digits-detektion"; did you mean "digits-detection"'):
        detection_data("digits-detektion")
    with pytest.raises(InputError, match="does not exist"):
        detection_data("coco:/no/such/folder")


def test_a_folder_without_annotations_is_refused(tmp_path):
    refuses(tmp_path, "holds no detection set: found neither train.json", "{}")
    assert "ImageSets" in refuses(tmp_path, "holds no detection set", "voc:{}")


# VOC

XML = """<annotation><filename>{name}</filename><size><width>50</width><height>30</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>50</xmax><ymax>30</ymax></bndbox></object></annotation>"""


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        stems = [f"{split}{i}" for i in range(count)]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            Image.new("RGB", (50, 30)).save(folder / "JPEGImages" / f"{stem}.jpg")
            (folder / "Annotations" / f"{stem}.xml").write_text(XML.format(name=f"{stem}.jpg"))
    return tmp_path, folder


def test_voc_boxes_classes_and_difficult_objects(voc):
    data = detection_data(str(voc[0]), batch_size=2, val_fraction=0.25, augment="none")
    assert data.classes == ("cat", "dog")
    assert (data.train.num_samples, data.val.num_samples, data.test.num_samples) == (3, 1, 2)
    target = next(data.test.epoch(0)).targets[0]
    assert target["boxes"].tolist() == [[0.0, 0.0, 10.0, 20.0], [20.0, 10.0, 50.0, 30.0]]
    assert target["labels"].tolist() == [2, 1]
    assert target["iscrowd"].tolist() == [0, 1]
    assert next(data.train.epoch(0)).targets[0]["labels"].tolist() == [2]


def test_what_is_wrong_with_a_voc_folder_is_said_in_one_sentence(voc):
    root, folder = voc
    xml = folder / "Annotations" / "train1.xml"
    good = xml.read_text()
    xml.write_text(good[:90])
    refuses(root, "train1.xml: not a VOC annotation", "voc:{}")
    xml.write_text(good.replace("<xmax>10</xmax>", ""))
    refuses(root, "<bndbox/xmax> is missing", "voc:{}")
    xml.unlink()
    refuses(root, "the image list names train1, but", "voc:{}")
    xml.write_text(good)
    (folder / "JPEGImages" / "train1.jpg").unlink()
    assert re.search("1 of its 4 images are missing", refuses(root, "train1.jpg", "voc:{}"))


def test_an_image_that_breaks_later_is_named(coco):
    folder, _ = coco
    data = detection_data(f"coco:{folder}", batch_size=2)
    assert isinstance(data.train, DetectionBatches)
    (folder / "images" / "val0.png").write_bytes((folder / "images" / "val0.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"the image .*val0.png cannot be read"):
        next(data.val.epoch(0))


# splits without boxes, and those that are made of others


def without_boxes(coco, split):
    folder, trees = coco
    write(folder, {split: {**trees[split], "annotations": []}})
    return folder


def test_a_split_without_boxes_is_refused_before_training(coco):
    text = refuses(without_boxes(coco, "val"), "none of the 6 images")
    assert "of the validation split (val.json) has a box to choose the best epoch by" in text
    refuses(without_boxes(coco, "train"), "no training image has a usable box")


@pytest.mark.parametrize("with_boxes", range(6))
def test_what_is_set_aside_has_boxes(coco, with_boxes):
    folder, trees = coco
    for split in ("val", "test"):
        (folder / f"{split}.json").unlink()
    box = {**trees["train"]["annotations"][0], "image_id": 10 * with_boxes}
    more = {**box, "id": 77, "image_id": 10 * ((with_boxes + 1) % 6)}
    third = {**box, "id": 78, "image_id": 10 * ((with_boxes + 3) % 6)}
    write(folder, {"train": {**trees["train"], "annotations": [box, more, third]}})
    data = detection_data(f"coco:{folder}", batch_size=2)
    splits = [batches.split.records for batches in (data.train, data.val, data.test)]
    assert [sum(len(record.boxes) for record in records) for records in splits] == [1, 1, 1]
    assert len({record.image_id for records in splits for record in records}) == 6


def test_a_test_split_without_boxes_is_left_out_and_said_so(coco):
    folder = without_boxes(coco, "test")
    with pytest.warns(UserWarning, match=r"the test split \(test.json\) has no boxes to measure anything by"):
        data = detection_data(f"coco:{folder}", batch_size=2)
    assert data.origins["test"] == "the validation split (val.json), as there is no test split"
    assert "of the training images, set aside" in data.origins["val"]
