"""Detectors: the student's own losses are torchvision's, logits meet region by region, gradients reach it alone."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import detection as zoo
from torchvision.ops import MultiScaleRoIAlign

from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.base import pyramid_strides
from pcdistill.detection.detectors.build import build_detector
from pcdistill.detection.detectors.dense import Dense, label_of_centres, with_background
from pcdistill.detection.detectors.pairing import Pairer, PairingOptions
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.detectors.two_stage import TwoStage
from pcdistill.detection.distiller import DetectionDistiller, DetectionObjective
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.objective import Term, build_loss
from pcdistill.errors import InputError

FAMILIES = ("fasterrcnn", "retinanet", "fcos")
CLASSES = ("a", "b", "c")


def detector(family="fasterrcnn", width=4, seed=0, num_classes=3, **kwargs):
    torch.manual_seed(seed)
    return build_detector(f"{family}/tiny{width}", num_classes=num_classes, kwargs={"norm": "batch", **kwargs})


def batch(empty=()):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 80, generator=g), torch.rand(3, 72, 96, generator=g)]
    boxes = [[[10.0, 10, 50, 60], [30.0, 20, 70, 70]], [[5.0, 5, 40, 45]]]
    labels = [[1, 3], [2]]
    targets = []
    for i in range(2):
        own = ([], []) if i in empty else (boxes[i], labels[i])
        targets.append(
            {"boxes": torch.tensor(own[0]).reshape(-1, 4), "labels": torch.tensor(own[1], dtype=torch.int64)}
        )
    return DetectionBatch(images, targets)


def teacher_of(family="fasterrcnn", student=None, **kwargs):
    options = {key: kwargs.pop(key) for key in ("image_size", "classes") if key in kwargs}
    model = detector(family, **{"width": 6, "seed": 1, **kwargs})
    return TeacherDetector(model, student_classes=CLASSES, student=student, **options)


def objective(*methods, student=None, teacher=None, **options):
    context = {"num_classes": len(CLASSES) + 1}
    if teacher is not None:
        seen = adapter_of(student).student_pass(batch().images, batch().targets)
        theirs = teacher.observe(seen.batch).pyramid
        context.update(student=seen.pyramid, teacher=theirs)
    terms = []
    for method in methods:
        terms.append(Term(method, build_loss(method, options if method == methods[-1] else {}, context=context)))
    return DetectionObjective(terms)


def method_options(method):
    return {"stages": 2} if method == "pcd" else {}  # four logits


# One pass of the student


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=str)
def test_the_students_losses_are_torchvisions(family, empty):
    given = batch(empty)
    images, targets = given.images, given.targets
    model = detector(family).train()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    wanted = twin(images, targets)
    torch.manual_seed(3)
    seen = adapter_of(model).student_pass(images, targets)
    assert seen.losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(seen.losses[name], value), name
    sum(wanted.values()).backward()
    sum(seen.losses.values()).backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pyramid_has_the_strides_and_the_padded_size(family):
    model = detector(family).train()
    seen = adapter_of(model).student_pass(batch().images, batch().targets)
    assert seen.pyramid.strides == [4, 8, 16, 32]
    assert seen.pyramid.image_size == (96, 96)  # 72 x 96 and 96 x 80, padded to 32
    assert [tuple(level.shape[2:]) for level in seen.pyramid.levels] == [(24, 24), (12, 12), (6, 6), (3, 3)]
    assert torch.equal(seen.batch.targets[0]["boxes"], batch().targets[0]["boxes"])


def test_strides_are_found_where_no_one_says_them():
    model = zoo.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert pyramid_strides(model.train()) == [32, 32, 64]
    assert model.training
    assert model.backbone.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    resnet = build_detector("retinanet/resnet18", num_classes=2)
    del resnet.backbone.strides
    assert pyramid_strides(resnet) == [8, 16, 32, 64, 128]


# RoI pairing, worked out by hand


class Grid(nn.Module):
    """A backbone that gives one map of stride 4: the image's first channel, averaged."""

    out_channels = 1
    strides = (4,)

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def forward(self, images):
        return OrderedDict([("0", self.gain * nn.functional.avg_pool2d(images[:, :1], 4))])


