"""The zoos' pretrained models, without a network: the libraries' own loaders are fed a file."""

import importlib.machinery
import sys
import types

import pytest
import timm
import torch
import torchvision
from torch import nn

from pcdistill import models
from pcdistill.errors import InputError, PcdistillError


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


QUICK = ("alexnet", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")
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


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION]
)
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


class FakeConfig:
    id2label = types.MappingProxyType({0: "cat", 1: "dog"})
    image_size = 224
    num_channels = 3

    def __init__(self, num_labels=2, dropout=0.0, image_size=224, num_channels=3):
        self.num_labels, self.dropout, self.image_size = num_labels, dropout, image_size
        self.num_channels = num_channels

    @classmethod
    def from_pretrained(cls, name, **options):
        if name == "absent" or name.startswith("~"):
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
    assert models.class_names(models.build_model("hf/~/net", num_classes=None, pretrained=True)) == ["cat", "dog"]
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
    with pytest.raises(InputError, match=r'"hf/some/net" needs transformers, .*pip install .pcdistill\[hf\]'):
        models.build_model("hf/some/net", num_classes=5)
