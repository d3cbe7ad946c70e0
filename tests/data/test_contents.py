"""Fingerprints of data: any change of a label, a pixel, a file's name or size is told from what stayed."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from pcdistill.data.contents import dataset_contents, files_fingerprint, fingerprint_of, loader_contents
from tests.helpers import data_of


def write_npz(path, *, label=None, pixel=None, test_label=None, classes=None):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8)
    y_test, x_test = y[:12].copy(), x[:12].copy()
    if label is not None:
        y[label] = (y[label] + 1) % 3
    if pixel is not None:
        x[pixel, 0, 0] ^= 1
    if test_label is not None:
        y_test[test_label] = (y_test[test_label] + 1) % 3
    named = {} if classes is None else {"classes": np.array(classes)}
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test, **named)


def changed(a, b):
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def test_each_kind_of_change_of_arrays_is_told(tmp_path):
    def contents(**change):
        write_npz(tmp_path / "d.npz", **change)
        return dict(data_of(str(tmp_path / "d.npz"), batch_size=8).contents)

    first = contents()
    assert contents() == first
    assert {"data.train.labels"} <= changed(first, contents(label=59))
    assert changed(first, contents(pixel=7)) == {"data.train.images"}
    assert changed(first, contents(test_label=3)) == {"data.test.labels"}
    assert "data.classes" in changed(first, contents(classes=["a", "b", "d"]))


def test_each_kind_of_change_of_a_folder_is_told(tmp_path):
    def make(root):
        for split in ("train", "test"):
            for name in ("a", "b"):
                (root / split / name).mkdir(parents=True)
                for i in range(6):
                    Image.new("RGB", (16, 16), (i, 9, 9)).save(root / split / name / f"{i}.png")
        return root

    def contents(root):
        return dict(data_of(str(root), batch_size=4, image_size=16).contents)

    root = make(tmp_path / "one")
    first = contents(root)
    assert contents(make(tmp_path / "two")) == first  # the same elsewhere
    with open(root / "train" / "a" / "0.png", "ab") as file:
        file.write(b"x")
    assert changed(first, contents(root)) == {"data.train.images"}
    (root / "test" / "a" / "0.png").rename(root / "test" / "b" / "9.png")
    assert changed(first, contents(root)) == {"data.train.images", "data.test.images", "data.test.labels"}


def test_files_are_known_by_name_order_and_size(tmp_path):
    paths = [str(tmp_path / f"{i}.bin") for i in range(5)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(b"abc")
    first = files_fingerprint(paths)
    assert files_fingerprint(list(paths)) == first
    assert files_fingerprint(paths[::-1]) != first
    assert files_fingerprint(paths[:4]) != first
    with open(paths[2], "wb") as file:
        file.write(b"abcd")
    assert files_fingerprint(paths) != first
    assert files_fingerprint([]) != first
    assert files_fingerprint([*paths[:4], str(tmp_path / "gone.bin")]) != first


class Own(Dataset):
    """A user's data set with the usual names."""

    def __init__(self, targets, samples=None, data=None):
        self.targets = targets
        if samples is not None:
            self.samples = samples
        if data is not None:
            self.data = data

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.zeros(1), self.targets[i]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_a_users_labels_are_seen_under_their_usual_names(form):
    first = dataset_contents(Own(form([0, 1, 2])))
    assert dataset_contents(Own(form([0, 1, 2]))) == first
    found = dataset_contents(Own(form([0, 2, 2])))
    assert found["labels"] != first["labels"]
    assert found["images"] == first["images"]


def test_a_users_images_are_seen_as_arrays_files_and_parts():
    first = dataset_contents(Own([0, 1], [("a/x.png", 0), ("a/y.png", 1)]))
    assert dataset_contents(Own([0, 1], [("a/x.png", 0), ("a/z.png", 1)]))["images"] != first["images"]
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    one = Own([0, 1], data=pixels)
    before = dataset_contents(one)
    pixels[1, 0, 0, 0] = 1
    assert dataset_contents(one)["images"] != before["images"]
    tensors = TensorDataset(torch.randn(4, 3), torch.arange(4))
    parts = [dataset_contents(Subset(tensors, which)) for which in ([0, 1], [0, 2], [1, 0])]
    assert len({part["images"] for part in parts}) == 3
    both = dataset_contents(ConcatDataset([tensors, tensors]))
    assert both != dataset_contents(tensors)
    assert both == dataset_contents(ConcatDataset([tensors, tensors]))


def test_loaders_are_known_by_their_data_and_batches():
    x, y = torch.randn(8, 3), torch.arange(8) % 2

    def of(x, y, size=4):
        return loader_contents(DataLoader(TensorDataset(x, y), size, shuffle=True))

    first = of(x, y)
    assert of(x.clone(), y.clone()) == first
    assert changed(first, of(x, 1 - y)) == {"labels"}
    assert changed(first, of(x + 1, y)) == {"images"}
    assert changed(first, of(x, y, 2)) == {"batches"}
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    assert changed(loader_contents(batches), loader_contents([(x[:4], y[:4]), (x[4:], 1 - y[4:])])) == {"labels"}

    class Bare:
        def __len__(self):
            return 3

    assert loader_contents(Bare()).keys() == {"batches"}


def test_the_kind_of_a_part_counts():
    parts = [torch.zeros(4), torch.zeros(2, 2), np.zeros(4), [0, 0], ["0", "0"], ("0",), {"a": 1}, 0, "0", None]
    assert len({fingerprint_of(part) for part in parts}) == len(parts)
    assert fingerprint_of(np.float32(1)) == fingerprint_of(np.float32(1))
    assert fingerprint_of([1, 2**70]) != fingerprint_of([1, 2**70 + 1])
