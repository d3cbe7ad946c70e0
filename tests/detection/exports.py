"""One small detection set, written by hand in the shapes that annotation tools export."""

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 32
CLASSES = ("cat", "dog")
Box = tuple[str, int, int, int, int]  # class, x0, y0, x1, y1: edges in pixels
SETS: dict[str, dict[str, list[Box]]] = {
    "train": {
        "one": [("cat", 4, 2, 20, 12), ("dog", 32, 8, 64, 32)],
        "two 2": [("dog", 8, 4, 40, 28)],
        "three": [],
        "four": [("cat", 2, 16, 10, 30)],
    },
    "val": {"five": [("dog", 1, 1, 33, 31)], "six": [("cat", 16, 8, 48, 24)]},
    "test": {"seven": [("cat", 24, 4, 56, 20)]},
}
TRUTH = {stem: sorted(boxes) for images in SETS.values() for stem, boxes in images.items()}


def picture(path: Path, boxes: list[Box]) -> None:
    """An image with its boxes in white on grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
    for _, x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 255
    Image.fromarray(pixels).save(path)


def coco_tree(
    images: dict[str, list[Box]],
    *,
    name: Callable[[str], str] = "{}.jpg".format,
    categories: list[dict] | None = None,
    **more,
) -> dict:
    """A COCO tree; `more` are keys of every annotation, None to leave one out."""
    categories = categories or [{"id": k, "name": c, "supercategory": None} for k, c in enumerate(CLASSES, start=1)]
    id_of = {entry["name"]: entry["id"] for entry in categories}
    tree: dict = {"info": {}, "images": [], "annotations": [], "categories": categories}
    for i, (stem, boxes) in enumerate(images.items()):
        tree["images"].append({"id": i, "file_name": name(stem), "width": WIDTH, "height": HEIGHT})
        for label, x0, y0, x1, y1 in boxes:
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "segmentation": []}
            number = len(tree["annotations"])
            entry = {"id": number, "image_id": i, "category_id": id_of[label], **box, **more}
            tree["annotations"].append({key: value for key, value in entry.items() if value != "absent"})
    return tree


def write_json(path: Path, tree: dict, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding=encoding)


def pictures(folder: Path, images: dict[str, list[Box]], end: str = ".jpg") -> None:
    for stem, boxes in images.items():
        picture(folder / f"{stem}{end}", boxes)


def everything() -> dict[str, list[Box]]:
    return {stem: boxes for images in SETS.values() for stem, boxes in images.items()}


# COCO


def coco_official(root: Path) -> str:
    for split, images in SETS.items():
        pictures(root / f"{split}2017", images)
        write_json(root / "annotations" / f"instances_{split}2017.json", coco_tree(images))
        write_json(root / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})
    return f"coco:{root}"


def coco_roboflow(root: Path) -> str:
    """A root category of id 0, and a test split without images."""
    categories = [{"id": 0, "name": "animals", "supercategory": "none"}]
    categories += [{"id": k, "name": c, "supercategory": "animals"} for k, c in enumerate(CLASSES, start=1)]
    for folder, images in (("train", {**SETS["train"], **SETS["test"]}), ("valid", SETS["val"]), ("test", {})):
        pictures(root / folder, images)
        write_json(root / folder / "_annotations.coco.json", coco_tree(images, categories=categories))
    return f"coco:{root}"


def coco_cvat(root: Path) -> str:
    pictures(root / "images" / "default", everything())
    write_json(root / "annotations" / "instances_default.json", coco_tree(everything()))
    return f"coco:{root}"


def coco_cvat_splits(root: Path) -> str:
    for split, images in SETS.items():
        pictures(root / "images" / split, images)
        write_json(root / "annotations" / f"instances_{split}.json", coco_tree(images))
    return f"coco:{root}"


def coco_label_studio(root: Path) -> str:
    categories = [{"id": k, "name": c} for k, c in enumerate(CLASSES)]
    pictures(root / "images", everything())
    write_json(root / "result.json", coco_tree(everything(), name="images/{}.jpg".format, categories=categories))
    return f"coco:{root}"


def coco_label_studio_windows(root: Path) -> str:
    pictures(root / "images", everything())
    write_json(root / "result.json", coco_tree(everything(), name="images\\{}.jpg".format))
    return f"coco:{root}"


def coco_label_studio_encoded(root: Path) -> str:
    pictures(root / "images", everything())
    tree = coco_tree(everything(), name=lambda stem: quote(f"images\\{stem}.jpg"))
    write_json(root / "result.json", tree)
    return f"coco:{root / 'result.json'}"


def coco_fiftyone(root: Path) -> str:
    pictures(root / "data", everything())
    write_json(root / "labels.json", coco_tree(everything(), iscrowd="absent", segmentation="absent"))
    return f"coco:{root}"


def coco_one_file(root: Path) -> str:
    pictures(root / "images", everything())
    write_json(root / "annotations" / "mine.json", coco_tree(everything()))
    return f"coco:{root / 'annotations' / 'mine.json'}"


def coco_text_ids(root: Path) -> str:
    """Ids as text, of images, annotations and categories; a byte-order mark."""
    tree = coco_tree(everything())
    for entry in tree["images"]:
        entry["id"] = f"image-{entry['id']}"
    for entry in tree["annotations"]:
        entry.update(image_id=f"image-{entry['image_id']}", category_id=str(entry["category_id"]), id=f"a{entry['id']}")
    for entry in tree["categories"]:
        entry["id"] = str(entry["id"])
    pictures(root / "images", everything())
    write_json(root / "train.json", tree, encoding="utf-8-sig")
    return f"coco:{root}"


def coco_huge_ids(root: Path) -> str:
    tree = coco_tree(everything())
    for entry in tree["images"]:
        entry["id"] += 2**70
    for entry in tree["annotations"]:
        entry["image_id"] += 2**70
    pictures(root / "images", everything())
    write_json(root / "train.json", tree, encoding="utf-16")
    return f"coco:{root}"


def coco_gaps(root: Path) -> str:
    """Width, height, area and iscrowd null or missing; polygons without boxes."""
    tree = coco_tree(everything(), area=None, iscrowd=None)
    for i, entry in enumerate(tree["images"]):
        entry.pop("width")
        entry.update(height=None) if i % 2 else entry.pop("height")
    for i, entry in enumerate(tree["annotations"]):
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y], [x + w, y + h, x, y + h, x, y]]
        if i % 2:
            entry["bbox"] = [[], None][i % 4 // 2]
        else:
            entry.pop("bbox")
            entry.pop("area")
            entry.pop("iscrowd")
    pictures(root / "images", everything())
    write_json(root / "train.json", tree)
    return f"coco:{root}"


# VOC


def xml_text(
    boxes: list[Box],
    *,
    filename: str = "",
    path: str = "",
    size: bool = True,
    first: int = 1,
    decimal: bool = False,
    **more,
) -> str:
    """A VOC xml: corners count from `first`; `more` are texts of every object."""
    width, height = (WIDTH, HEIGHT) if size else (0, 0)
    lines = ["<annotation>", f"<filename>{filename}</filename>" if filename else ""]
    lines += [f"<path>{path}</path>" if path else ""]
    lines += [f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for label, x0, y0, x1, y1 in boxes:
        corners = {"xmin": x0 + first, "ymin": y0 + first, "xmax": x1, "ymax": y1}
        if decimal:
            corners = {key: float(value) for key, value in corners.items()}
        texts = "".join(f"<{key}>{value}</{key}>" for key, value in {"name": label, **more}.items())
        inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        lines.append(f"<object>{texts}<bndbox>{inside}</bndbox></object>")
    return "\n".join([*lines, "</annotation>"])


def write_xml(file: Path, boxes: list[Box], **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(xml_text(boxes, **options))


def write_list(path: Path, names) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def voc_official(root: Path) -> str:
    """train, val, trainval and test, with a class's own lists."""
    folder = root / "VOCdevkit" / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    for split, images in SETS.items():
        pictures(folder / "JPEGImages", images)
        write_list(lists / f"{split}.txt", images)
        write_list(lists / f"cat_{split}.txt", [f"{stem} -1" for stem in images])
        for stem, boxes in images.items():
            write_xml(folder / "Annotations" / f"{stem}.xml", boxes, filename=f"{stem}.jpg", difficult=0)
    write_list(lists / "trainval.txt", [*SETS["train"], *SETS["val"]])
    return f"voc:{root}"


