"""Data by name: what is found, how it is split, and one clear sentence for everything that is wrong."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torchvision import datasets

from pcdistill.data.decoding import Window
from pcdistill.data.files import ImageFiles, find_images
from pcdistill.data.sources import open_source, stratified
from pcdistill.errors import InputError
from tests.helpers import data_of


def write_images(folder: Path, count: int, *, size=(12, 10), suffix=".png", seed=0) -> None:
    """Images of noise, named by number."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}{suffix}")


def read_all(path: Path) -> torch.Tensor:
    """A whole image file as it is."""
    (image,) = ImageFiles([str(path)]).read(0, lambda w, h: [Window((0, 0, w, h), (w, h), (0, 0, w, h))])
    return image


def class_folders(root: Path, counts: dict[str, int], **options) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        write_images(root / name, count, seed=number, **options)
    return root


def write_npz(path: Path, n=40, num_classes=4, test=8, shape=(8, 8, 3), **changes) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        "y_train": np.arange(n) % num_classes,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % num_classes,
        "classes": np.array([f"c{i}" for i in range(num_classes)]),
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def pixels(split, data) -> torch.Tensor:
    """All images of a split in [0, 1], as they were before normalisation."""
    mean, std = (torch.tensor(stat).view(-1, 1, 1) for stat in (data.mean, data.std))
    return torch.cat([batch.images for batch in split.epoch(0)]) * std + mean


class TestStratified:
    @given(st.lists(st.integers(0, 5), min_size=6, max_size=120), st.floats(0, 1))
    @settings(max_examples=150, deadline=None)
    def test_draws_the_count_with_every_class_at_its_share(self, labels, fraction):
        labels = torch.tensor(labels)
        sizes = torch.bincount(labels)
        occurring = int((sizes > 0).sum())
        count = occurring + round(fraction * (len(labels) - occurring))
        drawn, others = stratified(labels, count)
        assert len(drawn) == count
        assert torch.cat([drawn, others]).sort().values.tolist() == list(range(len(labels)))
        assert drawn.tolist() == sorted(drawn.tolist())
        taken = torch.bincount(labels[drawn], minlength=len(sizes))
        assert (taken[sizes > 0] >= 1).all()
        ideal = sizes.double() * count / len(labels)
        if (ideal[sizes > 0] >= 1).all():
            assert (taken - ideal).abs().max() < 1

    def test_does_not_depend_on_the_global_seed_and_is_a_mixture(self):
        labels = torch.arange(1000) % 10
        torch.manual_seed(1)
        first, _ = stratified(labels, 100)
        torch.manual_seed(2)
        second, _ = stratified(labels, 100)
        assert torch.equal(first, second)
        assert 300 < first.double().mean() < 700


class TestDigits:
    def test_is_ready_without_a_download(self):
        data = data_of("digits", batch_size=32)
        assert data.classes == list("0123456789")
        assert (data.in_channels, data.image_size) == (1, 8)
        counts = [batches.num_samples for batches in (data.train, data.val, data.test)]
        assert counts == [1294, 144, 359]
        assert sum(counts) == 1797
        batch = next(data.train.epoch(0))
        assert batch.images.shape == (32, 1, 8, 8)

    def test_is_normalised_by_its_training_images(self):
        data = data_of("digits")
        images = torch.cat([batch.images for batch in data.train_eval.epoch(0)])
        assert abs(float(images.mean())) < 1e-4
        assert abs(float(images.std()) - 1) < 1e-3

    @pytest.mark.slow
    def test_is_the_data_of_scikit_learn(self):
        from sklearn.datasets import load_digits

        data = data_of("digits")
        found = torch.cat([pixels(split, data) for split in (data.train_eval, data.val, data.test)])
        ours = sorted((found[:, 0] * 16).round().byte().numpy().tobytes()[i * 64 : i * 64 + 64] for i in range(1797))
        assert ours == sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)


