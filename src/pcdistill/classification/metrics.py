"""Top-1, top-5 and cross-entropy of a classifier over a split: counted on the device, read once at the end."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.distill.teacher import logits_of


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    accelerator: Accelerator,
    *,
    limit: int | None = None,
    channels_last: bool = False,
) -> dict[str, float]:
    """Evaluate a model in eval mode and give it back in the mode that it came in.

    Args:
        model: images [N, C, H, W] -> logits [N, K].
        batches: of (images, target [N], ...), on any device.
        accelerator: where to compute, in which precision, and over which processes to sum.
        limit: stop after the batch that reaches this many samples in this process.
        channels_last: memory format of the images.

    Returns:
        "top1" and "top5" in percent, "loss" in nats per sample, "samples", and "finite": 1.0 unless a logit was not.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(5, dtype=torch.float64, device="cpu")
    sums: Tensor | None = None
    seen = 0
    try:
        for batch in batches:
            images = batch[0].to(accelerator.device, non_blocking=True)
            target = batch[1].to(accelerator.device, non_blocking=True)
            if channels_last and images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = logits_of(model(images)).float()
            # MPS has no float64: the counts stay exact in float32 up to 2^24 samples a batch.
            dtype = torch.float32 if images.device.type == "mps" else torch.float64
            part = count_correct(logits, target).to(dtype)
            sums = part if sums is None else sums + part
            seen += len(target)
            if limit is not None and seen >= limit:
                break
    finally:
        model.train(was_training)
    if sums is not None:
        totals = sums.double().cpu()
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
    correct1, correct5, loss, n, bad = totals.tolist()
    n = max(n, 1.0)
    return {
        "top1": 100 * correct1 / n,
        "top5": 100 * correct5 / n,
        "loss": loss / n,
        "samples": n,
        "finite": float(bad == 0),
    }


def count_correct(logits: Tensor, target: Tensor) -> Tensor:
    """[5] of one batch: correct in the first, correct in the first five, summed cross-entropy, samples, bad logits.

    A soft target counts as its largest class. With fewer than five classes "top-5" is over all of them.
    """
    hard = target if target.ndim == 1 else target.argmax(dim=1)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == hard[:, None]
    loss = F.cross_entropy(logits, target, reduction="sum")
    bad = (~torch.isfinite(logits)).any()
    return torch.stack(
        [top[:, 0].sum(), top.any(dim=1).sum(), loss, torch.full((), len(hard), device=logits.device), bad]
    )
