"""Top-1, top-5 and cross-entropy of a classifier over a split: counted on the device, read once at the end."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.data.loader import Batch
from pcdistill.distillation.teacher import Teacher, logits_of
from pcdistill.engine.loop import Metric
from pcdistill.engine.modes import evaluating
from pcdistill.engine.placement import Placement
from pcdistill.errors import InputError


def top1_metric(num_classes: int, lr: float) -> Metric:
    """Top-1 picks the best epoch; training stops when it collapses to chance.

    Args:
        num_classes: C; chance is 100 / C percent.
        lr: base learning rate, for the message.
    """
    return Metric("top1", _training_top1, Collapse(100 / num_classes, lr))


def _training_top1(counts: dict[str, float]) -> dict[str, float]:
    return {"top1": 100 * counts["correct"] / max(counts["counted"], 1.0)} if "correct" in counts else {}


def near_chance(chance: float) -> float:
    """Percent below which top-1 counts as near `chance`: half more, but no more than a tenth of the way to 100."""
    return min(1.5 * chance, chance + (100 - chance) / 10)


@dataclass(frozen=True)
class Collapse:
    """Gives a reason to stop when top-1, once well above chance, is back at it for two epochs.

    Attributes:
        chance: percent.
        lr: base learning rate, for the message.
    """

    chance: float
    lr: float

    def __call__(self, rows: list[dict[str, float]]) -> str | None:
        values = [row["val/top1"] for row in rows]
        if len(values) < 2:
            return None
        best = max(values[:-1])
        # Of two or three classes chance is half or a third of all: "three times" would never be reached.
        well_above = min(3 * self.chance, (100 + self.chance) / 2)
        if best <= well_above or max(values[-2:]) >= near_chance(self.chance):
            return None
        return (
            f"top1 has collapsed to {values[-1]:.1f} % (chance is {self.chance:.1f} %) after a best of {best:.1f} % in "
            f"epoch {values.index(best) + 1}: the steps are too large; lower optim.lr (now {self.lr:g}) or the "
            "distillation weight, or use normalize: groups with PCD"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    placement: Placement,
    *,
    limit: int | None = None,
) -> dict[str, float]:
    """Evaluate a model in eval mode and give it back in the mode that it came in.

    Args:
        model: images [N, C, H, W] -> logits [N, K].
        batches: on any device; images without a label are not counted.
        placement: where to compute, in which precision, and over which processes to sum.
        limit: stop after the batch that reaches this many samples in this process.

    Returns:
        "top1" and "top5" in percent, "loss" in nats per sample, "samples", and "finite": 1.0 unless a logit was not.

    Raises:
        InputError: no image has a label.
    """
    accelerator = placement.accelerator
    totals = torch.zeros(5, dtype=torch.float64, device="cpu")
    sums: Tensor | None = None
    seen = 0
    with evaluating(model), placement.outside_steps():
        for batch in batches:
            batch = batch.to(placement.frozen)
            with accelerator.autocast():
                logits = logits_of(model(batch.images)).float()
            # MPS has no float64: the counts stay exact in float32 up to 2^24 samples a batch.
            dtype = torch.float32 if logits.device.type == "mps" else torch.float64
            known = batch.labelled
            labelled = (logits, batch.target) if known is None else (logits[known], batch.target[known])
            part = count_correct(*labelled).to(dtype)
            sums = part if sums is None else sums + part
            seen += len(batch)
            if limit is not None and seen >= limit:
                break
    if isinstance(model, Teacher):
        model.finish()
    if sums is not None:
        totals = sums.double().cpu()
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
    correct1, correct5, loss, n, bad = totals.tolist()
    if n == 0:
        raise InputError("none of the images to evaluate on has a label; accuracy needs some that do")
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