class Proposals(nn.Module):
    """A region proposal network that always proposes the same boxes."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, images, features, targets=None):
        return [torch.tensor(b) for b in self.boxes], {}


class Predictor(nn.Module):
    """Logits that are multiples of the pooled value, and no box offsets."""

    def __init__(self, factors):
        super().__init__()
        self.cls_score = nn.Linear(1, len(factors), bias=False)
        self.cls_score.weight.data = torch.tensor(factors)[:, None]

    def forward(self, x):
        return self.cls_score(x), x.new_zeros(len(x), 4 * self.cls_score.out_features) + 0 * x.sum()


def hand_made(gain, factors, boxes):
    model = zoo.FasterRCNN(
        Grid(gain),
        rpn_anchor_generator=zoo.rpn.AnchorGenerator(((32,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 1, 2),
        box_head=nn.Flatten(),
        box_predictor=Predictor(factors),
        min_size=32,
        max_size=32,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        box_batch_size_per_image=8,
        box_positive_fraction=1.0,
    )
    model.rpn = Proposals(boxes)
    return model


def test_roi_pairing_worked_out_by_hand():
    """A 32 x 32 image, 1 on its left half and 3 on its right; one proposal on each half, one true box on the right.

    The student's map is the image, the teacher's twice the image. Pooled values: student 1, 3, and 3 for the true box,
    which joins the proposals; teacher 2, 6, 6. Student logits are (0, 1, 2) times the value; the teacher's for its own
    classes (background, y, z, x) are (1, 2, 3, 4) times the value, of which the student's order (x, y) takes 1, 4, 2.
    """
    image = torch.ones(3, 32, 32)
    image[:, :, 16:] = 3
    # one cell away from the edge between the halves, where the bilinear samples would mix them
    left, right, truth = [2.0, 2.0, 10.0, 30.0], [22.0, 2.0, 30.0, 30.0], [22.0, 4.0, 30.0, 30.0]
    student = hand_made(1.0, [0.0, 1.0, 2.0], [[left, right]]).train()
    inner = hand_made(2.0, [1.0, 2.0, 3.0, 4.0], [[[0.0, 0.0, 32.0, 32.0]]])  # its own proposals must not be used
    teacher = TeacherDetector(inner, classes=("y", "z", "x"), student_classes=("x", "y"), student=student)
    distiller = DetectionDistiller(student, objective("detector", "kd"), teacher)
    targets = [{"boxes": torch.tensor([truth]), "labels": torch.tensor([2])}]
    _, pairing, pyramid = distiller.compare(DetectionBatch([image], targets))
    assert pyramid is None
    assert pairing.labels.tolist() == [0, 2, 2]
    torch.testing.assert_close(pairing.student, torch.tensor([[0.0, 1, 2], [0.0, 3, 6], [0.0, 3, 6]]))
    torch.testing.assert_close(pairing.teacher, torch.tensor([[2.0, 8, 4], [6.0, 24, 12], [6.0, 24, 12]]))
    assert pairing.student.requires_grad
    assert not pairing.teacher.requires_grad
    loss = distiller(DetectionBatch([image], targets))
    kd = nn.functional.kl_div(
        (pairing.student / 4).log_softmax(1), (pairing.teacher / 4).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(loss["loss/kd"], 16 * kd.detach())
    torch.testing.assert_close(loss["loss/detector"], loss["loss/classifier"] + loss["loss/box_reg"])
    torch.testing.assert_close(loss["loss"], loss["loss/detector"] + loss["loss/kd"])


def test_proposals_and_images_are_scaled_for_a_teacher_of_another_resolution():
    image = torch.ones(3, 32, 32)
    image[:, :, 16:] = 3
    boxes = [[[2.0, 2.0, 10.0, 30.0], [22.0, 2.0, 30.0, 30.0]]]
    student = hand_made(1.0, [0.0, 1.0, 2.0], boxes).train()
    teacher = TeacherDetector(
        hand_made(1.0, [0.0, 1.0, 2.0], boxes), student_classes=("x", "y"), student=student, image_size=64
    )
    seen = TwoStage(student).student_pass([image], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}])
    found = teacher.observe(seen.batch)
    assert found.pyramid.levels[0].shape == (1, 1, 16, 16)
    pairing = Pairer(TwoStage(student), teacher, PairingOptions())(seen, found)
    torch.testing.assert_close(pairing.teacher, pairing.student.detach(), atol=1e-3, rtol=0)
    assert found.pyramid.image_size == (32, 32)  # boxes are the student's


# Dense detectors


def ratings(family, outputs):
    """Per image (rating, anchor) of every anchor, best first, by a loop."""
    found = []
    for n, image in enumerate(outputs["cls_logits"]):
        rated = []
        for a, logits in enumerate(image):
            rating = logits[1:].max().sigmoid()
            if family == "fcos":
                rating = (rating * outputs["bbox_ctrness"][n, a, 0].sigmoid()).sqrt()
            rated.append((-rating.item(), a))
        found.append([(-rating, a) for rating, a in sorted(rated)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
@pytest.mark.parametrize(("top_k", "above"), [(7, None), (100, 40), (10**6, None)])
def test_dense_logits_are_those_of_the_anchors_that_the_teacher_rates_highest(family, top_k, above):
    student = detector(family).train()
    teacher = teacher_of(family, student)
    head = teacher.model.head
    with torch.no_grad():  # spread the ratings, which a fresh head has all at 0.01
        head.classification_head.cls_logits.weight.mul_(60)
        if family == "fcos":
            head.regression_head.bbox_ctrness.weight.mul_(60)
    images, targets = batch().images, batch().targets
    adapter = Dense(student)
    seen = adapter.student_pass(images, targets)
    found = teacher.observe(seen.batch)
    outputs = head(found.pyramid.levels)
    rated = ratings(family, outputs)
    threshold = 0.0 if above is None else rated[0][above][0] + 1e-7
    pairing = Pairer(adapter, teacher, PairingOptions("auto", top_k, threshold))(seen, found)
    rows = [(n, a) for n in range(2) for rating, a in rated[n][:top_k] if rating >= threshold]
    assert len(pairing.labels) == len(rows) == len(pairing.student) == len(pairing.teacher)
    if above is not None:
        assert 0 < sum(n == 0 for n, _ in rows) <= above
    own, theirs = seen.state.outputs["cls_logits"], outputs["cls_logits"]
    expected = [  # sorted, because equal ratings may come in any order
        (n, *own[n, a, 1:].tolist(), *theirs[n, a, 1:].tolist(), labels_of(seen, n, a)) for n, a in rows
    ]
    first = sum(n == 0 for n, _ in rows)  # image by image
    actual = [
        (int(r >= first), *s[1:], *t[1:], label)
        for r, (s, t, label) in enumerate(
            zip(pairing.student.tolist(), pairing.teacher.tolist(), pairing.labels.tolist(), strict=True)
        )
    ]
    assert sorted(actual) == sorted(expected)
    assert not pairing.student[:, 0].any()
    assert not pairing.teacher[:, 0].any()


def labels_of(seen, n, a):
    return label_of_centres(seen.state.anchors[n][a][None], seen.batch.targets[n]).item()


def test_a_softmax_with_a_zero_for_background_is_the_sigmoid_of_one_class():
    logits = torch.tensor([[9.0, 0.7, -2.0], [-5.0, -1.0, 3.0]])  # column 0 belongs to no label
    one = with_background(logits)[:, [0, 2]]
    torch.testing.assert_close(one.softmax(dim=1)[:, 1], logits[:, 2].sigmoid())
    assert with_background(logits)[:, [0, 2, 1]].tolist() == [[0.0, -2.0, pytest.approx(0.7)], [0, 3, -1]]


def test_the_label_of_a_centre_is_that_of_the_smallest_box_around_it():
    target = {
        "boxes": torch.tensor([[0.0, 0, 40, 40], [10.0, 10, 20, 20], [30.0, 30, 60, 60]]),
        "labels": torch.tensor([4, 7, 2]),
    }
    anchors = torch.tensor([[12.0, 12, 18, 18], [0.0, 0, 10, 10], [29.0, 29, 41, 41], [90.0, 90, 99, 99]])
    assert label_of_centres(anchors, target).tolist() == [7, 4, 2, 0]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert label_of_centres(anchors, none).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("family", "options"), [("retinanet", {"anchor_scale": 6}), ("fcos", {})], ids=str)
def test_where_anchors_differ_the_teachers_regions_are_compared(family, options):
    student = detector("retinanet").train()
    same, other = teacher_of("retinanet", student), teacher_of(family, student, **options)
    seen = adapter_of(student).student_pass(batch().images, batch().targets)
    asked = PairingOptions("anchors")
    assert len(Pairer(Dense(student), same, asked)(seen, same.observe(seen.batch)).labels) == 200
    with pytest.raises(InputError, match="detection.pairing: the anchors of student and teacher are not the same"):
        Pairer(Dense(student), other, asked)(seen, other.observe(seen.batch))
    found = other.observe(seen.batch)
    pairing = Pairer(Dense(student), other, PairingOptions())(seen, found)
    assert torch.equal(pairing.teacher, other.regions(found, top_k=100, threshold=0.0).logits)


def test_anchors_are_refused_where_one_of_the_two_has_none():
    student = detector("retinanet").train()
    with pytest.raises(InputError, match="a RetinaNet and a FasterRCNN have no anchors in common"):
        Pairer(Dense(student), teacher_of("fasterrcnn", student), PairingOptions("anchors"))


# The teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_detectors_have_equal_logits_and_pyramids(family):
    student = detector(family, norm="frozen").train()
    teacher = TeacherDetector(copy.deepcopy(student), student_classes=CLASSES, student=student)
    distiller = DetectionDistiller(
        student, objective("detector", "kd", "pkd", student=student, teacher=teacher), teacher
    )
    found = distiller.compare(batch())
    torch.testing.assert_close(found.pairing.student, found.pairing.teacher)
    assert len(found.pairing.labels) > 0
    for own, theirs in zip(found.seen.pyramid.levels, found.teacher_pyramid.levels, strict=True):
        assert torch.equal(own, theirs)
    result = distiller(batch())
    assert result["loss/kd"] < 1e-6
    assert result["loss/pkd"] == 0


def test_the_teacher_gets_the_students_pixels_in_its_own_normalisation():
    images = batch().images
    student = detector()
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    teacher = teacher_of(student=student, **stats)
    own = adapter_of(student).prepare(images)
    wanted, _ = teacher.model.transform(images)
    torch.testing.assert_close(teacher.prepare(own).pixels, wanted.tensors, atol=1e-5, rtol=0)
    assert teacher_of(student=student).prepare(own).pixels is own.pixels


def test_the_teacher_stays_as_it_is_and_out_of_the_state():
    student = detector().train()
    teacher = teacher_of(student=student)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    distiller = DetectionDistiller(student, objective("detector", "kd"), teacher).train()
    distiller(batch())["loss"].backward()
    assert not teacher.model.training
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
    assert all(key.startswith(("student.", "objective.")) for key in distiller.state_dict())
    assert distiller.teacher is teacher
    assert not teacher.train().model.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["kd", "pcd", "dkd", "dist", "fpn-fitnet", "mgd", "dmkd", "fgd", "pkd", "dfmsd"])
def test_gradients_reach_the_student_and_the_adapters_only(family, method):
    student = detector(family).train()
    teacher = teacher_of(family, student)
    distiller = DetectionDistiller(
        student, objective(method, student=student, teacher=teacher, **method_options(method)), teacher
    ).train()
    distiller(batch())["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    backbone = [p.grad for p in student.backbone.parameters()]
    assert any(g is not None and g.any() for g in backbone)
    if method in ("kd", "pcd", "dkd", "dist"):
        head = student.roi_heads if family == "fasterrcnn" else student.head.classification_head
        assert any(p.grad is not None and p.grad.any() for p in head.parameters())
        box = student.roi_heads.box_predictor.bbox_pred if family == "fasterrcnn" else student.head.regression_head
        assert all(p.grad is None or not p.grad.any() for p in box.parameters())  # boxes are not distilled
    else:
        assert all(p.grad is not None for p in distiller.objective.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["pcd", "dfmsd", "fgd"])
def test_images_without_boxes_are_no_problem(family, method):
    student = detector(family).train()
    teacher = teacher_of(family, student)
    distiller = DetectionDistiller(
        student,
        objective("detector", method, student=student, teacher=teacher, **method_options(method)),
        teacher,
        pairing=PairingOptions(threshold=0.99),
    ).train()
    for empty in ((0,), (0, 1)):
        loss = distiller(batch(empty))["loss"]
        loss.backward()
        assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_gives_a_finite_loss_in_float32(family):
    student = detector(family).train()
    teacher = teacher_of(family, student)
    terms = objective("detector", "kd", "dfmsd", student=student, teacher=teacher)
    distiller = DetectionDistiller(student, terms, teacher).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distiller(batch())["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_the_loss_is_the_weighted_sum_of_what_is_reported():
    student = detector().train()
    teacher = teacher_of(student=student)
    terms = objective("detector", "kd", "fpn-fitnet", student=student, teacher=teacher).terms
    weighted = [Term(t.name, t.loss, weight) for t, weight in zip(terms, (2.0, 0.5, 3.0), strict=True)]
    result = DetectionDistiller(student, DetectionObjective(weighted), teacher)(batch())
    parts = [2.0 * result["loss/detector"], 0.5 * result["loss/kd"], 3.0 * result["loss/fpn-fitnet"]]
    torch.testing.assert_close(result["loss"].detach(), sum(parts))
    assert [name for name, value in result.items() if value.requires_grad] == ["loss"]
    assert all(part > 0 for part in parts)


def test_options_of_the_pairing_reach_dense_detectors():
    student = detector("retinanet").train()
    teacher = teacher_of("retinanet", student)
    for options, rows in (({"top_k": 3}, 6), ({"threshold": 1.0}, 0), ({}, 200)):
        compared = DetectionDistiller(
            student, objective("detector", "kd"), teacher, pairing=PairingOptions(**options)
        ).compare(batch())
        assert compared.pairing.student.shape == compared.pairing.teacher.shape == (rows, 4)


def test_a_teacher_that_no_term_needs_is_not_asked(monkeypatch):
    student = detector().train()
    teacher = teacher_of(student=student)
    monkeypatch.setattr(teacher, "observe", None)
    assert DetectionDistiller(student, objective("detector"), teacher)(batch())["loss"].isfinite()


def test_without_a_teacher_the_student_learns_from_its_own_losses():
    student = detector().train()
    result = DetectionDistiller(student, objective("detector"))(batch())
    parts = [result[f"loss/{name}"] for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")]
    torch.testing.assert_close(result["loss"].detach(), sum(parts))
    with pytest.raises(InputError, match="the terms detector, kd need a teacher"):
        DetectionDistiller(student, objective("detector", "kd"))
    with pytest.raises(InputError, match="the terms detector, ce need a teacher"):
        DetectionDistiller(student, objective("detector", "ce"))  # there are no regions to look at
    with pytest.raises(ValueError, match="got none: is the student in eval mode"):
        objective("detector").terms[0].loss({})


# Classes


def test_classes_are_matched_by_name_and_detections_are_renumbered():
    model = detector(num_classes=4)
    teacher = TeacherDetector(model, classes=("c", "d", "a", "b"), student_classes=CLASSES)
    assert teacher.columns.tolist() == [0, 3, 4, 1]
    assert teacher.left_out == 1
    boxes = torch.arange(20.0).reshape(5, 4)
    found = [{"boxes": boxes, "labels": torch.tensor([1, 2, 3, 4, 2]), "scores": torch.arange(5.0)}]
    model.forward = lambda images: [dict(one) for one in found]
    (seen,) = teacher(batch().images[:1])
    assert seen["labels"].tolist() == [3, 1, 2]
    assert seen["scores"].tolist() == [0.0, 2.0, 3.0]
    assert torch.equal(seen["boxes"], boxes[[0, 2, 3]])


def test_a_teacher_with_other_classes_is_refused_by_name():
    with pytest.raises(InputError, match="the teacher does not know 1 of the data's 3 classes: c"):
        TeacherDetector(detector(), classes=("a", "b", "x"), student_classes=CLASSES)
    with pytest.raises(InputError, match="the teacher gives 4 classes of boxes, but 3 are named"):
        TeacherDetector(detector(num_classes=4), student_classes=CLASSES)


def test_what_is_no_detector_of_boxes_is_refused():
    with pytest.raises(InputError, match="Linear is not a detector that can be distilled"):
        adapter_of(nn.Linear(1, 1))
    mask = zoo.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    with pytest.raises(InputError, match="MaskRCNN predicts more than boxes"):
        adapter_of(mask)
