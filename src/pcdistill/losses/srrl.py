"""Softmax regression representation learning (SRRL): the student's features, read by the teacher's classifier.

Source: Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Softmax Regression Representation Learning",
ICLR 2021.
"""

from torch import Tensor, nn

from pcdistill.losses._common import Reduction, check_logits, check_weight, reduce_loss, upcast
from pcdistill.losses._features import (
    AdapterNorm,
    Features,
    call_frozen,
    check_map_pair,
    check_vector_pair,
    classifier_of,
    full_precision,
    mse_per_sample,
    nothing,
)
from pcdistill.losses.base import FeatureLoss

__all__ = ["SRRLLoss", "srrl_loss"]


def srrl_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    predicted_logits: Tensor,
    teacher_logits: Tensor,
    *,
    feature_weight: float = 1.0,
    regression_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared differences of the features, and of what the teacher's classifier makes of them.

        loss = feature_weight * 1 / D * |h_s - h_t|^2 + regression_weight * 1 / C * |W_t h_s + b_t - z_t|^2

    Args:
        student_embedding: h_s, [N, D], after the connector. Any floating dtype; the arithmetic is float32 or better.
        teacher_embedding: h_t, [N, D], what the teacher's classifier reads. A constant: no gradient flows into it.
        predicted_logits: W_t h_s + b_t, [N, C].
        teacher_logits: z_t, [N, C]. A constant.
        feature_weight: the paper's alpha, >= 0.
        regression_weight: the paper's beta, >= 0.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or [N] for "none". Zero if features and logits are equal. N = 0 gives 0.

    Raises:
        ValueError: a shape, device, weight or reduction that does not fit.
        TypeError: tensors that are not floating point.

    Source:
        ICLR 2021, eq. 3 (feature matching) and 5 (softmax regression as squared error of logits).
    """
    check_vector_pair(student_embedding, teacher_embedding, same_width=True)
    check_logits(predicted_logits, teacher_logits)
    check_weight(feature_weight, "feature_weight")
    check_weight(regression_weight, "regression_weight")
    features = mse_per_sample(upcast(student_embedding), upcast(teacher_embedding.detach()))
    regression = mse_per_sample(upcast(predicted_logits), upcast(teacher_logits.detach()))
    return reduce_loss(feature_weight * features + regression_weight * regression, reduction)


class SRRLLoss(FeatureLoss):
    """:func:`srrl_loss` with its connector: 1x1 convolution without bias, batch normalisation, ReLU, global average.

    The teacher's classifier is used as it is and is no part of this module.

    Args:
        student: features of an example batch; only shapes are used.
        teacher: features of the same batch; it must show its classifier.
        feature_weight: weight of the features.
        regression_weight: weight of the logits. The authors' code has 1 for ImageNet and 5 for CIFAR.
        relu: whether the connector ends with a ReLU; False for teachers whose features may be negative.
    """

    def __init__(
        self,
        student: Features,
        teacher: Features,
        *,
        feature_weight: float = 1.0,
        regression_weight: float = 1.0,
        relu: bool = True,
    ) -> None:
        super().__init__()
        check_weight(feature_weight, "feature_weight")
        check_weight(regression_weight, "regression_weight")
        classifier_of(teacher, "SRRL")
        student_map = student.maps[-1]
        check_map_pair(student_map, student_map)
        width = teacher.pooled.shape[1]
        layers = [nn.Conv2d(student_map.shape[1], width, 1, bias=False), AdapterNorm(width)]
        self.connector = nn.Sequential(*layers, nn.ReLU() if relu else nn.Identity()).to(student_map.device)
        self.feature_weight = feature_weight
        self.regression_weight = regression_weight

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> Tensor:
        if student.logits.shape[0] == 0:
            return nothing(student)
        classifier = classifier_of(teacher, "SRRL")
        with full_precision(student.maps[-1]):
            embedding = self.connector(upcast(student.maps[-1])).mean((2, 3))
            predicted = call_frozen(classifier, embedding)
            return srrl_loss(
                embedding,
                teacher.pooled,
                predicted,
                teacher.logits,
                feature_weight=self.feature_weight,
                regression_weight=self.regression_weight,
            )

    def extra_repr(self) -> str:
        return f"feature_weight={self.feature_weight:g}, regression_weight={self.regression_weight:g}"
