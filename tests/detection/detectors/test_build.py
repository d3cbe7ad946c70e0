"""Detectors by name: built, run in both modes, with the strides, classes and options that were asked for."""

import pytest
import torch
from torch import nn
from torchvision.models import detection as zoo
from torchvision.ops.misc import FrozenBatchNorm2d

from pcdistill.detection.detectors import build as detector_models
from pcdistill.detection.detectors.build import build_detector, list_detectors, pretrained_classes
from pcdistill.errors import InputError

CLASSES = {"fasterrcnn": zoo.FasterRCNN, "retinanet": zoo.RetinaNet, "fcos": zoo.FCOS}


def batch(size=64):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=g), torch.rand(3, size, size - 9, generator=g)]
    boxes = [torch.tensor([[5.0, 5, 30, 40]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    return images, [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]


def norms(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("backbone", ["tiny", "tiny4", "mobilenet_v3_small", "timm/resnet10t"])
def test_every_family_trains_and_detects(family, backbone):
    torch.manual_seed(0)
    model = build_detector(f"{family}/{backbone}", num_classes=2, image_size=64, kwargs={"fpn_channels": 32})
    assert type(model) is CLASSES[family]
    losses = model.train()(*batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    found = model.eval()(batch()[0])
    assert [sorted(one) for one in found] == [["boxes", "labels", "scores"]] * 2
    assert all(set(one["labels"].tolist()) <= {1, 2} for one in found)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("fasterrcnn/tiny", [4, 8, 16, 32]),
        ("fcos/tiny", [4, 8, 16, 32]),
        ("fasterrcnn/resnet18", [4, 8, 16, 32, 64]),
        ("retinanet/resnet18", [8, 16, 32, 64, 128]),
        ("fasterrcnn/mobilenet_v2", [4, 8, 16, 32, 64]),
        ("retinanet/mobilenet_v3_small", [8, 16, 32, 64, 128]),
        ("fcos/timm/resnet10t", [8, 16, 32, 64, 128]),
    ],
)
def test_the_strides_are_those_of_the_maps(name, strides):
    model = build_detector(name, num_classes=2).eval()
    assert model.backbone.strides == strides
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 128, 256))
    assert [(128 // s, 256 // s) for s in strides] == [tuple(m.shape[2:]) for m in maps.values()]


def test_tiny_detectors_are_as_wide_as_their_name_says():
    assert build_detector("fasterrcnn/tiny", num_classes=2).backbone.body.stem.out_channels == 16
    narrow = build_detector("fasterrcnn/tiny6", num_classes=2)
    assert narrow.backbone.body.stem.out_channels == 6
    assert narrow.backbone.out_channels == 12
    assert build_detector("fcos/tiny6", num_classes=2).backbone.out_channels == 32  # heads of 32 groups
    sizes = [sum(p.numel() for p in build_detector(f"fasterrcnn/tiny{w}", num_classes=2).parameters()) for w in (4, 8)]
    assert sizes[0] < sizes[1]


@pytest.mark.slow
def test_options_have_their_effect():
    model = build_detector(
        "fasterrcnn/tiny4",
        num_classes=5,
        image_size=48,
        kwargs={"fpn_channels": 10, "anchor_scale": 3, "head_width": 20, "pool_size": 3, "box_detections_per_img": 7},
    )
    assert model.backbone.out_channels == 10
    assert model.rpn.anchor_generator.sizes == ((12,), (24,), (48,), (96,))
    assert model.roi_heads.box_head.fc6.weight.shape == (20, 90)
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    assert model.roi_heads.detections_per_img == 7
    assert (model.transform.min_size, model.transform.max_size) == ((48,), 48)
    assert build_detector("retinanet/resnet18", num_classes=2, image_size=480).transform.max_size == 800
    assert build_detector("retinanet/resnet18", num_classes=2).transform.min_size == (800,)
    assert norms(model) == {nn.BatchNorm2d}
    for name in ("fasterrcnn/tiny4", "fasterrcnn/resnet18", "fasterrcnn/timm/resnet10t"):
        frozen = build_detector(name, num_classes=2, kwargs={"norm": "frozen"})
        assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.backbone.modules())


@pytest.mark.slow
def test_pretrained_backbones_are_frozen_as_far_as_asked(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)

    def learning(**kwargs):
        body = build_detector("fasterrcnn/resnet18", num_classes=2, pretrained=True, kwargs=kwargs).backbone.body
        return {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}

    assert learning() == {"layer2", "layer3", "layer4"}
    assert learning(trainable_layers=1) == {"layer4"}
    assert learning(trainable_layers=5) >= {"conv1", "layer1", "layer4"}
    assert norms(build_detector("fasterrcnn/resnet18", num_classes=2, pretrained=True)) == {FrozenBatchNorm2d}
    with_batch = build_detector("fasterrcnn/resnet18", num_classes=2, pretrained=True, kwargs={"norm": "batch"})
    assert norms(with_batch) == {nn.BatchNorm2d}


class Weights:
    """Stands for torchvision's COCO weights, which are downloaded."""

    meta = {"categories": ["__background__", "person", "N/A", "cat"]}  # noqa: RUF012

    def __init__(self, state):
        self.state = state

    def get_state_dict(self, check_hash):
        assert check_hash
        return self.state


@pytest.mark.slow
def test_whole_detectors_keep_all_but_their_head_for_other_classes(monkeypatch):
    name = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(1)
    state = zoo.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
    monkeypatch.setattr(detector_models, "coco_weights", lambda _: Weights(state))
    assert pretrained_classes(name) == ("person", "N/A 2", "cat")
    same = build_detector(name, num_classes=None, pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    other = build_detector(name, num_classes=7, pretrained=True)
    changed = {key for key, value in other.state_dict().items() if value.shape != state[key].shape}
    assert {key.rsplit(".", 2)[1] for key in changed} == {"cls_score", "bbox_pred"}
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if k not in changed)


MISTAKES = [
    ("fastercnn/resnet50", {}, 'unknown detector "fastercnn/resnet50"; did you mean "fasterrcnn/resnet50"'),
    ("fasterrcnn", {}, 'unknown detector "fasterrcnn"'),
    ("fasterrcnn/resnet5", {}, 'unknown backbone "resnet5"; did you mean "resnet50"'),
    ("torchvision/fasterrcnn_resnet50_fpn_v3", {}, 'did you mean "fasterrcnn_resnet50_fpn_v2"'),
    ("fasterrcnn/timm/resnet9999", {}, 'timm has no model "resnet9999"'),
    ("fasterrcnn/tiny", {"pretrained": True}, "no pretrained weights"),
    ("fasterrcnn/tiny0", {}, "a width of at least 1"),
    ("fasterrcnn/tiny", {"num_classes": None}, "give num_classes"),
    ("torchvision/retinanet_resnet50_fpn", {"num_classes": None}, "num_classes must be given unless pretrained"),
    ("fasterrcnn/tiny", {"kwargs": {"min_sise": 3}}, 'no option "min_sise"; did you mean "min_size"'),
    ("torchvision/fcos_resnet50_fpn", {"kwargs": {"fpn_channels": 3}}, 'no option "fpn_channels"'),
    ("fasterrcnn/tiny", {"kwargs": {"norm": "group"}}, 'norm must be "auto", "batch" or "frozen", got "group"'),
    ("fcos/tiny", {"kwargs": {"fpn_channels": 24}}, "fpn_channels must be a multiple of 32 for fcos"),
    ("fcos/resnet18", {"kwargs": {"fpn_channels": 100}}, "fpn_channels must be a multiple of 32 for fcos"),
    ("fasterrcnn/timm/vit_tiny_patch16_224", {}, "a detector needs"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), MISTAKES, ids=lambda v: v if isinstance(v, str) else "")
def test_mistakes_are_named(name, arguments, sentence):
    with pytest.raises(InputError) as caught:
        build_detector(name, **{"num_classes": 2, **arguments})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_listed_name_is_known():
    names = list_detectors()
    assert len(names) == len(set(names)) > 30
    for name in names:
        if name.endswith(("tiny", "mobilenet_v2")):
            build_detector(name, num_classes=2)
