"""A student's classifier that starts from its teacher's: the right rows, and a sentence where they do not fit."""

import pytest
import torch
from torch import nn

from pcdistill.distillation.head import copy_head
from pcdistill.distillation.teacher import Teacher
from pcdistill.errors import InputError

IMAGES = torch.zeros(2, 3, 4, 4)


def net(width=6, classes=5, *, bias=True):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes, bias=bias),
    )  # fmt: skip


def test_the_rows_of_the_datas_classes_are_copied_and_nothing_else():
    student, teacher = net(classes=3), Teacher(net(), class_map=[4, 0, 2])
    before = {key: value.clone() for key, value in student.state_dict().items()}
    copy_head(student.train(), teacher, IMAGES)
    assert torch.equal(student[4].weight, teacher.model[4].weight[[4, 0, 2]])
    assert torch.equal(student[4].bias, teacher.model[4].bias[[4, 0, 2]])
    assert student.training
    assert student[4].weight.requires_grad
    assert all(
        torch.equal(value, before[key]) for key, value in student.state_dict().items() if not key.startswith("4")
    )
    assert student[4].weight.data_ptr() != teacher.model[4].weight.data_ptr()


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (net(width=4), net(), "student's classifier reads 4 features with a bias and the teacher's classifier reads 6"),
        (net(bias=False), net(), "without a bias"),
        (nn.Sequential(nn.Conv2d(3, 5, 4), nn.Flatten()), net(), "the student does not end in a linear layer"),
    ],
    ids=["width", "bias", "no head"],
)
def test_what_does_not_fit_is_refused_in_one_sentence(student, teacher, says):
    with pytest.raises(InputError, match=says):
        copy_head(student, Teacher(teacher), IMAGES)
