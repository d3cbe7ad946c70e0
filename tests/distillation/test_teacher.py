"""The teacher stays frozen and in eval mode, sees its own normalisation and resolution, and knows classes by name."""

import pytest
import torch
from torch import nn

from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.data.loader import Batch
from pcdistill.distillation.objective import Objective, Term
from pcdistill.distillation.teacher import Teacher, TeacherEnsemble, align_classes, members_of
from pcdistill.errors import InputError
from pcdistill.losses import CELoss, KDLoss


def noisy_net(classes: int = 4) -> nn.Module:
    """A net whose output differs between train and eval mode, and between calls in train mode."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, classes)
    )


def distiller(teacher: Teacher) -> ClassificationDistiller:
    objective = Objective([Term("ce", CELoss()), Term("kd", KDLoss())])
    return ClassificationDistiller(noisy_net(), objective, teacher)


def test_teacher_stays_in_eval_mode_and_keeps_its_statistics_through_training_steps():
    net = noisy_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.randn(8, 3, 8, 8)
    expected = net.eval()(images)
    net.train()  # as a user may pass it
    model = distiller(Teacher(net))
    for _ in range(3):
        model.train()
        model.teacher.train()
        model(Batch(images, torch.arange(8) % 4))["loss"].backward()
        assert not any(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(model.teacher(images), expected, rtol=0, atol=0)


def test_teacher_is_in_no_state_dict_and_no_parameter_list_and_gets_no_gradient():
    net = noisy_net()
    model = distiller(Teacher(net))
    model(Batch(torch.randn(8, 3, 8, 8), torch.arange(8) % 4))["loss"].backward()
    own = {id(p) for p in net.parameters()}
    assert not any(id(p) in own for p in model.parameters())
    assert not any(key.startswith(("teacher", "_hidden", "model")) for key in model.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_teacher_sees_its_own_normalisation():
    class Echo(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    raw = torch.rand(2, 3, 5, 5)
    s, t = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]), ([0.1, 0.2, 0.3], [1.0, 0.5, 0.25])
    column = [torch.tensor(v)[:, None, None] for v in (*s, *t)]
    seen = Teacher(Echo(), student_stats=s, teacher_stats=t)((raw - column[0]) / column[1])
    torch.testing.assert_close(seen, ((raw - column[2]) / column[3]).mean(dim=(2, 3)))


def test_grey_images_meet_a_teacher_of_three_channels_and_no_other_number_does():
    model = nn.Identity()
    grey, rgb = ((0.5,), (0.5,)), ((0.4,) * 3, (0.2,) * 3)
    images = torch.rand(2, 1, 4, 4)
    prepared = Teacher(model, student_stats=grey, teacher_stats=rgb).prepare(images)
    assert torch.allclose(prepared, ((images * 0.5 + 0.5 - 0.4) / 0.2).expand(-1, 3, -1, -1))
    two = ((0.4,) * 2, (0.5,) * 2)
    with pytest.raises(InputError, match="are of 2 channels, the images have 3"):
        Teacher(model, student_stats=grey, teacher_stats=two).prepare(torch.rand(2, 3, 4, 4))


def test_teacher_sees_its_own_resolution():
    class Size(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 2), float(x.shape[-1]))

    assert Teacher(Size(), image_size=12)(torch.zeros(1, 3, 6, 6)).tolist() == [[12.0, 12.0]]


def test_classes_are_matched_by_name():
    order = align_classes(["cat", "dog", "eel", "fox"], ["fox", "cat"])
    assert order == [3, 0]

    class Fixed(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(len(x), 4)

    assert Teacher(Fixed(), class_map=order)(torch.zeros(1, 3, 2, 2)).tolist() == [[3.0, 0.0]]


def test_classes_that_the_teacher_lacks_are_named():
    with pytest.raises(InputError, match=r'1 of the data.s 2 classes: fix; did you mean "fox"'):
        align_classes(["cat", "fox"], ["fix", "cat"])


def test_a_distiller_without_a_teacher_refuses_terms_that_need_one():
    with pytest.raises(InputError, match="need a teacher"):
        ClassificationDistiller(noisy_net(), Objective([Term("kd", KDLoss())]))
    alone = ClassificationDistiller(noisy_net(), Objective([Term("ce", CELoss())]))
    assert set(alone(Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))) == {
        *("loss", "loss/ce", "logits", "sum/correct", "sum/counted")
    }


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_several_teachers_give_the_weighted_mean(combine):
    images = torch.randn(8, 3, 8, 8)
    one, other = Teacher(noisy_net()), Teacher(noisy_net())
    both = TeacherEnsemble([one, other], [3.0, 1.0], combine).train()
    assert not any(module.training for module in both.modules())
    z = both(images)
    assert not z.requires_grad
    if combine == "logits":
        torch.testing.assert_close(z, 0.75 * one(images) + 0.25 * other(images))
    else:
        expected = 0.75 * one(images).softmax(1) + 0.25 * other(images).softmax(1)
        torch.testing.assert_close(z.softmax(1), expected)
        torch.testing.assert_close(z.exp(), expected)  # they are logarithms of probabilities
    assert members_of(both) == [one, other]
    assert members_of(one) == [one]


def test_one_teacher_in_an_ensemble_teaches_what_it_teaches_alone():
    images = torch.randn(8, 3, 8, 8)
    alone = Teacher(noisy_net())
    for combine in ("probabilities", "logits"):
        z = TeacherEnsemble([alone, alone], [1.0, 5.0], combine)(images)
        torch.testing.assert_close(z.softmax(1), alone(images).softmax(1))
    with pytest.raises(ValueError, match='combine must be "probabilities" or "logits"'):
        TeacherEnsemble([alone], [1.0], "mean")


def test_teachers_that_are_certain_or_wrong_give_finite_logits():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    both = TeacherEnsemble([Teacher(noisy_net()), Teacher(noisy_net())], [1.0, 1.0])
    assert bool(both.together([z, z.flip(1)]).isfinite().all())


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_micro_batches_give_the_whole_batchs_logits(size):
    net, images = noisy_net(), torch.randn(8, 3, 8, 8)
    most = []
    net.register_forward_pre_hook(lambda _, args: most.append(len(args[0])))
    whole = Teacher(net)(images)
    parts = Teacher(net, batch_size=size)(images)
    torch.testing.assert_close(parts, whole)
    assert max(most[1:]) == min(size, 8)
    assert sum(most[1:]) == 8


def test_a_micro_batch_has_an_image_at_least():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        Teacher(noisy_net(), batch_size=0)
