"""A teacher's weights in fewer bits: what they cost in the logits, and what they take in memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pcdistill.distillation.cache_store import fingerprint
from pcdistill.distillation.reduced import FromFloat8, reduce_weights
from pcdistill.distillation.teacher import Teacher
from pcdistill.models import build_model, model_info

# Degrees between the centred logits in float32 and in these, on the trained network below; measured, and doubled.
MOST_DEGREES = {"bfloat16": 0.5, "float16": 0.06, "float8": 3.0}


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def degrees(a, b):
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return torch.rad2deg(torch.arccos(F.cosine_similarity(a.double(), b.double()).clamp(-1, 1)))


@pytest.fixture(scope="module")
def trained():
    """A small network over ten classes of noisy patterns, and images of them."""
    torch.manual_seed(0)
    patterns, model = torch.randn(10, 3, 12, 12), build_model("cifar/resnet8", num_classes=10, in_channels=3)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        target = torch.randint(10, (32,))
        loss = F.cross_entropy(model(patterns[target] + torch.randn(32, 3, 12, 12)), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), patterns[torch.arange(256) % 10] + torch.randn(256, 3, 12, 12)


@pytest.mark.parametrize("precision", MOST_DEGREES)
def test_logits_keep_their_direction_and_their_answer(precision, trained):
    model, images = trained
    whole, reduced = Teacher(copy.deepcopy(model)), Teacher(copy.deepcopy(model), precision=precision)
    wanted, found = whole(images), reduced(images)
    assert found.dtype == torch.float32
    angle = degrees(wanted, found).mean().item()
    agree = (wanted.argmax(1) == found.argmax(1)).float().mean().item()
    print(f"{precision}: {angle:.3f} degrees, {100 * agree:.1f} % the same answer")
    assert 0 < angle < MOST_DEGREES[precision]
    assert agree > 0.97
    assert bytes_of(reduced.model) < bytes_of(whole.model) * (0.3 if precision == "float8" else 0.51)


def test_float32_leaves_the_model_as_it_is(trained):
    model, images = trained
    one = copy.deepcopy(model)
    assert torch.equal(Teacher(one, precision="float32")(images), Teacher(model)(images))
    half = copy.deepcopy(model).half()
    assert Teacher(half).dtype == torch.float16


def test_another_precision_is_another_teacher(trained):
    found = {
        fingerprint(Teacher(copy.deepcopy(trained[0]), precision=precision)) for precision in ("float32", *MOST_DEGREES)
    }
    assert len(found) == 4


def test_a_reduced_teacher_computes_without_autocast(trained):
    model, images = trained
    teacher = Teacher(copy.deepcopy(model), precision="float16")
    alone = teacher(images[:4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images[:4]), alone)


def test_float8_has_one_scale_for_each_channel_and_survives_a_channel_of_zeros():
    weight = torch.randn(5, 3, 2, 2) * torch.tensor([1e-6, 1.0, 1e3, 0.0, 7.0])[:, None, None, None]
    layer = FromFloat8(weight.bfloat16())
    (stored,) = layer.right_inverse(weight.bfloat16())
    assert stored.dtype == torch.uint8
    back = layer(stored)
    assert back.dtype == torch.bfloat16
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert bool(((back.float() - weight).abs() <= 0.04 * largest).all())


def test_attention_and_bare_parameters_work_in_float8_and_their_sizes_are_told():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    wanted = model(x)
    reduce_weights(model, "float8")
    assert parametrize.is_parametrized(model.linear1)
    assert (model(x.bfloat16()).float() - wanted).abs().max() < 0.2
    whole = build_model("cifar/resnet8", num_classes=10, in_channels=3)
    told = model_info(whole, 16)
    reduce_weights(whole.eval().requires_grad_(False), "float8")
    assert model_info(whole, 16) == told