class TestSplits:
    def every_image(self, batches):
        return [image.numpy().tobytes() for batch in batches.epoch(0) for image in batch.images]

    def test_validation_is_taken_from_training_and_shares_nothing_with_it(self, tmp_path):
        data = data_of(str(write_npz(tmp_path / "d.npz")), val_fraction=0.2)
        train, val = self.every_image(data.train_eval), self.every_image(data.val)
        assert (len(train), len(val)) == (32, 8)
        assert not set(train) & set(val)
        labels = torch.cat([batch.target for batch in data.val.epoch(0)])
        assert torch.bincount(labels).tolist() == [2, 2, 2, 2]

    def test_the_split_does_not_change_with_the_seed(self, tmp_path):
        path = str(write_npz(tmp_path / "d.npz"))
        first, second = (data_of(path, seed=seed) for seed in (0, 1))
        assert self.every_image(first.val) == self.every_image(second.val)
        assert first.fingerprint == second.fingerprint
        assert first.train.signature != second.train.signature

    def test_limit_keeps_a_stratified_sample_and_the_same_validation(self, tmp_path):
        path = str(write_npz(tmp_path / "d.npz", n=400))
        full, limited = data_of(path), data_of(path, limit=100)
        assert (limited.train.num_samples, limited.train_eval.num_samples) == (100, 100)
        # As bytes: mean and std are measured on the images that are left.
        bytes_of = [
            [(image * 255).round().byte().numpy().tobytes() for image in pixels(split, data)]
            for split, data in ((full.val, full), (limited.val, limited), (limited.train_eval, limited))
        ]
        assert bytes_of[0] == bytes_of[1]
        assert set(bytes_of[2]) & set(bytes_of[0]) == set()
        labels = torch.cat([batch.target for batch in limited.train_eval.epoch(0)])
        assert torch.bincount(labels).tolist() == [25, 25, 25, 25]
        assert full.fingerprint != limited.fingerprint
        assert data_of(path, limit=10**9).fingerprint == full.fingerprint

    def test_the_index_leads_back_to_the_image_without_augmentation(self, tmp_path):
        data = data_of(str(write_npz(tmp_path / "d.npz")), augment="none", batch_size=8)
        plain = torch.cat([batch.images for batch in data.train_eval.epoch(0)])
        labels = torch.cat([batch.target for batch in data.train_eval.epoch(0)])
        for batch in data.train.epoch(3):
            assert torch.equal(batch.images, plain[batch.index])
            assert torch.equal(batch.target, labels[batch.index])

    def test_two_views_are_a_weak_and_a_strong_one(self, tmp_path):
        path = str(write_npz(tmp_path / "d.npz", shape=(32, 32, 3)))
        one, two = data_of(path, batch_size=16), data_of(path, batch_size=16, views=2)
        weak, strong = next(two.train.epoch(0)).images.chunk(2)
        assert torch.equal(weak, next(one.train.epoch(0)).images)
        assert not torch.equal(weak, strong)

    def test_mixing_gives_soft_targets_in_training_only(self, tmp_path):
        data = data_of(str(write_npz(tmp_path / "d.npz")), batch_size=8, mixup=1.0, cutmix=1.0)
        assert next(data.train.epoch(0)).target.shape == (8, 4)
        assert next(data.train_eval.epoch(0)).target.dtype == torch.int64


