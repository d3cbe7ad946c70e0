"""Models by name, weights that fit or are refused, and what the weights know of themselves."""

import argparse
import importlib.machinery
import io
import json
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from pcdistill import models
from pcdistill.errors import InputError, PcdistillError

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


# The user's own file


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


# Pretrained weights, without a network: the libraries' own loaders are fed a file


@pytest.fixture
def torchvision_weights(monkeypatch):
    """ResNet-18's weights from a seed instead of the net; gives the state dict."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    return state


def test_a_pretrained_teacher_keeps_its_own_classes(torchvision_weights):
    model = models.build_model("torchvision/resnet18", num_classes=None, pretrained=True)
    assert torch.equal(model.fc.weight, torchvision_weights["fc.weight"])
    assert models.class_names(model)[:2] == ["tench", "goldfish"]
    assert models.class_names(model, wnids=True)[:2] == ["n01440764", "n01443537"]
    mean, std, size = models.input_stats(model)
    assert (mean, std, size) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)


def test_a_pretrained_student_gets_a_new_head(torchvision_weights):
    model = models.build_model("torchvision/resnet18", num_classes=7, pretrained=True)
    assert model.fc.weight.shape == (7, 512)
    assert torch.equal(model.conv1.weight, torchvision_weights["conv1.weight"])
    assert models.class_names(model) is None
    assert models.input_stats(model) is not None


def test_a_grey_image_gives_what_its_coloured_copy_gives(torchvision_weights):
    images = torch.rand(2, 1, 32, 32)
    arguments = {"num_classes": None, "pretrained": True}
    colour = models.build_model("torchvision/resnet18", **arguments).eval()
    grey = models.build_model("torchvision/resnet18", in_channels=1, **arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    mean, std, _ = models.input_stats(grey)
    assert mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert len(std) == 1
    assert len(models.input_stats(models.build_model("torchvision/resnet18", in_channels=5, **arguments))[0]) == 5


def test_torchvision_weights_are_chosen_by_name(torchvision_weights):
    arguments = {"num_classes": None, "pretrained": True}
    assert models.build_model("torchvision/resnet18", kwargs={"weights": "IMAGENET1K_V1"}, **arguments)
    with pytest.raises(InputError, match=r'has no weights "IMAGENET1K_V9"; it has IMAGENET1K_V1'):
        models.build_model("torchvision/resnet18", kwargs={"weights": "IMAGENET1K_V9"}, **arguments)
    with pytest.raises(InputError, match="need pretrained"):
        models.build_model("torchvision/resnet18", num_classes=3, kwargs={"weights": "IMAGENET1K_V1"})


TORCHVISION = [  # one of each family
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
    "vit_b_16",
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_family_is_counted_and_gets_its_head_and_input_replaced(monkeypatch, name):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    arguments = {"pretrained": True, "in_channels": 3 if "inception" in name or name == "googlenet" else 4}
    with torch.device("meta"):
        teacher = models.build_model(f"torchvision/{name}", num_classes=None, pretrained=True)
        size = models.input_stats(teacher)[2]
        assert models.model_info(teacher, size)["macs"] / 1e9 == pytest.approx(published["_ops"], abs=0.005 + 1e-6)
        student = models.build_model(f"torchvision/{name}", num_classes=7, **arguments).train()
        assert student(torch.empty(2, arguments["in_channels"], size, size)).shape == (2, 7)


def test_pretrained_models_that_cannot_change_their_input_say_so(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    with pytest.raises(InputError, match="needs image_size 224, got 32"):
        models.build_model("torchvision/vit_b_16", num_classes=3, image_size=32, pretrained=True)
    with pytest.raises(InputError, match="reads 3 channels, got in_channels 1"), torch.device("meta"):
        models.build_model("torchvision/googlenet", num_classes=3, in_channels=1, pretrained=True)


def test_a_timm_teacher_knows_its_input_and_classes(monkeypatch):
    state = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    model = models.build_model("timm/resnet10t", num_classes=None, pretrained=True)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert models.class_names(model)[0] == "tench"
    assert models.input_stats(model)[2] == model.pretrained_cfg["input_size"][-1]
    student = models.build_model("timm/resnet10t", num_classes=3, in_channels=1, pretrained=True)
    assert student.fc.out_features == 3
    assert models.class_names(student) is None
    assert len(models.input_stats(student)[0]) == 1


def test_models_trained_from_scratch_know_no_classes_and_no_normalisation():
    for name in ("timm/resnet10t", "torchvision/squeezenet1_1", "cifar/resnet8"):
        model = models.build_model(name, num_classes=1000)
        assert models.class_names(model, name) is None
        assert models.input_stats(model, name) is None
    assert models.class_names(nn.Linear(2, 3)) is None
    assert models.input_stats(nn.Linear(2, 3)) is None


def test_a_timm_model_of_the_users_own_making_is_known_by_its_config():
    model = timm.create_model("resnet10t")
    assert models.input_stats(model)[2] == model.pretrained_cfg["input_size"][-1]
    assert models.class_names(model)[0] == "tench"
    assert models.class_names(timm.create_model("resnet10t", num_classes=3)) is None


def test_class_names_of_pretrained_weights_need_no_model():
    assert len(models.class_names(None, "torchvision/resnet18")) == 1000
    assert models.class_names(None, "timm/resnet18", wnids=True)[0] == "n01440764"
    assert models.class_names(None, "cifar/resnet8") is None


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_weights_that_cannot_be_fetched_are_an_error_of_one_sentence(monkeypatch, name):
    def offline(*_, **__):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(
        PcdistillError, match=f'the files of "{name}" could not be fetched: no route to host$'
    ) as caught:
        models.build_model(name, num_classes=None, pretrained=True)
    assert not isinstance(caught.value, InputError)


# Hugging Face


class FakeConfig:
    id2label = types.MappingProxyType({0: "cat", 1: "dog"})
    image_size = 224
    num_channels = 3

    def __init__(self, num_labels=2, dropout=0.0, image_size=224, num_channels=3):
        self.num_labels, self.dropout, self.image_size = num_labels, dropout, image_size
        self.num_channels = num_channels

    @classmethod
    def from_pretrained(cls, name, **options):
        if name == "absent":
            raise OSError("absent is not a local folder")
        return cls(**options)


class FakeClassifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image_size = config.image_size
        self.classifier = nn.Linear(config.num_channels, config.num_labels)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, name, ignore_mismatched_sizes=False, **options):
        return cls(FakeConfig(**options))

    def forward(self, images):
        if images.shape[-1] != self.image_size:
            raise ValueError("image size does not match")
        return types.SimpleNamespace(logits=self.classifier(images.mean(dim=(2, 3))))


@pytest.fixture
def transformers(monkeypatch):
    fake = types.ModuleType("transformers")
    fake.__spec__ = importlib.machinery.ModuleSpec("transformers", None)
    fake.AutoConfig = FakeConfig
    fake.AutoModelForImageClassification = FakeClassifier
    processor = types.SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.2] * 3, size={"height": 224, "width": 224})
    fake.AutoImageProcessor = types.SimpleNamespace(from_pretrained=lambda name: processor)
    monkeypatch.setitem(sys.modules, "transformers", fake)


def test_a_hugging_face_model_gives_logits(transformers):
    student = models.build_model("hf/some/net", num_classes=5, in_channels=1, image_size=8, kwargs={"dropout": 0.1})
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert models.class_names(student) is None
    assert models.input_stats(student) is None
    teacher = models.build_model("hf/some/net", num_classes=None, pretrained=True)
    assert teacher(torch.zeros(2, 3, 224, 224)).shape == (2, 2)
    assert models.class_names(teacher) == models.class_names(None, "hf/some/net") == ["cat", "dog"]
    assert models.input_stats(teacher) == ((0.5,) * 3, (0.2,) * 3, 224)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "hf/absent",
            {},
            PcdistillError,
            'the files of "hf/absent" could not be fetched: absent is not a local folder',
        ),
        ("hf/net", {"kwargs": {"dropuot": 1}}, InputError, 'has no option "dropuot"; did you mean "dropout"?'),
        ("hf/net", {"pretrained": True, "in_channels": 1}, InputError, "reads 3 channels, got in_channels 1"),
        ("hf/net", {"pretrained": True, "image_size": 8}, InputError, "needs image_size 224, got 8"),
    ],
)
def test_what_transformers_would_pass_over_is_refused(transformers, name, arguments, error, message):
    with pytest.raises(error) as caught:
        models.build_model(name, num_classes=5, **arguments)
    assert message in str(caught.value)


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the package transformers; install it with: pip install"):
        models.build_model("hf/some/net", num_classes=5)


# Weights


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state", "student", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_is_found_under_its_key_and_prefix(tmp_path, key, prefix):
    source, model = tiny(), tiny()
    state = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save(
        state if key is None else {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: state}, tmp_path / "w.pt"
    )
    report = models.load_weights(model, tmp_path / "w.pt")
    assert same_weights(model, source)
    assert (report.key, report.fits, report.loaded) == (key, True, len(state))


def test_the_report_says_what_else_the_checkpoint_held(tmp_path):
    state = tiny().state_dict()
    torch.save({"ema": state, "model": state}, tmp_path / "w.pt")
    report = models.load_weights(tiny(), tmp_path / "w.pt")
    assert str(report) == f'{len(state)} tensors loaded from {tmp_path / "w.pt"}, "model"; not used: ema'


def test_wrapped_models_and_averages_load_and_save_like_the_plain_one(tmp_path):
    source = tiny()
    models.save_weights(torch.compile(source, backend="eager"), tmp_path / "w.safetensors")
    model = tiny()
    models.load_weights(nn.DataParallel(model), tmp_path / "w.safetensors")
    assert same_weights(model, source)
    torch.save(torch.optim.swa_utils.AveragedModel(source).state_dict(), tmp_path / "w.pt")
    models.load_weights(model := tiny(), tmp_path / "w.pt")
    assert same_weights(model, source)


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path):
    def make():
        return nn.ModuleDict({"module": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})

    source, model = make(), make()
    models.save_weights(source, tmp_path / "w.safetensors")
    models.load_weights(model, tmp_path / "w.safetensors")
    assert same_weights(model, source)


def mismatched(tmp_path):
    state = tiny(num_classes=5).state_dict()
    del state["body.bias"]
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_keys_that_do_not_fit_are_listed_and_refused(tmp_path):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        models.load_weights(model, mismatched(tmp_path))
    message = str(caught.value)
    assert "1 missing (body.bias), 1 unexpected (extra), 2 of another shape (fc.weight [5, 4] in the file" in message
    assert "[3, 4] in the model" in message
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_keys_that_do_not_fit_can_be_allowed(tmp_path):
    path, model = mismatched(tmp_path), tiny()
    head = model.fc.weight.clone()
    report = models.load_weights(model, path, allow_mismatch=True)
    assert (report.missing, report.unexpected) == (("body.bias",), ("extra",))
    assert torch.equal(model.body.weight, torch.load(path)["body.weight"])
    assert torch.equal(model.fc.weight, head)
    assert "1 missing (body.bias)" in str(report)


def test_weights_of_another_model_are_refused_even_when_mismatches_are_allowed(tmp_path):
    torch.save({"norm.num_batches_tracked": torch.tensor(3), "conv.weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no parameter of this model, Sequential"):
        models.load_weights(tiny(), tmp_path / "w.pt", allow_mismatch=True)


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({"body.weight": torch.ones(4, 2)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"7 missing \(body.bias, norm.weight, norm.bias, ...\)"):
        models.load_weights(tiny(), tmp_path / "w.pt")


def test_old_checkpoints_without_batch_counters_fit(tmp_path):
    state = {k: v for k, v in tiny().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    assert models.load_weights(tiny(), tmp_path / "w.pt").fits


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    state = tiny().state_dict()
    state["fc.bias"][0] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"not finite: fc.bias"):
        models.load_weights(tiny(), tmp_path / "w.pt")


class Evil:
    """Would make a file if a pickle of it were executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_code_is_refused_and_never_executed(tmp_path, form):
    trap, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"state_dict": {**tiny().state_dict(), "extra": Evil(trap)}}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = (
        "nothing in it was executed" if form == "plain" else r"holds pickled code \(.*open\), which was not executed"
    )
    with pytest.raises(InputError, match=message) as caught:
        models.load_weights(tiny(), path, allow_mismatch=True)
    assert "weights_only" not in str(caught.value)
    assert not trap.exists()
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())
    assert trap.exists()  # the trap was real