def voc_trainval(root: Path) -> str:
    """trainval and test alone."""
    voc_official(root)
    lists = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    (lists / "train.txt").unlink()
    (lists / "val.txt").unlink()
    return f"voc:{root}"


def voc_cvat(root: Path) -> str:
    """As CVAT 2 and Datumaro 1.13 write it: edges as decimals, and no xml for an image without boxes."""
    pictures(root / "JPEGImages", everything())
    write_list(root / "ImageSets" / "Main" / "default.txt", everything())
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\ncat:250,50,83::\ndog:50,50,250::\n")
    for stem, boxes in everything().items():
        more = {"filename": f"{stem}.jpg", "first": 0, "decimal": True, "difficult": 0, "occluded": 0}
        if boxes:
            write_xml(root / "Annotations" / f"{stem}.xml", boxes, **more)
    return f"voc:{root}"


def voc_edges(root: Path) -> str:
    """Corners that count from 0, which a box at the edge shows."""
    voc_cvat(root)
    for stem, boxes in everything().items():
        write_xml(root / "Annotations" / f"{stem}.xml", boxes, filename=f"{stem}.jpg", first=0)
    edge = [("cat", 0, 0, 8, 8)]
    write_xml(root / "Annotations" / "edge.xml", edge, filename="edge.jpg", first=0)
    picture(root / "JPEGImages" / "edge.jpg", edge)
    write_list(root / "ImageSets" / "Main" / "default.txt", [*everything(), "edge"])
    return f"voc:{root}"


