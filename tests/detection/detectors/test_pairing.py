"""Any detector teaches any: every pair of families is trained, regions meet, and boxes are distilled on them."""

import pytest
import torch

from pcdistill.detection.detectors.base import Adapter, Candidates, label_of_boxes, overlapping_most
from pcdistill.detection.detectors.pairing import Pairer, PairingOptions
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.distiller import box_loss
from pcdistill.detection.teacher import TeacherDetector
from tests.detection.families import (
    CLASSES,
    FEATURE_METHOD,
    IN_TABLE,
    LOGIT_METHOD,
    TORCHVISION,
    batch_of,
    detector,
    distiller_of,
    documented,
    outcomes_of,
    table,
    train_cell,
)

PAIRS = [("fasterrcnn", "rt_detr"), ("rt_detr", "fcos"), ("retinanet", "detr"), ("ssd", "d_fine"), ("rf_detr", "ssd")]


@pytest.mark.slow
def test_every_family_learns_from_every_other_as_the_document_says():
    """Every third student here; all of them where the table is made."""
    outcomes = outcomes_of(IN_TABLE[::3], steps=1)
    assert all(outcome is None for (*_, method), outcome in outcomes.items() if method == LOGIT_METHOD)
    rows = table(outcomes).splitlines()
    assert len(rows) > 4
    assert set(rows) <= set(documented().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_some_pairs_of_families(student, teacher):
    for method in (LOGIT_METHOD, FEATURE_METHOD):
        refused = train_cell(student, teacher, method, steps=1)
        assert refused is None or "no level in common" in refused


def pair_of(student_family, teacher_family, num_classes=3, classes=None, **options):
    student = detector(student_family)
    teacher = TeacherDetector(
        detector(teacher_family, seed=1, num_classes=num_classes),
        student_classes=CLASSES,
        classes=classes,
        student=student,
        image_size=options.pop("image_size", None),
    )
    given = batch_of()
    seen = adapter_of(student).student_pass(given.images, given.targets)
    found = teacher.observe(seen.batch)
    return Pairer(adapter_of(student), teacher, PairingOptions(**options))(seen, found), seen, found, teacher


@pytest.mark.parametrize("where", ["auto", *(pytest.param(w, marks=pytest.mark.slow) for w in ("student", "teacher"))])
@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, ("fasterrcnn", "fasterrcnn"), ("rt_detr", "rt_detr")])
def test_both_are_read_at_the_same_regions(student, teacher, where):
    pairing, seen, _, _ = pair_of(student, teacher, where=where, top_k=15, boxes=True)
    rows = len(pairing.labels)
    assert rows > 0
    assert pairing.student.shape == pairing.teacher.shape == (rows, 4)
    assert not torch.allclose(pairing.student, pairing.teacher)  # each is read from a model of its own
    assert pairing.student_boxes.shape == pairing.teacher_boxes.shape == (rows, 4)
    if not (where != "teacher" and student == "fasterrcnn"):  # its training proposals are not limited
        assert rows <= 2 * 15
    assert pairing.student.requires_grad
    assert pairing.student_boxes.requires_grad
    assert not pairing.teacher.requires_grad
    assert not pairing.teacher_boxes.requires_grad
    own = torch.autograd.grad(sum(seen.losses.values()), pairing.places, allow_unused=True, retain_graph=True)
    term = torch.autograd.grad(pairing.student.square().sum(), pairing.places, allow_unused=True)
    assert any(a is not None and b is not None and a.any() and b.any() for a, b in zip(own, term, strict=True))


@pytest.mark.parametrize("teacher", ["fasterrcnn", "fcos", "ssd", "rt_detr", "detr"])
def test_regions_are_what_a_detector_rates_highest_and_are_in_its_image(teacher):
    _, _, found, held = pair_of("retinanet", teacher)
    regions = held.regions(found, top_k=7, threshold=0.0)
    assert [len(boxes) for boxes in regions.boxes] == [7, 7]
    for boxes in regions.boxes:
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
    everything = held.adapter.candidates(found.state)
    for i, part in enumerate(regions.scores.split(7)):
        assert (part[:-1] >= part[1:]).all()
        best = held.adapter.rate(everything[i].logits, everything[i].quality).max()
        torch.testing.assert_close(part[0], best)
    high = float(regions.scores.max()) + 1e-3
    assert len(held.regions(found, top_k=7, threshold=min(high, 1.0)).scores) == 0


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet", "ssd", "rt_detr", "detr"])
def test_a_detector_read_at_its_own_regions_says_what_it_said(family):
    """Asked where its own boxes are, it answers with their logits, and with their boxes."""
    _, _, found, teacher = pair_of("retinanet", family)
    regions = teacher.regions(found, top_k=5, threshold=0.0)
    if family == "fasterrcnn":  # pools the box itself, and not the proposal that it came from
        pooled = teacher.logits_at(found, regions.boxes)
        assert pooled.shape == regions.logits.shape
        return
    torch.testing.assert_close(teacher.logits_at(found, regions.boxes, regions.logits), regions.logits)
    boxes = torch.cat(regions.boxes)
    torch.testing.assert_close(teacher.boxes_at(found, regions.boxes, regions.logits), boxes)


