"""A frozen teacher's pass under no_grad and under inference_mode, the modes in turns: processor time, medians.

    python benchmarks/teacher_modes.py

inference_mode's logits cannot be saved for a loss's backward pass, so that they are copied: the third column.
"""

import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from pcdistill.models import build_model


def measure(name: str, model: nn.Module, images: Tensor, repeats: int) -> None:
    """Print one row."""
    model.eval().requires_grad_(False)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    def inference() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
        return logits

    ways: list[Callable[[], object]] = [plain, inference, lambda: inference().clone()]
    times: list[list[float]] = [[] for _ in ways]
    for way in ways * 2:
        way()
    for _ in range(repeats):
        for way, found in zip(ways, times, strict=True):
            started = time.process_time()
            way()
            found.append(time.process_time() - started)
    row = " | ".join(f"{1e3 * statistics.median(found):.2f}" for found in times)
    print(f"| {name} | {row} |", flush=True)


def resnet() -> nn.Module:
    return build_model("cifar/resnet20", num_classes=10, in_channels=3, image_size=32)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | no_grad, ms | inference_mode | with a copy |\n| --- | --- | --- | --- |")
    measure("resnet20, 64 images of 32 px", resnet(), torch.randn(64, 3, 32, 32), 25)
    measure("resnet20, one image", resnet(), torch.randn(1, 3, 32, 32), 200)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=96)
    measure("ViT-Ti, 16 images of 96 px", vit, torch.randn(16, 3, 96, 96), 15)
    compiled = resnet().eval()
    compiled.compile()
    measure("resnet20 compiled, 8 images", compiled, torch.randn(8, 3, 32, 32), 60)


if __name__ == "__main__":
    main()
