"""What every feature loss shares: the container of features, argument checks, pairing of stages, safe unit vectors."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pcdistill.losses._common import full_precision as full_precision
from pcdistill.losses._common import shape, upcast


class Features(NamedTuple):
    """What one pass through a network shows to the feature losses.

    Attributes:
        maps: outputs of the stages, shallow to deep, each [N, D, H, W] with its own D, H and W.
        pre_activations: the same before each stage's last activation; where there is none, the map itself.
        pooled: what the classifier reads, [N, D].
        logits: [N, C].
        classifier: the network's last linear layer; None if it has none.
        index: [N] positions of the samples in the data set, for the losses that keep a memory.
        norms: the batch normalisation before each stage's last activation, None where there is none.
        projected: the deepest map in the teacher's space, where a new head made the logits from it (SimKD).
    """

    maps: list[Tensor]
    pre_activations: list[Tensor] | None
    pooled: Tensor
    logits: Tensor
    classifier: nn.Module | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    norms: list[nn.Module | None] | None = None
    projected: Tensor | None = None


def rows_of(found: "Features | Tensor", rows: Tensor) -> "Features | Tensor":
    """The samples at these positions [L], of tensors [N, ...] or of all tensors of Features."""
    if isinstance(found, Tensor):
        return found[rows]
    return found._replace(
        maps=[part[rows] for part in found.maps],
        pooled=found.pooled[rows],
        logits=found.logits[rows],
        pre_activations=None if found.pre_activations is None else [part[rows] for part in found.pre_activations],
        index=None if found.index is None else found.index[rows],
        projected=None if found.projected is None else found.projected[rows],
    )


def check_map_pair(student_map: Tensor, teacher_map: Tensor, *, same_width: bool = False) -> None:
    """Raise unless both are floating-point [N, D, H, W] with one N on one device (and one D, if asked)."""
    for name, x in (("student", student_map), ("teacher", teacher_map)):
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} features must be maps [N, D, H, W], got {shape(x)}")
    _check_pair(student_map, teacher_map)
    if same_width and student_map.shape[1:] != teacher_map.shape[1:]:
        raise ValueError(
            f"student features {shape(student_map)} and teacher features {shape(teacher_map)} must have one shape; "
            "pass the student's through an adapter first"
        )


def check_vector_pair(student: Tensor, teacher: Tensor, *, same_width: bool = False) -> None:
    """Raise unless both are floating-point [N, D] with one N on one device (and one D, if asked)."""
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} features must be vectors [N, D], got {shape(x)}")
    _check_pair(student, teacher)
    if same_width and student.shape != teacher.shape:
        raise ValueError(
            f"student features {shape(student)} and teacher features {shape(teacher)} must have one shape; "
            "pass the student's through an adapter first"
        )


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student features {shape(student)} and teacher features {shape(teacher)} must have one N")
    if student.device != teacher.device:
        raise ValueError(f"teacher features are on {teacher.device}, student features on {student.device}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise TypeError(f"features must be floating point, got {student.dtype} and {teacher.dtype}")


def check_map_lists(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> None:
    """Raise unless both are non-empty lists of one length of maps that fit in pairs."""
    if len(student_maps) != len(teacher_maps) or not student_maps:
        lengths = f"{len(student_maps)} and {len(teacher_maps)}"
        raise ValueError(f"student_maps and teacher_maps must be lists of one length > 0, got {lengths}")
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        check_map_pair(student_map, teacher_map)


def pair_stages(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Positions of the stages that are compared, shallow to deep.

    Equal numbers of stages are paired in order. Otherwise every stage of the network with fewer gets a stage of the
    other so that the order is kept and the resolutions, relative to the deepest stage's, agree best; ties go to the
    most even spacing. So the deepest are always paired.

    Args:
        student_maps: [N, D, H, W] each; only shapes are used.
        teacher_maps: the same of the teacher.
    """
    n, m = len(student_maps), len(teacher_maps)
    if n == 0 or m == 0:
        raise ValueError(f"features must hold one map or more, got {n} of the student and {m} of the teacher")
    if n == m:
        return [(i, i) for i in range(n)]
    few, many = (student_maps, teacher_maps) if n < m else (teacher_maps, student_maps)

    def level(maps: Sequence[Tensor], i: int) -> float:
        return math.log2(maps[i].shape[-2] / maps[-1].shape[-2])

    def misfit(chosen: tuple[int, ...]) -> tuple[float, float]:
        resolution = sum(abs(level(few, i) - level(many, j)) for i, j in enumerate(chosen))
        spacing = sum(abs((i + 1) * len(many) / len(few) - 1 - j) for i, j in enumerate(chosen))
        return round(resolution, 6), spacing

    best = min(combinations(range(len(many)), len(few)), key=misfit)
    return list(enumerate(best)) if n < m else [(j, i) for i, j in enumerate(best)]


def pick_stage(pairs: Sequence[tuple[int, int]], stage: int) -> tuple[int, int]:
    """The pair at position `stage`; raise if there is none."""
    if not -len(pairs) <= stage < len(pairs):
        raise ValueError(
            f"stage must be in [{-len(pairs)}, {len(pairs) - 1}]: {len(pairs)} stages are paired; got {stage}"
        )
    return pairs[stage]


def stage_map(features: Features, i: int, owner: str) -> Tensor:
    """The map at position i; raise if there are fewer than when the loss was built."""
    if i >= len(features.maps):
        raise ValueError(f"the {owner} shows {len(features.maps)} maps now, {i + 1} or more when the loss was built")
    return features.maps[i]


def pre_activations(features: Features, owner: str) -> list[Tensor]:
    """The features before the stages' last activations; raise if they were not collected."""
    if features.pre_activations is None or len(features.pre_activations) != len(features.maps):
        raise ValueError(f"the {owner}'s pre_activations must be given to this loss, one for each map")
    return features.pre_activations


def match_size(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger map to the smaller one's height and width."""
    size = (min(student_map.shape[2], teacher_map.shape[2]), min(student_map.shape[3], teacher_map.shape[3]))
    return pool_to(student_map, size), pool_to(teacher_map, size)


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling, nothing where the size is already right."""
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)


def unit(x: Tensor, dim: int) -> Tensor:
    """x / |x| along `dim`; 0, with gradient 0, for a vector of length 0 (below 1e-12).

    Dividing by max(|x|, eps), as is customary, gives a vector of zeros a gradient of the order 1 / eps.
    """
    square = x.square().sum(dim, keepdim=True)
    has_length = square > 1e-24
    return x * torch.where(has_length, square, 1.0).rsqrt() * has_length


def mse_per_sample(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all but the first axis: [N]."""
    return (a - b).square().flatten(1).mean(1)


def nothing(features: Features) -> Tensor:
    """The loss of no samples: 0, with a graph."""
    return sum((upcast(x).sum() for x in features.maps), upcast(features.pooled).sum())


class AdapterNorm(nn.BatchNorm2d):
    """Batch normalisation that also takes one value per channel, where a batch has no statistics: by the running ones.

    The last batch of an epoch may hold one image, and ReviewKD normalises maps of one place.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def call_frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the precision of x, with a gradient to x and none to the module's own parameters."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: v.detach().to(x.dtype) if v.is_floating_point() else v for name, v in own.items()}
    out: Tensor = functional_call(module, state, (x,))
    return out


def classifier_of(teacher: Features, method: str) -> nn.Module:
    """The teacher's last linear layer; raise if it has none."""
    if teacher.classifier is None:
        raise ValueError(f"{method} needs the teacher's classifier, a last linear layer, and this teacher shows none")
    return teacher.classifier
