"""The zoo against the published sizes, the hook points that feature distillation needs, and the papers' structure."""

import pytest
import torch
from torch import nn

from pcdistill.models.cifar import MODELS, Bottleneck, CifarNet, ShuffleV2Block, resnet, shuffle_channels

PARAMETERS_M = {  # millions for 100 classes, as the distillation literature prints them
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet44": 0.67,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "resnet50": 23.71,
    "wrn_16_1": 0.18,
    "wrn_16_2": 0.70,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "mobilenetv2": 0.81,
    "shufflenetv1": 0.95,
    "shufflenetv2": 1.36,
}
STAGE_SHAPES = {  # channels and resolution of each stage on 32 pixels
    "resnet8": [(16, 32), (32, 16), (64, 8)],
    "resnet14": [(16, 32), (32, 16), (64, 8)],
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
    "vgg8": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}
SMALL = sorted(set(MODELS) - {"resnet110", "resnet50", "vgg13", "resnet32x4", "resnet44", "wrn_40_2"})


@pytest.mark.parametrize(("name", "millions"), PARAMETERS_M.items())
def test_parameter_count_is_the_published_one(name, millions):
    with torch.device("meta"):
        model = MODELS[name](num_classes=100)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "shapes"), STAGE_SHAPES.items())
def test_stages_have_the_published_shapes(name, shapes):
    with torch.device("meta"):
        model = MODELS[name]()
        x = model.stem(torch.empty(2, 3, 32, 32))
        seen = []
        for stage in model.FEATURES:
            x = model.get_submodule(stage)(x)
            seen.append((x.shape[1], x.shape[2]))
    assert seen == shapes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [8, 11])
def test_any_size_classes_and_channels(name, size):
    model = MODELS[name](num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_a_hook_before_relu_out_sees_the_features_before_the_activation(name):
    model = MODELS[name](num_classes=3).eval()
    before, after, handles = {}, {}, []
    for stage in model.FEATURES:
        relu_out = model.get_submodule(stage)[-1].relu_out
        handles.append(relu_out.register_forward_pre_hook(lambda _, args, stage=stage: before.update({stage: args[0]})))
        handles.append(
            model.get_submodule(stage).register_forward_hook(
                lambda _, args, out, stage=stage: after.update({stage: out})
            )
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    for stage in model.FEATURES:
        expected = before[stage] if name == "mobilenetv2" else before[stage].relu()
        torch.testing.assert_close(after[stage], expected, rtol=0, atol=0)
        assert before[stage].lt(0).any()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient_and_no_buffer_is_shared(name):
    model = MODELS[name](num_classes=3)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not any(isinstance(module, nn.ReLU) and module.inplace for module in model.modules())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv1", "shufflenetv2", "mobilenetv2", "vgg8"])
def test_channels_last_gives_the_same_logits(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=5).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        actual = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "shufflenetv2", "wrn_16_1"])
def test_compiles_as_one_graph(name):
    model = MODELS[name](num_classes=5).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        actual = torch.compile(model, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(actual, model(images), rtol=0, atol=0)


def test_resnet_counts_its_layers():
    for name in ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"):
        with torch.device("meta"):
            model = MODELS[name]()
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", None) == (3, 3)]
        assert len(layers) == int(name.removeprefix("resnet"))


def test_wide_resnet_is_the_pre_activation_network_of_the_paper():
    torch.manual_seed(0)
    model = MODELS["wrn_16_2"](num_classes=5).eval()
    for module in model.modules():  # at their initial values, moved activations could cancel unseen
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = torch.randn(2, 3, 8, 8)
    norms = {"layer1": model.layer1[0].bn1, "layer2": model.layer1[-1].bn, "layer3": model.layer2[-1].bn}
    with torch.no_grad():
        x = model.stem(images)
        for stage, first_norm in norms.items():
            for i, block in enumerate(list(model.get_submodule(stage))[:-1]):
                activated = (first_norm if i == 0 else block.bn1)(x).relu()
                x = block.body(activated) + (block.shortcut(activated) if i == 0 else x)
        expected = model.fc(model.layer3[-1].bn(x).relu().mean(dim=(2, 3)))
        torch.testing.assert_close(model(images), expected)


def test_shuffle_interleaves_the_groups():
    x = torch.arange(6).reshape(1, 6, 1, 1)
    assert shuffle_channels(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_shufflenetv2_passes_half_of_an_activated_input_unchanged():
    block = ShuffleV2Block(8, 8, stride=1).eval()
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(block(x)[:, ::2], x[:, :4], rtol=0, atol=0)


def test_widths_are_free_and_checked():
    model = MODELS["resnet8"](num_classes=10, in_channels=1, widths=(4, 4, 8, 16))
    assert isinstance(model, CifarNet)
    assert model.fc.in_features == 16
    assert resnet((1, 1), widths=(8, 8, 16), block=Bottleneck).FEATURES == ("layer1", "layer2")
    with pytest.raises(ValueError, match=r"widths must be 4 numbers, the stem's and each stage's, got \[4, 8\]"):
        MODELS["resnet8"](widths=(4, 8))


def test_same_seed_gives_the_same_weights():
    torch.manual_seed(3)
    first = MODELS["resnet8"]().state_dict()
    torch.manual_seed(3)
    second = MODELS["resnet8"]().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
