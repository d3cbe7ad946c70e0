"""answers.npz: agrees with the evaluation, names files, and takes loaders as they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pcdistill.classification.answers import write_answers
from pcdistill.classification.data import build_data
from pcdistill.classification.metrics import evaluate
from pcdistill.data.loader import Stream
from pcdistill.data.passed import LoaderBatches
from pcdistill.engine.placement import make_accelerator, make_placement
from pcdistill.recipe import DataConfig, TrainConfig
from pcdistill.report.answers import read_answers
from tests.commands.folders import class_folders


def place():
    config = TrainConfig(device="cpu")
    return make_placement(config, make_accelerator(config))


def flat(channels, size, classes, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(channels * size**2), nn.Linear(channels * size**2, classes)
    ).train()


@pytest.mark.parametrize("rank", [0, 1])
def test_answers_are_those_that_the_evaluation_counts_whatever_the_process(tmp_path, rank):
    data = build_data(DataConfig("digits", limit=100), Stream(rank=rank, world_size=2))
    whole = build_data(DataConfig("digits", limit=100), Stream())
    student, teacher = (flat(1, data.image_size, 10, seed) for seed in (0, 1))
    write_answers(tmp_path, student, teacher, data, place())
    found = read_answers(tmp_path)
    assert student.training
    assert teacher.training
    for model, answer in ((student, found.student), (teacher, found.teacher)):
        counted = evaluate(model, whole.test.epoch(0), place())
        assert 100 * (answer == found.target).mean() == pytest.approx(counted["top1"])
        assert len(found) == counted["samples"]
    assert found.classes == [str(i) for i in range(10)]
    assert found.split == "test"
    for row, name, pixels in found.thumbs:
        image = next(iter(whole.test.epoch(0))).images[row] if row < 64 else None
        assert found.student[row] != found.target[row] == found.teacher[row]
        assert name == ""
        if image is not None:
            shown = (255 * (image * whole.std[0] + whole.mean[0])).round().clamp(0, 255).byte()[0].numpy()
            assert np.abs(pixels[..., 0].astype(int) - shown).max() <= 1


def test_images_of_files_have_their_names_and_writing_again_gives_the_same_bytes(tmp_path):
    root = class_folders(tmp_path / "bilder mit ü")
    data = build_data(DataConfig(str(root), image_size=16, workers=0), Stream())
    student = flat(3, 16, 3, 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_answers(tmp_path / name, student, None, data, place())
    found = read_answers(tmp_path / "a")
    assert found.teacher is None
    assert found.thumbs
    for row, name, pixels in found.thumbs:
        assert name.split("/")[0] == found.classes[found.target[row]]
        assert pixels.shape == (16, 16, 3)
    assert (tmp_path / "a" / "answers.npz").read_bytes() == (tmp_path / "b" / "answers.npz").read_bytes()


def test_loaders_of_a_user_with_images_that_have_no_label(tmp_path):
    torch.manual_seed(0)
    target = torch.tensor([0, 1, -100, 2, 1, 0, 2])
    loader = DataLoader(TensorDataset(torch.randn(7, 3, 8, 8), target), batch_size=3)
    data = SimpleNamespace(classes=["x", "y", "z"], val=LoaderBatches(loader), test=None)
    write_answers(tmp_path, flat(3, 8, 3, 0), None, data, place())
    found = read_answers(tmp_path)
    assert found.target.tolist() == [0, 1, 2, 1, 0, 2]
    assert found.split == "val"
