"""Models by name, and the user's own file: what is built, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcdistill import models
from pcdistill.errors import InputError, PcdistillError

SRC = str(Path(models.__file__).parents[2])


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


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    path = tmp_path / "nets.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from neighbour import WIDTH\n"
        "@dataclass\n"
        "class Options:\n"
        "    bias: bool = True\n"
        "def net(num_classes, in_channels=3, bias=True):\n"
        "    import neighbour\n"
        "    head = nn.Linear(in_channels, num_classes, bias=Options(bias).bias)\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)\n"
        "def fixed():\n"
        "    return nn.Linear(WIDTH, 2)\n"
        "def anything(**options):\n"
        "    return net(**options)\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes: int = 4) -> None:\n"
        "        super().__init__(WIDTH, num_classes)\n"
        "def wrong():\n"
        "    return 3\n"
        "def leave():\n"
        "    raise SystemExit(2)\n"
        "def broken():\n"
        "    raise RuntimeError('boom')\n"
    )
    return path


def test_a_users_function_gets_what_it_accepts(user_file):
    model = models.build_model(f"{user_file}:net", num_classes=5, in_channels=1, image_size=8, kwargs={"bias": False})
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert model[2].bias is None
    assert models.build_model(f"{user_file}:fixed", num_classes=5).out_features == 2
    assert models.build_model(f"{user_file}:Net", num_classes=5).out_features == 5
    assert models.build_model(f"{user_file}:Net", num_classes=None).out_features == 4
    assert models.build_model(f"{user_file}:anything", num_classes=5)[2].out_features == 5
    assert str(user_file.parent) not in sys.path


@pytest.mark.parametrize(
    ("attribute", "arguments", "error", "message"),
    [
        ("nett", {}, InputError, 'has no function or class "nett"; did you mean "net"?'),
        ("WIDTH", {}, InputError, 'has no function or class "WIDTH"'),
        ("wrong", {}, InputError, "must return a torch.nn.Module, got int"),
        ("net", {"pretrained": True}, InputError, "no pretrained weights"),
        ("broken", {}, PcdistillError, "nets.py, line 23: RuntimeError: boom"),
        ("leave", {}, PcdistillError, "SystemExit: 2"),
        ("net", {"kwargs": {"bogus": 1}}, PcdistillError, "unexpected keyword argument 'bogus'"),
    ],
)
def test_a_users_file_that_fails_is_named(user_file, attribute, arguments, error, message):
    with pytest.raises(error) as caught:
        models.build_model(f"{user_file}:{attribute}", num_classes=3, **arguments)
    assert message in str(caught.value)


def test_a_users_file_with_a_syntax_error_is_named(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("def net(:\n")
    with pytest.raises(PcdistillError, match=r"nets.py.*SyntaxError"):
        models.build_model(f"{path}:net", num_classes=3)
