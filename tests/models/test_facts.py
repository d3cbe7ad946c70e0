"""The size of a model: parameters and operations, by hand and as published."""

import pytest
import torch
from torch import nn

from pcdistill import models


def test_model_info_counts_by_hand_and_leaves_the_modes_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5))
    model[1].eval()
    before = model[1].running_mean.clone()
    assert models.model_info(model, 8) == {"parameters": 112 + 8 + 1285, "macs": 8 * 8 * 4 * 27 + 256 * 5}
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(
    ("name", "size", "million_macs"),  # as the papers and libraries print them
    [("cifar/resnet56", 32, 126), ("cifar/resnet8x4", 32, 177), ("timm/vit_tiny_patch16_224", 224, 1254)],
)
def test_model_info_agrees_with_published_counts(name, size, million_macs):
    with torch.device("meta"):
        info = models.model_info(models.build_model(name, num_classes=100), size)
    assert info["macs"] / 1e6 == pytest.approx(million_macs, rel=0.01)


def test_model_info_counts_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tokens, width, hidden = 16, 8, 16
    model = nn.Sequential(nn.Flatten(2), Transpose(), layer)
    by_hand = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    assert models.model_info(model, 4, in_channels=8)["macs"] == by_hand


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)