@pytest.mark.parametrize("teacher", ["fasterrcnn", "retinanet", "ssd", "rt_detr", "detr"])
def test_classes_are_chosen_before_regions_are_rated(teacher):
    classes = ("blue", "other", "green", "red", "more")
    pairing, _, found, held = pair_of("fcos", teacher, num_classes=5, classes=classes)
    assert held.columns.tolist() == [0, 4, 3, 1]
    assert pairing.teacher.shape[1] == 4
    regions = held.regions(found, top_k=5, threshold=0.0)
    shares = [
        held.adapter.rate(one.logits[:, [0, 4, 3, 1]], one.quality) for one in held.adapter.candidates(found.state)
    ]
    torch.testing.assert_close(regions.scores[0], shares[0].max())


@pytest.mark.parametrize(("student", "teacher"), [("fasterrcnn", "fcos"), ("fcos", "fasterrcnn"), ("fcos", "rt_detr")])
def test_a_teacher_of_another_resolution_has_its_regions_scaled(student, teacher):
    pairing, _, found, held = pair_of(student, teacher, image_size=128, boxes=True, top_k=10)
    assert held.factor == 2.0
    assert pairing.teacher_boxes.max() <= 64 * 1.5
    regions = held.regions(found, top_k=10, threshold=0.0)
    own = held.adapter.regions(found.state, top_k=10, threshold=0.0)
    for boxes, scaled in zip(own.boxes, regions.boxes, strict=True):
        torch.testing.assert_close(boxes, 2 * scaled)


@pytest.mark.parametrize("kind", ["l1", "giou"])
@pytest.mark.parametrize(("student", "teacher"), [("fasterrcnn", "fasterrcnn"), ("retinanet", "retinanet"), *PAIRS])
def test_boxes_are_distilled_into_the_student_alone(student, teacher, kind):
    model = detector(student)
    held = TeacherDetector(detector(teacher, seed=1), student_classes=CLASSES, student=model)
    distiller = distiller_of(model, held, LOGIT_METHOD, (0.0, 0.0), boxes=kind)
    result = distiller(batch_of())
    assert result["loss/boxes"] > 0
    torch.testing.assert_close(result["loss"].detach(), result["loss/boxes"])
    result["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in held.parameters())
    without = distiller_of(model, held, LOGIT_METHOD)(batch_of())
    assert "loss/boxes" not in without


def test_the_box_loss_worked_out_by_hand():
    """Image of 10 x 20: an offset of 1 pixel in x at both sides is 2 / 20; the second region is surely background."""

    class Given:
        student_boxes = torch.tensor([[1.0, 0, 5, 4], [0.0, 0, 9, 9]])
        teacher_boxes = torch.tensor([[0.0, 0, 4, 4], [5.0, 5, 6, 6]])
        teacher = torch.tensor([[-50.0, 0, 0], [50.0, 0, 0]])

    assert box_loss(Given, "l1", (10, 20)).item() == pytest.approx(0.1, rel=1e-4)
    overlap, union = 3 * 4, 5 * 4
    assert box_loss(Given, "giou", (10, 20)).item() == pytest.approx(1 - overlap / union, rel=1e-4)


def test_without_regions_there_is_no_loss_and_no_fault():
    model = detector("rt_detr")
    held = TeacherDetector(detector("fcos", seed=1), student_classes=CLASSES, student=model)
    distiller = distiller_of(model, held, LOGIT_METHOD, boxes="giou", threshold=0.99)
    result = distiller(batch_of())
    assert result["loss/boxes"] == 0
    result["loss"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_candidate_that_overlaps_most_or_else_the_nearest():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 20, 20], [80.0, 80, 90, 90]])
    wanted = torch.tensor([[0.0, 0, 9, 9], [1.0, 1, 19, 19], [95.0, 95, 99, 99], [22.0, 0, 30, 9]])
    assert overlapping_most(boxes, wanted).tolist() == [0, 1, 2, 1]
    assert overlapping_most(boxes, wanted[:0]).tolist() == []
    empty = torch.tensor([[5.0, 5, 5, 5], [12.0, 0, 12, 0]])  # without area, as a fresh FCOS makes them
    assert overlapping_most(torch.cat([empty, boxes]), torch.cat([empty[:1], wanted])).tolist() == [2, 2, 3, 4, 3]


def test_labels_are_those_of_boxes_that_overlap_by_half():
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 40, 40]]), "labels": torch.tensor([3, 7])}
    boxes = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 40, 30], [30.0, 30, 70, 70]])
    assert label_of_boxes(boxes, target).tolist() == [3, 7, 0]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert label_of_boxes(boxes, none).tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", IN_TABLE)
def test_every_family_answers_for_the_whole_seam(family):
    model = detector(family)
    adapter = adapter_of(model)
    assert isinstance(adapter, Adapter)
    assert adapter.outputs == 4
    given = batch_of()
    seen = adapter.student_pass(given.images, given.targets)
    model.eval()
    observed = adapter.observe(adapter.prepare(given.images))
    assert all(isinstance(found, Candidates) for found in adapter.candidates(observed.state))
    regions = adapter.regions(observed.state, top_k=4, threshold=0.0)
    at = adapter.logits_at(observed.state, regions.boxes, regions.logits)
    assert at.shape == regions.logits.shape == (len(regions.scores), 4)
    assert adapter.boxes_at(observed.state, regions.boxes, regions.logits).shape == (len(at), 4)
    assert [sorted(one) for one in adapter.predict(given.images)] == [["boxes", "labels", "scores"]] * 2
    assert seen.pyramid.strides == observed.pyramid.strides
    assert len(seen.batch.targets) == 2
    assert family not in TORCHVISION or adapter.image_size == 64