def voc_roboflow(root: Path) -> str:
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        pictures(root / folder, SETS[split])
        for stem, boxes in SETS[split].items():
            name = f"{stem}.jpg"
            write_xml(root / folder / f"{stem}.xml", boxes, filename=name, path=name, truncated=0, difficult=0)
    return f"voc:{root}"


def voc_labelimg(root: Path) -> str:
    """No lists, names without extension, Windows paths, size 0, `difficult` as text."""
    pictures(root / "images", everything())
    for stem, boxes in everything().items():
        path = f"C:\\Users\\me\\{stem}.jpg"
        options = {"filename": stem, "path": path, "size": False, "difficult": "Unspecified"}
        write_xml(root / "Annotations" / f"{stem}.xml", boxes, **options)
    return f"voc:{root}"


def voc_labelimg_beside(root: Path) -> str:
    pictures(root, everything(), end=".JPG")
    for stem, boxes in everything().items():
        write_xml(root / f"{stem}.xml", boxes, filename=f"D:\\pictures\\{stem}.jpg", difficult="False")
    return f"voc:{root}"


# YOLO


def yolo_line(box: Box, form: str = "box") -> str:
    label, x0, y0, x1, y1 = box
    k = CLASSES.index(label)
    if form == "polygon":
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        return " ".join([str(k), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)])
    values = ((x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT)
    return " ".join([str(k), *map(str, values)])


def write_labels(folder: Path, images: dict[str, list[Box]], form: str = "box") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, boxes in images.items():
        (folder / f"{stem}.txt").write_text("\n".join(yolo_line(box, form) for box in boxes))


def yolo_roboflow(root: Path) -> str:
    """Folders that begin with ../ though they lie beside the file; polygons; no test folder."""
    for folder, images in (("train", {**SETS["train"], **SETS["test"]}), ("valid", SETS["val"])):
        pictures(root / folder / "images", images)
        write_labels(root / folder / "labels", images, "polygon")
    places = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (root / "data.yaml").write_text(f"{places}nc: 2\nnames: ['cat', 'dog']\nroboflow:\n  version: 1\n")
    return f"yolo:{root / 'data.yaml'}"


def yolo_ultralytics(root: Path) -> str:
    """`path`, folders in images/ and labels/, names by number."""
    for split, images in SETS.items():
        pictures(root / "set" / "images" / split, images)
        write_labels(root / "set" / "labels" / split, images)
    splits = "train: images/train\nval: images/val\ntest: images/test\n"
    (root / "coco8.yaml").write_text(f"path: set\n{splits}names:\n  0: cat\n  1: dog\n")
    return f"yolo:{root / 'coco8.yaml'}"


def yolo_lists(root: Path) -> str:
    """Text files that list images, and a list of folders; an absolute `path` of another machine."""
    pictures(root / "images" / "train", SETS["train"])
    pictures(root / "images" / "more", SETS["val"])
    pictures(root / "images" / "test", SETS["test"])
    for split, folder in (("train", "train"), ("val", "more"), ("test", "test")):
        write_labels(root / "labels" / folder, SETS[split])
    write_list(root / "train.txt", [f"./images/train/{stem}.jpg" for stem in SETS["train"]])
    write_list(root / "test.txt", [f"images/test/{stem}.jpg" for stem in SETS["test"]])
    tree = "path: /content/datasets/pets\ntrain: train.txt\nval: [images/more]\ntest: test.txt\nnames: [cat, dog]\n"
    (root / "data.yaml").write_text(tree)
    return f"yolo:{root}"


def yolo_label_studio(root: Path) -> str:
    """classes.txt beside images/ and labels/."""
    pictures(root / "images", everything())
    write_labels(root / "labels", everything())
    (root / "classes.txt").write_text("cat\ndog\n")
    write_json(root / "notes.json", {"categories": []})
    return f"yolo:{root}"


EXPORTS = {
    function.__name__: function
    for function in (
        coco_official,
        coco_roboflow,
        coco_cvat,
        coco_cvat_splits,
        coco_label_studio,
        coco_label_studio_windows,
        coco_label_studio_encoded,
        coco_fiftyone,
        coco_one_file,
        coco_text_ids,
        coco_huge_ids,
        coco_gaps,
        voc_official,
        voc_trainval,
        voc_cvat,
        voc_edges,
        voc_roboflow,
        voc_labelimg,
        voc_labelimg_beside,
        yolo_roboflow,
        yolo_ultralytics,
        yolo_lists,
        yolo_label_studio,
    )
}