class TestNpz:
    def test_colour_and_grey(self, tmp_path):
        data = data_of(str(write_npz(tmp_path / "d.npz")))
        assert (data.in_channels, data.image_size, data.classes) == (3, 8, ["c0", "c1", "c2", "c3"])
        assert data.test.num_samples == 8
        grey = data_of(str(write_npz(tmp_path / "g.npz", shape=(10, 10), num_classes=3, y_test=np.zeros(8, np.uint8))))
        assert (grey.in_channels, grey.image_size) == (1, 10)

    def test_classes_and_test_may_be_missing(self, tmp_path):
        data = data_of(str(write_npz(tmp_path / "d.npz", x_test=None, y_test=None)))
        assert data.test is None
        path = tmp_path / "e.npz"
        with np.load(write_npz(tmp_path / "d.npz")) as found:
            np.savez(path, **{key: found[key] for key in found.files if key != "classes"})
        assert data_of(str(path)).classes == ["0", "1", "2", "3"]

    def test_validation_images_are_used_where_they_are(self, tmp_path):
        path = write_npz(tmp_path / "d.npz", x_val=np.zeros((5, 8, 8, 3), np.uint8), y_val=np.arange(5) % 4)
        data = data_of(str(path))
        assert (data.train.num_samples, data.val.num_samples) == (40, 5)

    def test_images_that_are_not_square_need_a_size(self, tmp_path):
        path = str(write_npz(tmp_path / "d.npz", shape=(8, 6, 3)))
        with pytest.raises(InputError, match=r"images are 8 x 6; give data\.image_size"):
            data_of(path)
        assert next(data_of(path, image_size=7, batch_size=4).train.epoch(0)).images.shape == (4, 3, 7, 7)

    def test_statistics_are_exact(self, tmp_path):
        path = write_npz(tmp_path / "d.npz")
        data = data_of(str(path), val_fraction=0.5)
        images = torch.cat([batch.images for batch in data.train_eval.epoch(0)]).double()
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)

    def test_a_constant_channel_is_no_division_by_zero(self, tmp_path):
        path = write_npz(tmp_path / "d.npz", x_train=np.full((40, 8, 8, 3), 7, np.uint8))
        assert torch.isfinite(next(data_of(str(path)).train.epoch(0)).images).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"y_train": None}, r"must hold y_train; it holds x_train, x_test, y_test, classes"),
            ({"y_test": None}, "must hold y_test"),
            ({"classes": np.array(["a", 1], dtype=object)}, r"classes holds Python objects, .*dtype=str"),
            ({"x_train": np.zeros((40, 8, 8, 3))}, r"x_train must be uint8 \(0 to 255\), got float64"),
            ({"x_train": np.zeros((40, 3, 8, 8), np.uint8)}, r"got \[40, 3, 8, 8\]; move the channels last"),
            ({"x_train": np.zeros((40, 64), np.uint8)}, r"must be \[N, H, W, C\] or \[N, H, W\], got \[40, 64\]"),
            ({"x_test": np.zeros((8, 9, 9, 3), np.uint8)}, "images of x_test must be shaped like those of x_train"),
            ({"y_train": np.arange(39)}, "labels must be 40 whole numbers, got int64 "),
            ({"y_train": np.linspace(0, 3, 40)}, "labels must be 40 whole numbers, got float64"),
            ({"y_train": np.arange(40) % 5}, "labels must be 0 to 3, got 0 to 4"),
            ({"y_test": np.arange(8) - 1}, "labels must be 0 to 3, got -1 to 6"),
            ({"y_train": np.arange(40) % 3}, "no training image has the class c3"),
            ({"classes": np.array(["a", "b", "a", "c"])}, "the class names must be unique"),
            ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "test split has no images"),
        ],
    )
    def test_wrong_content_is_named(self, tmp_path, changes, message):
        with pytest.raises(InputError, match=message):
            data_of(str(write_npz(tmp_path / "d.npz", **changes)))

    def test_one_class_is_too_few(self, tmp_path):
        with pytest.raises(InputError, match="at least 2 classes are needed, got 1"):
            data_of(str(write_npz(tmp_path / "d.npz", num_classes=1)))

    def test_a_file_that_is_none_is_named(self, tmp_path):
        path = tmp_path / "d.npz"
        with pytest.raises(InputError, match=r"the file .*d.npz does not exist"):
            data_of(str(path))
        path.write_bytes(b"PK no archive")
        with pytest.raises(InputError, match=r"d.npz is not a readable .npz file"):
            data_of(str(path))
        path.write_bytes(write_npz(tmp_path / "e.npz").read_bytes()[:3000])
        with pytest.raises(InputError, match=r"d.npz is not a readable .npz file"):
            data_of(str(path))


