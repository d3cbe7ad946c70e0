"""Folding a teacher's batch normalisation: the same logits from fewer modules, or the model itself."""

import pytest
import torch
from torch import nn

from pcdistill.distillation.folding import fold_batchnorm
from pcdistill.models import build_model


def used(model):
    """Statistics and affine parameters as after training, so that folding has something to get wrong."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["cifar/resnet20", "torchvision/resnet18", "timm/mobilenetv3_small_050"])
def test_logits_are_the_same_and_the_model_is_untouched(name):
    torch.manual_seed(0)
    model = used(build_model(name, num_classes=7, in_channels=3, image_size=32))
    images = torch.randn(3, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batchnorm(model, images[:2])
    assert folded is not model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    wanted = model(images)
    torch.testing.assert_close(folded(images), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Branches(nn.Module):
    def __init__(self, *, random=False):
        super().__init__()
        self.conv, self.bn, self.random = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), random

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.random:
            return x.mean((2, 3)) + torch.rand(4)
        return x.mean((2, 3)) if x.sum() > 0 else -x.mean((2, 3))


def test_a_model_that_cannot_be_traced_stays_as_it_is():
    model = used(Branches())
    assert fold_batchnorm(model, torch.randn(2, 3, 8, 8)) is model


def test_a_copy_with_other_logits_is_not_taken():
    model = used(Branches(random=True))
    assert fold_batchnorm(model, torch.randn(2, 3, 8, 8)) is model


def test_a_model_without_batch_normalisation_or_in_training_stays_as_it_is():
    plain, training = nn.Conv2d(3, 4, 3).eval(), Branches()
    assert fold_batchnorm(plain, torch.randn(2, 3, 8, 8)) is plain
    assert fold_batchnorm(training, torch.randn(2, 3, 8, 8)) is training
