"""Pictures of detections: what is on the canvas, in which column, and folders that leave nothing to draw."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from pcdistill.detection import pictures
from pcdistill.detection.pictures import write_compare_pictures, write_run_pictures


def make_samples(path, *, teacher=True, masks=True):
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array(["cat", "dog", "a_b$c"])}
    for i, (height, width) in enumerate([(40, 60), (64, 48)]):
        arrays[f"image_{i}"] = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        found = {
            "truth": ([[5, 5, 30, 30]], [1], None),
            "teacher": ([[6, 6, 30, 30], [1, 1, 9, 9]], [1, 3], [0.9, 0.31]),
            "student": ([[6, 6, 30, 30], [1, 1, 9, 9]], [2, 1], [0.4, 0.2]),
        }
        for who, (boxes, labels, scores) in found.items():
            if who == "teacher" and not teacher:
                continue
            arrays[f"{who}_{i}_boxes"] = np.array(boxes, dtype=np.float32)
            arrays[f"{who}_{i}_labels"] = np.array(labels, dtype=np.float32)
            if scores is not None:
                arrays[f"{who}_{i}_scores"] = np.array(scores, dtype=np.float32)
        if masks:
            arrays[f"extent_{i}"] = np.array([64.0, 64.0])
            for stride in (8, 16):
                arrays[f"mask_{i}_{stride}"] = (rng.uniform(size=(64 // stride, 64 // stride)) < 0.5).astype(np.uint8)
                arrays[f"channels_{i}_{stride}"] = np.array([1, 0, 1, 1], dtype=np.uint8)
    path.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path / "samples.npz", **arrays)
    return path


def boxes_of(ax):
    return [p.get_bbox().extents.tolist() for p in ax.patches if isinstance(p, Rectangle)]


def test_a_run_gets_its_detections_and_masks(tmp_path):
    run = make_samples(tmp_path / "run")
    names = [path.name for path in write_run_pictures(run)]
    assert names == ["1_detections.png", "2_masks_of_DFMSD.png"]
    for name in names:
        assert imread(run / "pictures" / name).std() > 0.1
    first = (run / "pictures" / names[0]).read_bytes()
    write_run_pictures(run)
    assert (run / "pictures" / names[0]).read_bytes() == first


def test_boxes_stand_in_their_columns_and_weak_ones_are_left_out(tmp_path):
    samples = pictures.read_samples(make_samples(tmp_path / "run"))
    figure = pictures.draw_detections({who: (samples, who) for who in ("truth", "teacher", "student")})
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["truth", "teacher", "student"]
    assert [len(boxes_of(ax)) for ax in axes[0]] == [1, 2, 1]  # the student's second has a score of 0.2
    assert boxes_of(axes[1][0]) == [[5, 5, 30, 30]]
    assert [text.get_text() for text in axes[0][1].texts] == ["a_b$c .31", "cat .90"]  # the surest on top
    assert [text.get_text() for text in axes[0][2].texts] == ["dog .40"]


def test_masks_lie_on_the_part_of_the_image_that_they_are_about(tmp_path):
    samples = pictures.read_samples(make_samples(tmp_path / "run"))
    figure = pictures.draw_masks(samples)
    axes = np.array(figure.axes).reshape(4, 3)
    assert [ax.get_title() for ax in axes[0]] == ["truth", "stride 8", "stride 16"]
    _, shade = axes[0][1].images
    assert shade.get_extent() == [0, 64, 64, 0]  # the padded batch, of which the image is a part
    assert axes[0][1].get_xlim() == (0, 60)
    assert axes[0][1].get_ylim() == (40, 0)
    assert np.array_equal(shade.get_array()[..., 3] > 0, samples["mask_0_8"] == 0)
    assert np.array_equal(axes[1][1].images[0].get_array(), 1 - samples["channels_0_8"][None])


def test_a_comparison_has_a_column_for_every_method(tmp_path, monkeypatch):
    runs = {
        "none": make_samples(tmp_path / "none", teacher=False, masks=False),
        "kd": make_samples(tmp_path / "kd", masks=False),
        "gone": tmp_path / "gone",
    }
    drawn = []
    whole = pictures.draw_detections
    monkeypatch.setattr(pictures, "draw_detections", lambda columns: drawn.append(list(columns)) or whole(columns))
    (path,) = write_compare_pictures(tmp_path / "out", runs)
    assert drawn == [["truth", "teacher", "none", "kd"]]
    assert imread(path).shape[2] in (3, 4)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off"])
def test_without_readable_samples_there_are_no_pictures(tmp_path, content):
    if content is not None:
        (tmp_path / "samples.npz").write_bytes(content)
    assert write_run_pictures(tmp_path) == []
    assert write_compare_pictures(tmp_path / "out", {"kd": tmp_path}) == []
    assert not (tmp_path / "out").exists()


def test_an_image_on_which_nothing_was_found_is_drawn(tmp_path):
    run = make_samples(tmp_path / "run")
    arrays = dict(np.load(run / "samples.npz"))
    arrays["student_0_boxes"] = np.zeros((0, 4), dtype=np.float32)
    arrays["student_0_labels"] = arrays["student_0_scores"] = np.zeros(0, dtype=np.float32)
    np.savez_compressed(run / "samples.npz", **arrays)
    assert len(write_run_pictures(run)) == 2


@pytest.mark.slow
def test_samples_hold_what_was_found_and_masked(tmp_path):
    from pcdistill.data.loader import Stream
    from pcdistill.detection.data import build_detection_data
    from pcdistill.detection.detectors.build import build_detector
    from pcdistill.detection.distiller import DetectionDistiller, DetectionObjective
    from pcdistill.detection.samples import write_samples
    from pcdistill.detection.task import observed_pyramids
    from pcdistill.detection.teacher import TeacherDetector
    from pcdistill.distillation.objective import Term
    from pcdistill.losses.detector import DetectorLoss
    from pcdistill.losses.dfmsd import DFMSDLoss
    from pcdistill.recipe import DataConfig

    torch.manual_seed(0)
    data = build_detection_data(DataConfig("digits-detection", batch_size=8, image_size=48, limit=8), Stream())
    student, model = (build_detector(f"fasterrcnn/tiny{w}", num_classes=10, image_size=48) for w in (4, 6))
    teacher = TeacherDetector(model, student_classes=data.classes, student=student)
    levels = observed_pyramids(student, teacher, [torch.rand(3, 48, 48)] * 2, needed=True)
    loss = DFMSDLoss(levels["student"], levels["teacher"])
    objective = DetectionObjective([Term("detector", DetectorLoss()), Term("dfmsd", loss)])
    objective.set_progress(progress=0.9, epoch=1.0, total_epochs=2)
    student.train()
    write_samples(tmp_path / "samples.npz", DetectionDistiller(student, objective, teacher), student, data)
    assert student.training
    samples = np.load(tmp_path / "samples.npz")
    chosen = [i for i in range(20) if len(data.test.split.records[i].boxes)][:6]
    for i, index in enumerate(chosen):
        image, target = data.test.split.sample(index)
        assert np.array_equal(samples[f"image_{i}"], image.permute(1, 2, 0).numpy())
        assert np.array_equal(samples[f"truth_{i}_boxes"], target["boxes"].numpy())
    assert samples["classes"].tolist() == list(data.classes)
    found = teacher([data.test.split.sample(chosen[2])[0].float() / 255])[0]
    np.testing.assert_allclose(samples["teacher_2_boxes"], found["boxes"].numpy(), atol=1e-4)
    mask = samples["mask_0_4"]
    assert mask.shape == (16, 16)  # 48 pixels padded to 64
    assert (mask == 0).sum() == 128  # half of the places
    assert samples["extent_0"].tolist() == [64, 64]
    assert len(write_run_pictures(tmp_path)) == 2
