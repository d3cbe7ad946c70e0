"""Set prediction: transformers' own losses and post-processing, the queries that are there in use, and the matching."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from pcdistill.detection.detectors.base import PreparedBatch
from pcdistill.detection.detectors.set_prediction import HubDetector, SetPrediction, SetState, pyramid_of
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.errors import InputError
from tests.detection.families import HUB, SIDE, batch_of, detector

SOFTMAX = ("detr", "yolos")
SIGMOID = tuple(family for family in HUB if family not in SOFTMAX)


def labels_of(batch):
    """Transformers' form of the targets of images without padding."""
    return [
        {"class_labels": target["labels"] - 1, "boxes": box_convert(target["boxes"] / SIDE, "xyxy", "cxcywh")}
        for target in batch.targets
    ]


def empty(batch, which):
    for i in which:
        target = batch.targets[i]
        target.update({key: value[:0] for key, value in target.items()})
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("family", HUB)
@pytest.mark.parametrize("without", [(), (0,), (0, 1)], ids=str)
def test_the_losses_are_the_librarys_own(family, without):
    """Value and gradients, from a forward of ours that does not know the adapter."""
    model = detector(family)
    twin = copy.deepcopy(model.inner)
    batch = empty(batch_of(), without)
    pixels = torch.stack(batch.images)
    mean, std = (torch.tensor(v)[:, None, None] for v in model.stats)
    torch.manual_seed(3)
    wanted = twin(pixel_values=(pixels - mean) / std, labels=labels_of(batch)).loss
    torch.manual_seed(3)
    losses = adapter_of(model).student_pass(batch.images, batch.targets).losses
    total = sum(losses.values())
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    wanted.backward()
    total.backward()
    for own, other in zip(model.inner.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", HUB)
def test_in_training_the_queries_are_those_that_are_there_in_use(family):
    """Without labels there is nothing to denoise, and of the groups the first is used."""
    kwargs = {} if family == "yolos" else {"dropout": 0.0}
    model = detector(family, **kwargs)
    batch = batch_of()
    adapter = adapter_of(model)
    seen = adapter.student_pass(batch.images, batch.targets)
    assert seen.state.logits.shape == (2, 20, 4)
    assert seen.state.boxes.shape == (2, 20, 4)
    assert seen.state.raw.shape[1] >= 20
    without = model.inner(pixel_values=adapter.prepare(batch.images).pixels)
    own = without.logits[:, :20]
    shown = seen.state.logits[..., 1:] if family in SIGMOID else seen.state.logits[..., [1, 2, 3, 0]]
    torch.testing.assert_close(shown, own, rtol=1e-4, atol=1e-4)
    boxes = box_convert(without.pred_boxes[:, :20], "cxcywh", "xyxy") * SIDE
    torch.testing.assert_close(seen.state.boxes, boxes, rtol=1e-4, atol=1e-2)


def test_denoising_queries_and_groups_were_there_to_be_left_out():
    batch = batch_of()
    for family, queries in (("rt_detr", 40), ("d_fine", 40), ("rf_detr", 60)):
        assert adapter_of(detector(family)).student_pass(batch.images, batch.targets).state.raw.shape[1] == queries


@pytest.mark.parametrize("family", HUB)
def test_background_comes_first(family):
    model = detector(family).eval()
    adapter = adapter_of(model)
    batch = adapter.prepare(batch_of().images)
    logits = adapter.observe(batch).state.logits
    raw = model.inner(pixel_values=batch.pixels).logits
    if family in SOFTMAX:
        torch.testing.assert_close(logits.softmax(-1)[..., 1:], raw.softmax(-1)[..., :-1])
        torch.testing.assert_close(adapter.shares(logits), raw.softmax(-1)[..., :-1])
    else:
        assert not logits[..., 0].any()
        torch.testing.assert_close(adapter.shares(logits), raw.sigmoid())


@pytest.mark.parametrize(
    ("family", "processor"),
    [("rt_detr", "RTDetrImageProcessor"), ("rf_detr", "RfDetrImageProcessor"), ("detr", "DetrImageProcessor")],
)
def test_detections_are_those_of_the_librarys_post_processing(family, processor):
    import transformers

    model = detector(family).eval()
    sizes = ((50, 80), (64, 64))
    images = batch_of(sizes=sizes).images
    found = adapter_of(model).predict(images)
    batch = adapter_of(model).prepare(images)
    mask = torch.zeros(2, *batch.image_size, dtype=torch.int64)
    for i, (height, width) in enumerate(batch.sizes):
        mask[i, :height, :width] = 1
    out = model.inner(pixel_values=batch.pixels, **({"pixel_mask": mask} if family == "detr" else {}))
    wanted = getattr(transformers, processor)().post_process_object_detection(
        out, threshold=0.0, target_sizes=torch.tensor(sizes)
    )
    for own, other, (height, width) in zip(found, wanted, sizes, strict=True):
        assert own["labels"].tolist() == (other["labels"] + 1).tolist()
        torch.testing.assert_close(own["scores"], other["scores"])
        limits = torch.tensor([width, height] * 2, dtype=torch.float32)
        inside = torch.minimum(other["boxes"].clamp(min=0), limits)
        torch.testing.assert_close(own["boxes"], inside, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("family", ["rt_detr", "detr"])
def test_boxes_mean_the_same_in_the_image_whatever_its_padding(family):
    """An image of another proportion than the batch's: stretched, or padded with a mask; convolutions see the edge."""
    model = detector(family).eval()
    adapter = adapter_of(model)
    image, wide = batch_of(sizes=((64, 40), (40, 64))).images
    alone, beside = adapter.predict([image])[0], adapter.predict([image, wide])[0]
    torch.testing.assert_close(alone["scores"], beside["scores"], rtol=0, atol=0.01)
    torch.testing.assert_close(alone["boxes"], beside["boxes"], rtol=0, atol=1.0)
    assert alone["boxes"][:, 2].max() <= 40


@pytest.mark.parametrize("square", [True, False])
def test_images_are_stretched_or_keep_their_proportion(square):
    model = detector("rt_detr")
    model.square, model.max_size = square, 100
    batch = adapter_of(model).prepare(
        [torch.rand(3, 50, 100)], [{"boxes": torch.tensor([[10.0, 10, 20, 30]]), "labels": torch.tensor([1])}]
    )
    size = (64, 64) if square else (50, 100)  # the longer side is bound to 100
    assert batch.sizes == [size]
    assert batch.image_size == ((64, 64) if square else (64, 128))
    wanted = torch.tensor([[10.0, 10, 20, 30]]) * torch.tensor([size[1] / 100, size[0] / 50] * 2)
    torch.testing.assert_close(batch.targets[0]["boxes"], wanted)
    assert not batch.pixels[:, :, size[0] :].any()


def brute_force(adapter, boxes, logits, regions, like):
    """The cheapest assignment of regions to different queries, by trying all."""
    side = torch.cat([boxes, regions])[:, 2:].amax(0).repeat(2)
    shares = logits[:, 1:].sigmoid()
    best, chosen = torch.inf, None
    for queries in itertools.permutations(range(len(boxes)), len(regions)):
        cost = 0.0
        for r, q in enumerate(queries):
            cost += 5 * ((regions[r] - boxes[q]) / side).abs().sum()
            cost -= 2 * generalized_box_iou(regions[r][None], boxes[q][None]).item()
            cost -= 2 * shares[q, like[r, 1:].argmax()]
        if cost < best:
            best, chosen = cost, queries
    return list(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_the_matching_is_the_cheapest_of_all(seed):
    g = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(8, 2, generator=g)
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(8, 2, generator=g)], 1)
    logits, like = torch.randn(5, 4, generator=g), torch.randn(3, 4, generator=g)
    adapter = SetPrediction(detector("rt_detr"))
    state = SetState(logits[None], boxes[None, :5], logits[None])
    (found,) = adapter.choose(state, [boxes[5:]], like)
    assert found.tolist() == brute_force(adapter, boxes[:5], logits, boxes[5:], like)
    assert torch.equal(adapter.logits_at(state, [boxes[5:]], like), logits[found])
    assert torch.equal(adapter.boxes_at(state, [boxes[5:]], like), boxes[found])


def test_regions_beyond_the_queries_take_the_nearest():
    adapter = SetPrediction(detector("rt_detr"))
    boxes = torch.tensor([[0.0, 0, 10, 10], [30.0, 30, 40, 40]])
    state = SetState(torch.zeros(1, 2, 4), boxes[None], torch.zeros(1, 2, 3))
    regions = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 11, 11], [31.0, 31, 41, 41]])
    (found,) = adapter.choose(state, [regions])
    assert found.tolist() == [0, 0, 1]
    assert adapter.choose(state, [regions[:0]])[0].shape == (0,)


