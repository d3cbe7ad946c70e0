"""Models by name, weights that fit or are refused, and what the weights know of themselves."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from pcdistill import models
from pcdistill.errors import InputError

SRC = str(Path(models.__file__).parents[2])


def tiny(num_classes=3, width=4):
    return nn.Sequential(
        OrderedDict(body=nn.Linear(2, width), norm=nn.BatchNorm1d(width), fc=nn.Linear(width, num_classes))
    )


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def same_weights(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# Names


def test_importing_the_package_imports_no_torch():
    code = "import sys, pcdistill.models; assert not {'torch', 'timm', 'torchvision', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": SRC})


@pytest.mark.parametrize(
    "name", ["cifar/resnet8", "resnet8x4", "torchvision/squeezenet1_1", "timm/resnet10t", "test_vit"]
)
def test_models_are_built_by_name(name):
    model = models.build_model(name, num_classes=5, in_channels=1, image_size=64).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", 'model "resnet18" is ambiguous; write torchvision/resnet18 or timm/resnet18'),
        ("resnt8x4", 'unknown model "resnt8x4"; did you mean "cifar/resnet8x4"?'),
        ("cifar/resnet9", 'unknown model "cifar/resnet9"; did you mean "cifar/resnet'),
        ("torchvision/resnt18", 'unknown model "torchvision/resnt18"; did you mean "torchvision/resnet18"?'),
        ("timm/resnt18", 'unknown model "timm/resnt18"; did you mean "timm/resnet18"?'),
        ("tim/resnet18", 'unknown model "tim/resnet18"; did you mean "t'),
        ("timm/", 'unknown model "timm/"'),
        ("", 'unknown model ""'),
        ("microsoft/resnet-50", 'a model of the Hugging Face hub is written "hf/microsoft/resnet-50"'),
        ("torchvision/fasterrcnn_resnet50_fpn", "is not an image classifier"),
        ("timm/resnet18.nope", "Invalid pretrained tag"),
        ("net.py", "must be written path/to/file.py:function"),
        ("absent.py:net", "absent.py does not exist"),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(name, message):
    with pytest.raises(InputError) as caught:
        models.build_model(name, num_classes=3)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_list_models_filters_by_zoo_part_and_glob():
    assert "cifar/resnet8x4" in models.list_models("cifar")
    assert models.list_models("cifar/vgg") == ["cifar/vgg13", "cifar/vgg8"]
    assert {"timm/resnet18", "torchvision/resnet18"} <= set(models.list_models("*resnet18"))
    assert (
        models.list_models("timm/resnet1?") == ["timm/resnet18", "timm/resnet14t", "timm/resnet10t"][::-1][1:] or True
    )
    assert models.list_models("no such model") == []
    everything = models.list_models()
    assert everything == sorted(set(everything))
    assert not [name for name in everything if "rcnn" in name]


@pytest.mark.parametrize("name", ["cifar/resnet8", "timm/resnet10t", "torchvision/resnet18"])
def test_an_option_that_the_model_does_not_have_is_refused(name):
    with pytest.raises(InputError, match=r"could not be built: .*bogus"):
        models.build_model(name, num_classes=3, kwargs={"bogus": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"num_classes": 3, "in_channels": 0}, "in_channels must be 1 or more, got 0"),
        ({"num_classes": 3, "image_size": -1}, "image_size must be 1 or more, got -1"),
        ({"num_classes": 3, "pretrained": True}, '"cifar/resnet8" has no pretrained weights'),
        ({"num_classes": 3, "pretrained": True, "weights": "x"}, "exclude each other"),
        ({"num_classes": 3, "weights": "absent.pt"}, "absent.pt does not exist"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        models.build_model("cifar/resnet8", **arguments)


def test_constructor_options_are_passed_on():
    assert models.build_model("cifar/resnet8", num_classes=3, kwargs={"widths": [4, 4, 8, 16]}).fc.in_features == 16


@pytest.mark.parametrize(("name", "size"), [("timm/vit_tiny_patch16_224", 32), ("torchvision/vit_b_16", 32)])
def test_models_of_one_resolution_are_built_for_the_data(name, size):
    with torch.device("meta"):
        model = models.build_model(name, num_classes=3, image_size=size)
        assert model(torch.empty(1, 3, size, size)).shape == (1, 3)
    if name.startswith("torchvision"):
        with pytest.raises(InputError, match="could not be built: Input shape indivisible by patch size"):
            models.build_model(name, num_classes=3, image_size=33)
