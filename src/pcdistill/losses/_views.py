"""What the losses on two views of each image share: the check of their rows, and masks by the teacher's confidence."""

from typing import Literal

from torch import Tensor

from pcdistill.losses._common import shape

Views = Literal[1, 2]


def check_views(views: int, logits: Tensor | None = None) -> None:
    """Raise unless views is 1 or 2 and, where logits are given, they hold that many equal views."""
    if isinstance(views, bool) or views not in (1, 2):
        raise ValueError(f"views must be 1 or 2, got {views!r}")
    if logits is not None and logits.shape[0] % views:
        raise ValueError(
            f"student_logits must be [2 N, C], the weak views before the strong ones, got {shape(logits)}; "
            "a loader with one view of each image needs views=1"
        )


def confidence_masks(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which samples [N] and classes [C] the teacher is at most as sure of as of the median one, as 0 or 1.

    The confidence of a sample is its largest probability at temperature 1, that of a class its sum over the batch.
    """
    probabilities = teacher_logits.softmax(dim=1)
    return _at_most_median(probabilities.amax(dim=1)), _at_most_median(probabilities.sum(dim=0))


def _at_most_median(confidence: Tensor) -> Tensor:
    # torch takes the lower of two middle values where the papers' code takes their mean: "at most" it is the same set.
    return (confidence <= confidence.median()).to(confidence.dtype)
