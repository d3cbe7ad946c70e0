"""A small detector of every family, on coloured squares; `python -m tests.detection.families` writes the table.

The table of docs/detection.md says which student can learn from which teacher, and what. Each of its cells is trained.
"""

import copy
import functools
from pathlib import Path

import torch
from torch import nn

from pcdistill.detection.data import DetectionBatch
from pcdistill.detection.detectors.build import build_detector
from pcdistill.detection.detectors.pairing import PairingOptions
from pcdistill.detection.distiller import DetectionDistiller, DetectionObjective
from pcdistill.detection.task import observed_pyramids
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.distillation.objective import Term, build_loss
from pcdistill.errors import InputError

CLASSES = ("red", "green", "blue")
SIDE = 64
LOGIT_METHOD, FEATURE_METHOD = "kd", "pkd"
DOCUMENT = Path(__file__).parents[2] / "docs" / "detection.md"
BEGIN = "<!-- table of families: python -m tests.detection.families writes it -->"
END = "<!-- end of the table of families -->"

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 24],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 24, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
WIDE = {"d_model": 32, "num_queries": 20, "decoder_layers": 2, "decoder_ffn_dim": 48}
DETR = {
    **WIDE,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "backbone_config": RESNET,
}
REAL_TIME = {
    **WIDE,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_denoising": 10,
}
RT_RESNET = {**RESNET, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
DINO = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "out_features": ["stage2", "stage4"],
    "image_size": SIDE,
    "patch_size": 8,
    "num_windows": 2,
}
HUB = {  # kind of transformers -> keys of its configuration
    "rt_detr": {**REAL_TIME, "backbone_config": RT_RESNET},
    "rt_detr_v2": {**REAL_TIME, "backbone_config": RT_RESNET},
    "d_fine": {**REAL_TIME, "backbone_config": HGNET},
    "deimv2": {**REAL_TIME, "backbone_config": HGNET},
    "rf_detr": {
        **WIDE,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 4,
        "decoder_n_points": 2,
        "group_detr": 3,
        "backbone_config": DINO,
    },
    "detr": DETR,
    "deformable_detr": {
        **DETR,
        "num_feature_levels": 3,
        "backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]},
    },
    "conditional_detr": DETR,
    "dab-detr": {**{key: value for key, value in DETR.items() if key != "d_model"}, "hidden_size": 32},
    "yolos": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [SIDE, SIDE],
        "num_detection_tokens": 20,
    },
}
TORCHVISION = ("fasterrcnn", "retinanet", "fcos", "ssd")
IN_TABLE = (*TORCHVISION, "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "rf_detr", "detr", "deformable_detr", "yolos")


def detector(family: str, *, seed: int = 0, num_classes: int = 3, **kwargs) -> nn.Module:
    """A detector of the family with random weights, in training mode."""
    torch.manual_seed(seed)
    if family in TORCHVISION:
        kwargs = {"norm": "batch", **kwargs}
        return build_detector(f"{family}/tiny4", num_classes=num_classes, image_size=SIDE, kwargs=kwargs).train()
    kwargs = {**copy.deepcopy(HUB[family]), **kwargs}
    return build_detector(f"hf/{family}", num_classes=num_classes, image_size=SIDE, kwargs=kwargs).train()


def sample(number: int, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image in 0..1 of noise with one or two coloured squares, and its target."""
    g = torch.Generator().manual_seed(number)
    image = 0.3 * torch.rand(3, *size, generator=g)
    boxes, labels = [], []
    for _ in range(1 + number % 2):
        label, side = int(torch.randint(3, (1,), generator=g)), int(torch.randint(16, 28, (1,), generator=g))
        x, y = (int(torch.randint(0, limit - side, (1,), generator=g)) for limit in (size[1], size[0]))
        image[:, y : y + side, x : x + side] = torch.eye(3)[label][:, None, None]
        boxes.append([x, y, x + side, y + side])
        labels.append(label + 1)
    found = torch.tensor(boxes, dtype=torch.float32)
    area = (found[:, 2:] - found[:, :2]).prod(1)
    labels = torch.tensor(labels)
    return image, {"boxes": found, "labels": labels, "area": area, "iscrowd": torch.zeros_like(labels)}


def batch_of(count: int = 2, first: int = 0, sizes: tuple = ((SIDE, SIDE),)) -> DetectionBatch:
    pairs = [sample(first + i, sizes[i % len(sizes)]) for i in range(count)]
    return DetectionBatch([image for image, _ in pairs], [target for _, target in pairs])


def distiller_of(
    student: nn.Module, teacher: TeacherDetector, method: str, weights=(1.0, 1.0), boxes: str = "none", **pairing
) -> DetectionDistiller:
    """The student's own losses and a method, as a recipe would build them."""
    needed = method == FEATURE_METHOD
    context = {**observed_pyramids(student, teacher, batch_of().images, needed=needed)}
    context["num_classes"] = len(CLASSES) + 1
    terms = [
        Term(name, build_loss(name, {}, context=context), weight)
        for name, weight in zip(("detector", method), weights, strict=True)
    ]
    return DetectionDistiller(
        student, DetectionObjective(terms, boxes=boxes), teacher, pairing=PairingOptions(**pairing)
    ).train()


@functools.cache
def _built(family: str, seed: int) -> nn.Module:
    return detector(family, seed=seed)


def train_cell(student_family: str, teacher_family: str, method: str, steps: int = 2) -> str | None:
    """Train a student for some steps; the sentence, if the pair is refused.

    Raises:
        AssertionError: a loss that is not finite, no gradient in the student, or any trace in the teacher.
    """
    student = copy.deepcopy(_built(student_family, 0))
    teacher = TeacherDetector(copy.deepcopy(_built(teacher_family, 1)), student_classes=CLASSES, student=student)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    try:
        distiller = distiller_of(student, teacher, method, (0.0, 1.0))
    except InputError as error:
        return str(error)
    distiller(batch_of())["loss"].backward()
    pulled = [p for p in student.parameters() if p.grad is not None and bool(p.grad.any())]
    assert pulled, "the method does not reach the student"
    distiller = distiller_of(student, teacher, method)
    optimiser = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    for step in range(steps):
        optimiser.zero_grad()
        loss = distiller(batch_of(first=2 * step))["loss"]
        assert torch.isfinite(loss)
        loss.backward()
        optimiser.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
    return None


def table(outcomes: dict[tuple[str, str, str], str | None]) -> str:
    """Markdown: a row for each student, a column for each teacher, and the sentences of what was refused."""
    lines = [
        "| student \\ teacher | " + " | ".join(IN_TABLE) + " |",
        "| --- |" + " --- |" * len(IN_TABLE),
    ]
    for student in dict.fromkeys(student for student, *_ in outcomes):
        cells = []
        for teacher in IN_TABLE:
            trained = [m for m in (LOGIT_METHOD, FEATURE_METHOD) if outcomes[student, teacher, m] is None]
            cells.append(", ".join(trained) or "none")
        lines.append(f"| {student} | " + " | ".join(cells) + " |")
    sentences = sorted({text for text in outcomes.values() if text is not None})
    return "\n".join([*lines, "", *(f'- refused: "{text}"' for text in sentences)])


def outcomes_of(students: tuple[str, ...] = IN_TABLE, steps: int = 2) -> dict[tuple[str, str, str], str | None]:
    """Every cell of these rows of the table, trained."""
    methods = (LOGIT_METHOD, FEATURE_METHOD)
    return {(s, t, m): train_cell(s, t, m, steps) for s in students for t in IN_TABLE for m in methods}


def documented() -> str:
    """The table as it stands in the document."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(outcomes_of())}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