def damaged():
    whole = io.BytesIO()
    torch.save(tiny().state_dict(), whole)
    return {
        "half.pt": whole.getvalue()[: len(whole.getvalue()) // 2],
        "empty.pt": b"",
        "text.pt": b"not a checkpoint",
        "empty.safetensors": b"",
        "text.safetensors": b"not a checkpoint, but long enough for a header",
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(damaged()[name])
    with pytest.raises(InputError) as caught:
        models.load_weights(tiny(), tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_other_wrong_files_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    for name, message in {
        "program.pt": "is a TorchScript program",
        "other.pt": "holds no state dict, neither as a whole nor under one of state_dict, model",
        "tensor.pt": "holds no state dict",
        "absent.pt": "does not exist",
        ".": "weights must be a file, got the folder",
    }.items():
        with pytest.raises(InputError, match=message):
            models.load_weights(tiny(), tmp_path / name)


def test_saved_weights_carry_what_they_know(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    known = {
        "classes": ["cat", "dög"],
        "mean": [0.5],
        "std": [0.2],
        "image_size": 8,
        "top1": 91.5,
        "recipe": {"a": [1]},
    }
    source = models.build_model("cifar/resnet8", num_classes=2, in_channels=1)
    models.save_weights(source, path, known)
    assert models.read_metadata(path) == known
    assert models.read_classes(path) == ["cat", "dög"]
    model = models.build_model("cifar/resnet8", num_classes=None, in_channels=1, weights=path)
    assert same_weights(model, source)
    assert models.class_names(model) == ["cat", "dög"]
    assert models.input_stats(model) == ((0.5,), (0.2,), 8)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_weights_of_a_foreign_file_bring_no_statistics(tmp_path):
    model = timm.create_model("resnet10t")
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata={"made": "elsewhere"})
    assert models.read_metadata(tmp_path / "w.safetensors") == {"made": "elsewhere"}
    assert models.read_classes(tmp_path / "w.safetensors") is None
    models.load_weights(model, tmp_path / "w.safetensors")
    assert models.input_stats(model) is None
    assert models.class_names(model) is None


def test_tied_weights_survive_and_are_not_missed(tmp_path):
    source, model = Tied(), Tied()
    models.save_weights(source, tmp_path / "w.safetensors")
    models.load_weights(model, tmp_path / "w.safetensors")
    assert same_weights(model, source)
    assert model.first.weight is model.second.weight
    save_file({"first.weight": source.first.weight.detach()}, tmp_path / "once.safetensors")
    assert models.load_weights(Tied(), tmp_path / "once.safetensors").fits


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    models.save_weights(tiny(), path, {"epoch": 1})

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        models.save_weights(tiny(), path, {"epoch": 2})
    assert models.read_metadata(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_metadata_is_json_inside_safetensors(tmp_path):
    with pytest.raises(TypeError):
        models.save_weights(tiny(), tmp_path / "w.safetensors", {"model": tiny()})
    models.save_weights(tiny(), tmp_path / "w.safetensors")
    assert models.read_metadata(tmp_path / "w.safetensors") == {}
    header = (tmp_path / "w.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["format"] == "pt"


# Size


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