class TestFolders:
    def test_a_flat_folder_of_classes(self, tmp_path):
        class_folders(tmp_path / "d", {"cat": 12, "dog": 8})
        data = data_of(str(tmp_path / "d"), image_size=16, batch_size=6, val_fraction=0.25)
        assert data.classes == ["cat", "dog"]
        assert (data.train.num_samples, data.val.num_samples, data.test) == (15, 5, None)
        batch = next(data.train.epoch(0))
        assert batch.images.shape == (6, 3, 16, 16)
        assert data_of(str(tmp_path / "d")).image_size == 224

    @pytest.mark.parametrize(
        ("others", "expected"),
        [
            ({}, (18, 2, None)),
            ({"val": 3}, (18, 2, 6)),
            ({"test": 3}, (18, 2, 6)),
            ({"valid": 2, "test": 3}, (20, 4, 6)),
        ],
    )
    def test_train_with_or_without_val_and_test(self, tmp_path, others, expected):
        for split, count in {"train": 10, **others}.items():
            class_folders(tmp_path / split, {"cat": count, "dog": count})
        data = data_of(str(tmp_path), image_size=16)
        test = None if data.test is None else data.test.num_samples
        assert (data.train.num_samples, data.val.num_samples, test) == expected

    def test_a_class_may_be_called_train(self, tmp_path):
        class_folders(tmp_path, {"bus": 8, "car": 8, "train": 8})
        assert data_of(str(tmp_path), batch_size=4, image_size=8).classes == ["bus", "car", "train"]

    def test_imagenet_is_a_folder_under_the_root(self, tmp_path):
        for split in ("train", "val"):
            class_folders(tmp_path / "imagenet" / split, {"n01": 10, "n02": 10})
        for root in (tmp_path, tmp_path / "imagenet"):
            assert data_of("imagenet", root=root).classes == ["n01", "n02"]
        with pytest.raises(InputError, match="imagenet: no folder train/"):
            data_of("imagenet", root=tmp_path / "none")

    def test_files_of_other_kinds_and_hidden_ones_are_passed_over(self, tmp_path):
        class_folders(tmp_path, {"cat": 6, "dog": 6})
        (tmp_path / "cat" / "notes.txt").write_text("x")
        (tmp_path / "cat" / "._0.png").write_text("x")
        (tmp_path / ".cache").mkdir()
        write_images(tmp_path / "dog" / "more", 3, suffix=".JPG")
        data = data_of(str(tmp_path), image_size=8)
        assert data.train.num_samples + data.val.num_samples == 15

    def test_what_is_hidden_or_seen_is_passed_over(self, tmp_path):
        class_folders(tmp_path, {"cat": 4, "dog": 4, "cat/.thumbnails": 4})
        write_images(tmp_path / "elsewhere" / "more", 3)
        (tmp_path / "dog" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
        (tmp_path / "dog" / "linked again").symlink_to(tmp_path / "elsewhere" / "more")
        (tmp_path / "cat" / "self").symlink_to(".")
        (tmp_path / "cat" / "all").symlink_to("..")
        found = {name: len(find_images(tmp_path / name)) for name in ("cat", "dog")}
        assert found == {"cat": 4, "dog": 4 + 3}
        (tmp_path / "kitten").symlink_to("cat")  # a class itself may be a link
        assert len(find_images(tmp_path / "kitten")) == 4

    @pytest.mark.parametrize(
        ("names", "splits"),
        [
            (("Train", "Test"), {"train", "test"}),
            (("Training", "Testing"), {"train", "test"}),
            (("train", "TEST", "Meta"), {"train", "test"}),
            (("TRAIN", "Valid"), {"train", "test"}),
            (("train", "Val", "test"), {"train", "val", "test"}),
            (("training", "notes"), None),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_splits_in_any_case(self, tmp_path, names, splits):
        for name in names:
            class_folders(tmp_path / name, {"cat": 3, "dog": 3})
        source = open_source(str(tmp_path))
        assert source.classes == (sorted(names) if splits is None else ["cat", "dog"])
        assert {name for name in ("train", "val", "test") if getattr(source, name) is not None} == (splits or {"train"})
        assert set(source.origins) == (splits or set())

    def test_splits_that_cannot_be_told_are_refused(self, tmp_path):
        class_folders(tmp_path / "one" / "Test", {"cat": 3, "dog": 3})
        with pytest.raises(InputError, match=r"one holds Test/ and no folder train/ to learn from"):
            open_source(str(tmp_path / "one"))
        for name in ("train", "Train"):
            class_folders(tmp_path / "two" / name, {"cat": 3, "dog": 3})
        with pytest.raises(
            InputError, match=r"two holds Train/ and train/; which of them is the split train\? Keep one"
        ):
            open_source(str(tmp_path / "two"))

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".ppm", ".tif"])
    def test_formats_are_read_as_rgb(self, tmp_path, suffix):
        path = tmp_path / f"image{suffix}"
        Image.new("RGB", (9, 7), (250, 10, 10)).save(path)
        image = read_all(path)
        assert image.shape == (3, 7, 9)
        assert image.dtype == torch.uint8
        assert image[0].min() > 240
        assert image[1:].max() < 30

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
    def test_other_colours_become_rgb(self, tmp_path, mode):
        path = tmp_path / "image.png"
        Image.new(mode, (9, 7)).save(path)
        image = read_all(path)
        assert (tuple(image.shape), image.dtype) == ((3, 7, 9), torch.uint8)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_unreadable_image_is_named(self, tmp_path, workers):
        class_folders(tmp_path, {"cat": 6, "dog": 6})
        for file in (tmp_path / "dog").iterdir():
            file.write_bytes(b"no image")
        data = data_of(str(tmp_path), image_size=8, workers=workers, batch_size=10)
        with pytest.raises(InputError, match=r"the image .*dog.*\.png cannot be read"):
            list(data.train.epoch(0))

    def test_fingerprint_follows_names_and_sizes(self, tmp_path):
        class_folders(tmp_path / "a", {"cat": 6, "dog": 6})
        class_folders(tmp_path / "b", {"cat": 6, "dog": 6})
        first, moved = (data_of(str(tmp_path / name), image_size=8).fingerprint for name in "ab")
        assert first == moved
        (tmp_path / "b" / "dog" / "0.png").write_bytes((tmp_path / "b" / "dog" / "1.png").read_bytes() + b"x")
        assert data_of(str(tmp_path / "b"), image_size=8).fingerprint != first

    def test_wrong_folders_are_named(self, tmp_path):
        with pytest.raises(InputError, match=r"the folder .*none does not exist"):
            data_of(str(tmp_path / "none"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"empty has no class folders"):
            data_of(str(tmp_path / "empty"))
        class_folders(tmp_path / "one", {"cat": 4})
        with pytest.raises(InputError, match="at least 2 classes are needed, got 1"):
            data_of(str(tmp_path / "one"))
        (tmp_path / "one" / "dog").mkdir()
        with pytest.raises(InputError, match=r"the class folder .*dog has no images"):
            data_of(str(tmp_path / "one"))
        (tmp_path / "file.txt").write_text("x")
        with pytest.raises(InputError, match=r"file.txt is a file; it must be a folder of class folders"):
            data_of(str(tmp_path / "file.txt"))

    def test_classes_that_differ_between_splits_are_named(self, tmp_path):
        class_folders(tmp_path / "train", {"cat": 4, "dog": 4})
        class_folders(tmp_path / "val", {"cat": 4, "dig": 4})
        with pytest.raises(InputError, match=r"train/ and val/ differ \(only in train/: dog; only in val/: dig\)"):
            data_of(str(tmp_path))


class TestTorchvision:
    class Coloured(datasets.VisionDataset):
        """A data set as torchvision has them: PIL images of any size, a `split` that it checks."""

        def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
            super().__init__(root)
            if split not in ("train", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split")
            if not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            self.labels = [i % 3 for i in range(30 if split == "train" else 9)]
            self.classes = ["a", "b", "c"]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return Image.new("RGB", (10 + i, 12), (i, 0, 0)), self.labels[i]

    class Arrays(datasets.VisionDataset):
        """One that holds its images in memory, with a `train` switch."""

        shape = (6, 6)

        def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
            super().__init__(root)
            n = 40 if train else 8
            pixels = torch.arange(n, dtype=torch.uint8).view(n, *(1,) * len(self.shape))
            self.data = pixels.expand(n, *self.shape)
            self.targets = torch.arange(n) % 4

        def __len__(self):
            return len(self.targets)

    @pytest.fixture(autouse=True)
    def named(self, monkeypatch):
        for kind in (self.Coloured, self.Arrays):
            monkeypatch.setattr(datasets, kind.__name__, kind, raising=False)
            monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, kind.__name__))

    def test_images_of_any_size(self, tmp_path):
        data = data_of("torchvision/Coloured", root=tmp_path, download=True, image_size=8, batch_size=5)
        assert (data.classes, data.in_channels) == (["a", "b", "c"], 3)
        assert (data.train.num_samples, data.val.num_samples, data.test.num_samples) == (27, 3, 9)
        assert next(data.train.epoch(0)).images.shape == (5, 3, 8, 8)

    @pytest.mark.parametrize(("shape", "channels"), [((6, 6), 1), ((6, 6, 3), 3), ((3, 6, 6), 3)])
    def test_arrays_are_held_in_memory_whatever_their_layout(self, tmp_path, monkeypatch, shape, channels):
        monkeypatch.setattr(self.Arrays, "shape", shape)
        data = data_of("torchvision/Arrays", root=tmp_path, batch_size=5)
        assert (data.in_channels, data.image_size, data.test.num_samples) == (channels, 6, 8)
        images = pixels(data.test, data)
        assert images.shape == (8, channels, 6, 6)
        assert (images.flatten(1) * 255).round().int().unique(dim=1).flatten().tolist() == list(range(8))

    def test_what_is_missing_or_unknown_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"torchvision/Coloured cannot be read .*allow the download"):
            data_of("torchvision/Coloured", root=tmp_path)
        with pytest.raises(InputError, match=r'torchvision has no data set "MNST"; did you mean "[A-Z]*MNIST"'):
            data_of("torchvision/MNST", root=tmp_path)
        with pytest.raises(InputError, match="torchvision/FakeData is not a data set of labelled images"):
            data_of("torchvision/FakeData", root=tmp_path)
        with pytest.raises(InputError, match=r"torchvision/MNIST cannot be read from"):
            data_of("torchvision/MNIST", root=tmp_path)

    def test_cifar_is_read_by_our_own_reader(self, tmp_path):
        with pytest.raises(InputError, match="cifar100 is not in"):
            data_of("torchvision/CIFAR100", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, 'unknown name "digit"; did you mean "digits"'),
        ("cifar1000", {}, 'did you mean "cifar100"'),
        ("zzz", {}, 'unknown name "zzz", and no such folder; known: digits, '),
        ("digits", {"val_fraction": 0.0}, "data.val_fraction must be between 0 and 1, got 0"),
        ("digits", {"val_fraction": 1.0}, "data.val_fraction must be between 0 and 1"),
        ("digits", {"val_fraction": 1e-9}, "too few to hold out a share of 1e-09"),
        ("digits", {"val_fraction": 0.999}, "1438 training images of 10 classes are too few to hold out"),
        ("digits", {"views": 3}, "data.views must be 1 or 2, got 3"),
        ("digits", {"mixup": -1.0}, "data.mixup and data.cutmix must be 0 or more, got -1.0 and 0.0"),
        ("digits", {"batch_size": 0}, "data.batch_size must be 1 or more, got 0"),
        ("digits", {"image_size": 0}, "data.image_size must be 1 or more, got 0"),
        ("digits", {"limit": 9}, "data.limit must be at least the number of classes, 10, got 9"),
        ("digits", {"augment": "crops"}, 'data.augment: unknown "crops"; did you mean "crop"'),
        ("digits", {"eval_batch_size": 0}, "data.eval_batch_size must be 1 or more, got 0"),
        ("digits", {"world_size": 0}, "data.world_size must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        data_of(name, **options)


def test_wrong_workers_are_named(tmp_path):
    class_folders(tmp_path, {"cat": 6, "dog": 6})
    with pytest.raises(InputError, match=r"data\.workers must be 0 or more, got -1"):
        data_of(str(tmp_path), workers=-1)


def test_cifar_has_the_customary_statistics(tmp_path):
    from tests.data.test_download import cifar100_files, lay_out

    files = cifar100_files(train=300, test=20)
    data = data_of("cifar100", root=lay_out(tmp_path, files))
    assert data.mean == (0.5071, 0.4865, 0.4409)
    assert (len(data.classes), data.image_size, data.in_channels) == (100, 32, 3)
    assert (data.train.num_samples, data.val.num_samples, data.test.num_samples) == (270, 30, 20)


def test_names_are_listed_without_torch():
    code = (
        "import sys; from pcdistill.data import DATASETS; sys.exit('torch' in sys.modules or 'digits' not in DATASETS)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2] / "src", check=False).returncode == 0
    )


def saved(path, **arrays):
    sound = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 2}
    np.savez(path, **{**sound, **arrays})
    return str(path)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (
            {"y_train": np.r_[np.arange(39) % 2, 10**9]},
            "y_train: there is a label 1000000000, and 40 images",
        ),
        ({"y_train": np.r_[np.arange(39) % 2, -1]}, "labels must be 0 to 1, got -1 to 1"),
        ({"y_train": np.arange(40) % 2 * 1.0}, "labels must be 40 whole numbers, got float64"),
        ({"y_train": np.array([0, 1] * 19)}, "labels must be 40 whole numbers, got int64 .38."),
        ({"x_train": np.zeros((40, 0, 8), np.uint8)}, "x_train has images without pixels"),
        ({"x_train": np.zeros(40, np.uint8)}, r"must be \[N, H, W, C\] or \[N, H, W\]"),
        ({"x_train": np.zeros((40, 8, 8))}, r"must be uint8 \(0 to 255\), got float64"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "at least 2 classes are needed"),
        ({"classes": np.array([{"a": 1}, None])}, "classes holds Python objects"),
        ({"classes": np.array([0.5, 1.5])}, "classes must be text, got float64"),
        ({"classes": np.array([b"a", b"\xff"])}, "classes must be text in UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arrays_are_refused_in_a_sentence(tmp_path, arrays, says):
    with pytest.raises(InputError, match=says):
        data_of(saved(tmp_path / "a.npz", **arrays), batch_size=4)


def test_byte_names_fortran_order_and_big_endian_labels_work(tmp_path):
    x = np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8)
    plain = open_source(saved(tmp_path / "a.npz", x_train=x))
    other = {"x_train": np.asfortranarray(x), "y_train": (np.arange(40) % 2).astype(">u8"), "classes": [b"a", b"b"]}
    found = open_source(saved(tmp_path / "b.npz", **other))
    assert torch.equal(found.train.images, plain.train.images)
    assert torch.equal(found.train.labels, plain.train.labels)
    assert found.classes == ["a", "b"]


def test_a_file_under_another_name_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    for array, says in ((np.zeros(3), "is one array"), (np.array([{}]), "it is no archive of arrays")):
        with file.open("wb") as out:
            np.save(out, array, allow_pickle=True)
        with pytest.raises(InputError, match=says):
            open_source(str(file))
    saved(tmp_path / "b.npz")
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(InputError, match="it must be a folder of class folders, or an .npz file"):
        open_source(str(tmp_path / "b.npy"))


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/data", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(InputError, match="data: "):
        open_source(name)