@pytest.mark.parametrize(
    ("family", "strides"),
    [
        ("rt_detr", [8, 16, 32]),
        ("rt_detr_v2", [8, 16, 32]),
        ("d_fine", [8, 16, 32]),
        ("deimv2", [8, 16, 32]),
        ("deformable_detr", [8, 16, 32]),
        ("detr", [32]),
        ("conditional_detr", [32]),
        ("rf_detr", [8]),
        ("dab-detr", []),
        ("yolos", []),
    ],
)
def test_the_pyramid_is_what_the_encoder_shows(family, strides):
    adapter = adapter_of(detector(family).eval())
    image = torch.rand(3, 64, 64)
    pyramid = adapter.observe(adapter.prepare([image])).pyramid
    assert pyramid.strides == strides
    assert [tuple(level.shape[2:]) for level in pyramid.levels] == [(64 // s, 64 // s) for s in strides]
    assert pyramid.image_size == (64, 64)


def test_flattened_levels_are_where_their_places_are():
    batch = PreparedBatch(torch.zeros(2, 3, 64, 96), [(64, 96)] * 2, ((0.0,) * 3, (1.0,) * 3), [])
    levels = [torch.randn(2, 5, 64 // s, 96 // s) for s in (8, 16, 32)]
    sequence = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    out = SimpleNamespace(encoder_last_hidden_state=sequence)
    found = pyramid_of(out, SimpleNamespace(num_feature_levels=3), batch)
    assert found.strides == [8, 16, 32]
    assert all(torch.equal(own, level) for own, level in zip(found.levels, levels, strict=True))
    assert pyramid_of(out, SimpleNamespace(num_feature_levels=2), batch).levels == []


def test_a_model_of_transformers_is_taken_as_it_is():
    model = detector("rt_detr")
    adapter = adapter_of(model.inner)
    assert adapter.image_size == 640
    assert adapter_of(detector("detr").inner).image_size == 800
    assert adapter.model.inner is model.inner
    assert adapter.outputs == 4


@pytest.mark.slow
def test_torchvisions_interface():
    model = detector("rt_detr")
    batch = batch_of()
    losses = model(batch.images, batch.targets)
    assert set(losses) == {"loss_vfl", "loss_bbox", "loss_giou"}
    found = model.eval()(batch.images)
    assert [sorted(one) for one in found] == [["boxes", "labels", "scores"]] * 2
    assert all(set(one["labels"].tolist()) <= {1, 2, 3} for one in found)
    with pytest.raises(InputError, match="a detector in training mode needs targets"):
        model.train()(batch.images)
    assert isinstance(model, HubDetector)
