"""Taps on our networks, timm's, torchvision's and odd ones: what they see, that they change nothing, messages."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pcdistill.distillation.taps import Taps
from pcdistill.errors import InputError, PcdistillError
from pcdistill.models.cifar import MODELS
from pcdistill.models.feature_maps import Headed, unwrap

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def images(n: int = 2, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def zoo(name: str = "resnet8", classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](num_classes=classes)


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
)
def test_our_networks_by_hand(name):
    model = zoo(name).eval()
    with Taps(model) as taps:
        features = taps.run(images())
        assert taps.names == model.FEATURES
    x, maps = model.stem(images()), []
    for stage in model.FEATURES:
        x = getattr(model, stage)(x)
        maps.append(x)
    pooled = model.pool(model.head(x)).flatten(1)
    for seen, right in zip(features.maps, maps, strict=True):
        torch.testing.assert_close(seen, right)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.logits, model(images()))
    assert features.classifier is model.fc
    assert features.index is None
    for before, after in zip(features.pre_activations, features.maps, strict=True):
        if name == "mobilenetv2":  # its stages end without an activation
            assert before is after
        else:
            assert before.lt(0).any()
            torch.testing.assert_close(before.relu(), after)


def test_batch_normalisation_before_the_last_activation():
    def found(name):
        model = zoo(name)
        norms = Taps(model).run(images()).norms
        names = {module: name for name, module in model.named_modules()}
        return [None if norm is None else names[norm] for norm in norms]

    assert found("resnet20") == ["layer1.2.body.4", "layer2.2.body.4", "layer3.2.body.4"]
    assert found("resnet8") == ["layer1.0.body.4", "layer2.0.body.4", "layer3.0.body.4"]  # not the shortcut's
    assert found("wrn_16_1") == ["layer1.2.bn", "layer2.2.bn", "layer3.2.bn"]
    assert found("vgg8") == ["layer1.0.bn", "layer2.0.bn", "layer3.0.bn", "layer4.0.bn"]
    assert found("shufflenetv2") == [None, None, None]  # two halves, shuffled


def test_an_activation_in_place_does_not_hide_what_came_before_it():
    model = torchvision.models.resnet18(num_classes=4).eval()
    assert model.layer1[1].relu.inplace
    features = Taps(model).run(images())
    assert [tuple(x.shape[1:]) for x in features.maps] == [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]
    for before, after in zip(features.pre_activations, features.maps, strict=True):
        assert before.lt(0).any()
        torch.testing.assert_close(before.relu(), after)
    assert features.norms[0] is model.layer1[1].bn2
    assert features.classifier is model.fc


@pytest.mark.slow
def test_gradients_flow_through_all_of_it():
    for model in (zoo(), torchvision.models.resnet18(num_classes=4)):
        features = Taps(model).run(images(4, 64))
        for x in (*features.maps, *features.pre_activations, features.pooled, features.logits):
            model.zero_grad()
            x.square().sum().backward(retain_graph=True)
            assert next(model.parameters()).grad.abs().max() > 0


def test_timm_by_its_feature_info():
    model = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    taps = Taps(model)
    features = taps.run(images(2, 64))
    assert taps.names == ("blocks.0", "blocks.1", "blocks.3", "blocks.5")
    assert [x.shape[-1] for x in features.maps] == [16, 8, 4, 2]
    assert features.classifier is model.classifier
    torch.testing.assert_close(features.classifier(features.pooled), features.logits)
    before, after = features.pre_activations[-1], features.maps[-1]
    torch.testing.assert_close(F.hardswish(before), after)


def test_timm_transformer_tokens_become_maps():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, num_classes=4).eval()
    taps = Taps(model)
    features = taps.run(images(2, 64))
    assert taps.names == ("blocks.1", "blocks.2", "blocks.3", "blocks.5")
    assert [tuple(x.shape) for x in features.maps] == [(2, 192, 4, 4)] * 4
    tokens = model.forward_intermediates(images(2, 64), indices=[1, 2, 3, 5], norm=False, intermediates_only=True)
    for seen, right in zip(features.maps, tokens, strict=True):
        torch.testing.assert_close(seen, right)


def test_timm_distilled_transformer_has_two_prefix_tokens_and_two_heads():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    features = Taps(model).run(images())
    assert features.maps[-1].shape == (2, 192, 2, 2)
    assert features.classifier is model.head


def test_torchvision_transformer_without_feature_info():
    model = torchvision.models.VisionTransformer(32, 8, 5, 2, 8, 16, num_classes=4).eval()
    taps = Taps(model)
    features = taps.run(images())
    assert taps.names == tuple(f"encoder.layers.encoder_layer_{i}" for i in (0, 1, 3, 4))
    assert features.maps[-1].shape == (2, 8, 4, 4)
    assert features.classifier is model.heads.head


def test_maps_that_end_in_channels_are_turned():
    model = torchvision.models.SwinTransformer([2, 2], 8, [1, 1, 1], [2, 2, 2], [4, 4], num_classes=4).eval()
    taps = Taps(model)
    features = taps.run(images())
    assert [tuple(x.shape[1:]) for x in features.maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    right = model.features[1](model.features[0](images())).permute(0, 3, 1, 2)
    torch.testing.assert_close(features.maps[0], right)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("mobilenet_v2", ("features.3", "features.6", "features.13", "features.18")),
        ("shufflenet_v2_x0_5", ("maxpool", "stage2", "stage3", "conv5")),
        ("densenet121", ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5")),
    ],
)
def test_without_names_the_last_child_of_the_trunk_at_each_resolution(name, stages):
    model = torchvision.models.get_model(name, num_classes=4).eval()
    taps = Taps(model)
    features = taps.run(images(2, 64))
    assert taps.names == stages
    assert [x.shape[-1] for x in features.maps] == [16, 8, 4, 2]


@pytest.mark.slow
def test_the_batch_normalisation_may_be_a_module_of_its_own():
    model = torchvision.models.vgg11_bn(num_classes=4, init_weights=False).eval()
    features = Taps(model, ["features.6", "features.13"]).run(images())
    assert features.norms == [model.features[5], model.features[12]]
    torch.testing.assert_close(features.pre_activations[0].relu(), features.maps[0])


class OneResolution(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(9)]
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_of_one_resolution_four_blocks_evenly_spaced():
    taps = Taps(OneResolution())
    features = taps.run(images(size=8))
    assert taps.names == ("body.2", "body.4", "body.7", "body.9")
    assert features.pre_activations[0].lt(0).any()


def test_a_model_with_a_single_map_and_one_without_a_linear_classifier():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    taps = Taps(model)
    assert taps.run(images()).maps[0].shape == (2, 4, 30, 30)
    assert taps.names == ("0",)
    convolutional = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    features = Taps(convolutional, ["1"]).run(images())
    assert features.classifier is None
    torch.testing.assert_close(features.pooled, features.maps[0].mean((2, 3)))


def test_the_classifier_is_the_linear_layer_that_makes_the_logits():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.conv = nn.Conv2d(3, 4, 1)
            self.aux = nn.Linear(4, 7)

        def forward(self, x):
            pooled = self.conv(x).mean((2, 3))
            logits = self.fc(pooled)
            self.aux(pooled)
            return logits

    model = Auxiliary()
    assert Taps(model, ["conv"]).run(images()).classifier is model.fc


def test_looking_leaves_the_model_as_it_was():
    model = zoo()
    model.layer1.eval()  # a frozen stage must stay in eval mode
    state = {name: x.clone() for name, x in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    taps = Taps(model)
    random = torch.get_rng_state()
    with torch.no_grad():
        features = taps.run(images(4))
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    reference = zoo()
    reference.layer1.eval()
    with torch.no_grad():
        torch.testing.assert_close(reference(images(4)), features.logits, rtol=0, atol=0)
    for name, x in reference.state_dict().items():  # one update of the batch statistics, not two
        assert torch.equal(model.state_dict()[name], x), name
    assert any(not torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_one_run_is_one_call_of_the_model():
    model, calls = zoo(), []
    taps = Taps(model)
    taps.run(images())
    model.register_forward_hook(lambda *_: calls.append(1))
    taps.run(images())
    assert calls == [1]


def test_outside_of_run_the_hooks_keep_nothing_and_remove_takes_them_out():
    model = zoo()
    with Taps(model) as taps:
        taps.run(images())
        model(images())
        assert taps.seen == {}
        twin = copy.deepcopy(model)
        twin(images())
        assert taps.seen == {}
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(PcdistillError, match="removed"):
        taps.run(images())


def test_a_model_that_raises_leaves_the_taps_usable():
    model = zoo()
    taps = Taps(model)
    taps.run(images())
    with pytest.raises(RuntimeError):
        taps.run(images(channels=1))
    model(images())
    assert taps.seen == {}
    assert taps.run(images()).logits.shape == (2, 5)


def test_the_index_is_handed_on():
    index = torch.tensor([7, 3])
    assert Taps(zoo()).run(images(), index).index is index


def test_under_autocast_and_channels_last():
    model = zoo().to(memory_format=torch.channels_last)
    taps = Taps(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = taps.run(images().to(memory_format=torch.channels_last))
    assert features.maps[0].shape == (2, 16, 32, 32)
    assert features.maps[0].dtype == torch.bfloat16


def test_inside_a_wrapper():
    model = zoo()
    wrapped = nn.DataParallel(model)
    assert unwrap(wrapped) is model
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    features = Taps(wrapped).run(images())
    assert calls == [1]  # looking asks the model inside, running the wrapper
    assert features.classifier is model.fc


def test_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = zoo()
        taps = Taps(nn.parallel.DistributedDataParallel(model), ["layer2"])
        taps.run(images()).maps[0].sum().backward()
        assert model.stem.conv.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_inside_torch_compile():
    model = zoo().eval()
    right = Taps(copy.deepcopy(model)).run(images(3))
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    taps = Taps(compiled)
    for _ in range(2):
        features = taps.run(images(3))
        for seen, expected in zip((*features.maps, features.pooled), (*right.maps, right.pooled), strict=True):
            torch.testing.assert_close(seen, expected)
        compiled(images(3))  # without taps in between


@pytest.mark.slow
def test_a_graph_compiled_before_the_taps_is_named():
    model = zoo().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    with pytest.raises(PcdistillError, match=r'"layer1" was not called.*compiled'):
        Taps(compiled).run(images())


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r'CifarNet has no module "layer4"; did you mean "layer\d"\?'):
        Taps(zoo(), ["layer1", "layer4"])
    with pytest.raises(InputError, match='no module "zzz"; its parts are stem, layer1'):
        Taps(zoo(), ["zzz"])
    with pytest.raises(InputError, match="twice in layer1, layer1"):
        Taps(zoo(), ["layer1", "layer1"])
    for wrong in ([], "layer1"):
        with pytest.raises(InputError, match="must be a list of one module name or more"):
            Taps(zoo(), wrong)


def test_names_are_known_before_the_first_run_only_if_given():
    taps = Taps(zoo())
    assert taps.names is None
    taps.run(images())
    assert taps.names == ("layer1", "layer2", "layer3")
    assert Taps(zoo(), ["layer2.0.relu_out"]).names == ("layer2.0.relu_out",)


def test_an_activation_may_be_named_itself():
    features = Taps(zoo(), ["layer2.0.relu_out"]).run(images())
    torch.testing.assert_close(features.pre_activations[0].relu(), features.maps[0])
    assert features.pre_activations[0].lt(0).any()


class Tokens(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.unused = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)
        self.count = count

    def forward(self, x):
        return self.fc(self.body(x.flatten(2).transpose(1, 2)[:, : self.count]).mean(1))


@pytest.mark.parametrize(("count", "side"), [(16, 4), (17, 4), (1, 1), (2, 1)])
def test_tokens_with_and_without_a_class_token(count, side):
    model = Tokens(count)
    features = Taps(model, ["body"]).run(images())
    assert features.maps[0].shape == (2, 4, side, side)
    first = model.body(images().flatten(2).transpose(1, 2))[:, count - side * side]
    torch.testing.assert_close(features.maps[0][:, :, 0, 0], first)


def test_outputs_that_are_no_maps_are_named():
    with pytest.raises(InputError, match=r'"body" gives \[2, 19, 4\], and 19 tokens.*no square grid'):
        Taps(Tokens(19), ["body"]).run(images())
    with pytest.raises(InputError, match=r'"fc" gives \[2, 5\]; name modules'):
        Taps(zoo(), ["fc"]).run(images())
    with pytest.raises(InputError, match='"unused" is not called'):
        Taps(Tokens(16), ["unused"]).run(images())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(InputError, match="Sequential shows no feature maps; name its stages"):
        Taps(flat).run(images(size=8))


def test_another_branch_in_training_is_named():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc((self.b if self.training else self.a)(x).mean((2, 3)))

    taps = Taps(Branch(), ["a"])
    with pytest.raises(PcdistillError, match='"a" was not called in this pass'):
        taps.run(images())


def test_a_declared_list_of_stages_comes_first():
    model = OneResolution()
    model.FEATURES = ("body.1", "body.4")
    taps = Taps(model)
    taps.run(images(size=8))
    assert taps.names == ("body.1", "body.4")
    model.FEATURES = ("body.1", "body.77")
    with pytest.raises(InputError, match="body.77"):
        Taps(model).run(images(size=8))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_another_head_on_a_stage():
    model = zoo().eval()
    headed = Headed(model, "layer3", Head()).eval()
    features = Taps(model).run(images())
    torch.testing.assert_close(headed(images()), headed.head(features.maps[-1]))
    assert {name.split(".")[0] for name in headed.state_dict()} == {"model", "head"}
    assert not model.layer3._forward_hooks or len(model.layer3._forward_hooks) == 1  # only the taps' own
    headed(images()).sum().backward()
    assert model.stem.conv.weight.grad is not None
    with pytest.raises(InputError, match="layer9"):
        Headed(model, "layer9", Head())


def test_another_head_can_be_exported():
    headed = Headed(zoo().eval(), "layer3", Head()).eval()
    program = torch.export.export(headed, (images(),), strict=False)
    torch.testing.assert_close(program.module()(images()), headed(images()))
