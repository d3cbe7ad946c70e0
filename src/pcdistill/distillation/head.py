"""A student's classifier that starts from its teacher's."""

import torch
from torch import Tensor, nn

from pcdistill.distillation.taps import classifier_of
from pcdistill.distillation.teacher import Teacher
from pcdistill.errors import InputError


@torch.no_grad()
def copy_head(student: nn.Module, teacher: Teacher, images: Tensor) -> None:
    """Give the student's last linear layer the weights of the teacher's, for the data's classes in their order.

    Args:
        student: changed in place.
        teacher: with the class map of the data.
        images: any two of the data's shape, on the models' device.

    Raises:
        InputError: a model does not end in a linear layer, or the two read features of different widths.
    """
    own = classifier_of(student, images)
    theirs = classifier_of(teacher.model, teacher.prepare(images))
    for name, found in (("student", own), ("teacher", theirs)):
        if found is None:
            raise InputError(f"student.head: the {name} does not end in a linear layer; set it to own")
    assert own is not None
    assert theirs is not None
    if own.in_features != theirs.in_features or (own.bias is None) != (theirs.bias is None):
        raise InputError(
            f"student.head: {_reads('student', own)} and {_reads('teacher', theirs)}, which must be alike to copy it; "
            "set it to own, or take method simkd, which puts a projector before the teacher's head"
        )
    rows = slice(None) if teacher.class_map is None else teacher.class_map
    own.weight.copy_(theirs.weight[rows])
    if own.bias is not None:
        own.bias.copy_(theirs.bias[rows])


def _reads(who: str, layer: nn.Linear) -> str:
    bias = "without a bias" if layer.bias is None else "with a bias"
    return f"the {who}'s classifier reads {layer.in_features} features {bias}"
