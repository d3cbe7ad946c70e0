"""What a detection run leaves for its page: images, boxes, counts of classes, masks."""

import numpy as np
import pytest
import torch


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
    counts = dict(zip(samples["classes"].tolist(), samples["class_boxes"].tolist(), strict=True))
    labels = np.concatenate([record.labels for record in data.test.split.records])
    assert counts == {name: int((labels == k).sum()) for k, name in enumerate(data.classes, start=1)}
