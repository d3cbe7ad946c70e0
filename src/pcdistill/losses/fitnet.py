"""FitNet: the student's features, through a trained regressor, match the teacher's at one stage.

Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550 (2015).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pcdistill.losses._common import Reduction, reduce_loss, upcast
from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    check_map_pair,
    full_precision,
    mse_per_sample,
    nothing,
    pair_stages,
    pick_stage,
    stage_map,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["FitNetLoss", "fitnet_loss"]

LARGEST_KERNEL = 7


def fitnet_loss(student_map: Tensor, teacher_map: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference between the adapted student's and the teacher's feature map.

        loss = 1 / (D H W) * sum_{d,h,w} (F_s - F_t)^2

    Args:
        student_map: F_s, [N, D, H, W], after the regressor. Any floating dtype; the arithmetic is float32 or better.
        teacher_map: F_t, [N, D, H, W]. A constant: no gradient flows into it.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero if and only if the maps are equal. N = 0 gives 0.

    Raises:
        ValueError: a shape, device or reduction that does not fit.
        TypeError: features that are not floating point.

    Source:
        arXiv 1412.6550, eq. 3, which has the sum and the factor 1/2; the mean is the convention of the distillation
        literature, for which the weight 100 is meant.
    """
    check_map_pair(student_map, teacher_map, same_width=True)
    return reduce_loss(mse_per_sample(upcast(student_map), upcast(teacher_map.detach())), reduction)


class Regressor(nn.Module):
    """A convolution that brings the student's map to the teacher's shape, batch normalisation and ReLU.

    With H_s, H_t the observed heights: 3x3 with stride 2 if H_s = 2 H_t; 4x4 transposed with stride 2 if 2 H_s = H_t;
    an unpadded one of size 1 + H_s - H_t up to 7; otherwise 1x1 after average pooling, or after nearest upsampling.

    Args:
        student_map: [N, D_s, H_s, W_s]; only its shape is used.
        teacher_map: [N, D_t, H_t, W_t]; only its shape is used.
        relu: end with a ReLU, as the teacher's stage does. False for maps that may be negative.
    """

    def __init__(self, student_map: Tensor, teacher_map: Tensor, *, relu: bool = True) -> None:
        super().__init__()
        (d_s, *size_s), (d_t, *size_t) = student_map.shape[1:], teacher_map.shape[1:]
        kernel = (1 + size_s[0] - size_t[0], 1 + size_s[1] - size_t[1])
        conv: nn.Module
        if size_s == [2 * t for t in size_t]:
            conv = nn.Conv2d(d_s, d_t, 3, stride=2, padding=1)
        elif [2 * s for s in size_s] == size_t:
            conv = nn.ConvTranspose2d(d_s, d_t, 4, stride=2, padding=1)
        elif all(1 <= k <= LARGEST_KERNEL for k in kernel):
            conv = nn.Conv2d(d_s, d_t, kernel)
        else:
            conv = nn.Conv2d(d_s, d_t, 1)
        self.conv = conv
        self.bn = AdapterNorm(d_t)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, student_map: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, D_s, H_s, W_s] -> [N, D_t, *size]."""
        if self.conv.kernel_size == (1, 1):
            student_map = _resize(student_map, size)
        out: Tensor = self.relu(self.bn(self.conv(student_map)))
        return _resize(out, size)  # other image sizes than the observed one may miss by a pixel


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    if x.shape[2] >= size[0] and x.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="nearest")


class FitNetLoss(FeatureLoss):
    """:func:`fitnet_loss` at one stage, with its regressor.

    The hint is trained together with the other terms, not in a stage of its own as in the paper.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch.
        stage: which of the paired stages, counted from 0. 1 is the middle of three, the literature's choice.
        relu: whether the regressor ends with a ReLU; False for teachers whose stages end without one.
    """

    def __init__(self, student: Features, teacher: Features, *, stage: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.pair = pick_stage(pair_stages(student.maps, teacher.maps), stage)
        student_map, teacher_map = student.maps[self.pair[0]], teacher.maps[self.pair[1]]
        check_map_pair(student_map, teacher_map)
        self.regressor = Regressor(student_map, teacher_map, relu=relu).to(student_map.device)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        if student.logits.shape[0] == 0:
            return nothing(student)
        student_map = stage_map(student, self.pair[0], "student")
        teacher_map = stage_map(teacher, self.pair[1], "teacher")
        check_map_pair(student_map, teacher_map)
        with full_precision(student_map):
            adapted = self.regressor(upcast(student_map), (teacher_map.shape[2], teacher_map.shape[3]))
            return fitnet_loss(adapted, teacher_map)

    def extra_repr(self) -> str:
        return f"student stage {self.pair[0]}, teacher stage {self.pair[1]}"
