"""Data as batches that are a pure function of seed, epoch and batch number; listing the names needs no torch."""

# Classification data by name -> one line for `pcdistill list`.
DATASETS: dict[str, str] = {
    "digits": "1,797 handwritten digits of 8 x 8, in the package: nothing to download",
    "cifar10": "60,000 images of 32 x 32, 10 classes; downloaded on request",
    "cifar100": "60,000 images of 32 x 32, 100 classes; downloaded on request",
    "imagenet": "a folder with train/ and val/ under the data root, one folder per class",
    "FOLDER": "any folder of class folders, or of train/ and val/ and test/ that hold them",
    "FILE.npz": "arrays x_train, y_train, x_test, y_test and optionally classes",
    "wds:PATTERN": "tar shards of WebDataset, by braces and globs: a path, or a URL that fsspec opens",
    "hf:NAME[:SPLIT]": "a data set of Hugging Face's datasets: of the hub, a folder, parquet files also by URL",
    "digits-detection": "1,800 images of digits with boxes, drawn from them on first use; for detectors",
    "coco:FOLDER": "images with boxes: COCO's json, as COCO, Roboflow, CVAT, Label Studio and FiftyOne write it",
    "voc:FOLDER": "images with boxes: Pascal VOC's xml, as VOC, Roboflow, CVAT and LabelImg write it",
    "yolo:data.yaml": "images with boxes or polygons in YOLO's text files",
    "torchvision/NAME": "a classification data set of torchvision by its class name, such as torchvision/SVHN",
}

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}  # where the number is known before the data is opened
