"""A loss's options as a recipe's author sees them, from signature and docstring."""

import dataclasses
import inspect

import pytest

from pcdistill import cli
from pcdistill.distillation.objective import build_loss, method_options
from pcdistill.errors import InputError
from pcdistill.losses.cskd import CSKDLoss, CSKDNoAugLoss, CSKDOptions, cskd_loss
from pcdistill.losses.mlkd import MLKDLoss, MLKDNoAugLoss, MLKDOptions, mlkd_loss
from pcdistill.methods import METHODS

OWN = '''
from collections.abc import Sequence
from torch import nn

class Own(nn.Module):
    """Mine.

    Args:
        scales: of what,
            in order. More.
        num_classes: C.
    """

    def __init__(self, *, scales: Sequence[int], num_classes: int) -> None:
        super().__init__()
'''


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_of_every_method_has_a_type_a_default_and_a_meaning(name):
    options = method_options(name)
    assert not {option.name for option in options} & {"student", "teacher", "n_data", "labels", "num_classes"}
    for option in options:
        assert option.type, option.name
        assert option.default is not None, option.name
        assert len(option.about) >= len("T > 0"), option.name


def test_the_options_are_printed(capsys):
    cli.main(["list", "methods", "--options", "pcd"])
    printed = capsys.readouterr().out
    assert "temperature              number, default 4.0: T > 0" in printed
    assert 'directions               "both" | "f2cl" | "c2fl", default \'both\': "both", "f2cl" (fine to' in printed
    assert "stages                   whole number | none, default None: S; None is 3" in printed


def test_a_users_class_is_read_too(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (option,) = method_options(f"{tmp_path}/own.py:Own")
    assert dataclasses.astuple(option) == ("scales", "list of whole numbers", None, "of what, in order")


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match='unknown method "pdc"; did you mean "pcd"'):
        method_options("pdc")


@pytest.mark.parametrize(
    ("function", "loss", "other", "options"),
    [(cskd_loss, CSKDLoss, CSKDNoAugLoss, CSKDOptions), (mlkd_loss, MLKDLoss, MLKDNoAugLoss, MLKDOptions)],
)
def test_many_options_are_declared_once_and_shown_everywhere(function, loss, other, options):
    declared = [field.name for field in dataclasses.fields(options)]
    assert list(inspect.signature(function).parameters) == ["student_logits", "teacher_logits", "target", *declared]
    assert list(inspect.signature(loss).parameters) == declared
    assert set(declared) - set(inspect.signature(other).parameters) <= {"views", "masks"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperatur'"):
        loss(temperatur=1.0)
    with pytest.raises(InputError, match='losses: .* has no option "views"'):
        build_loss(f"{loss.__module__.rsplit('.', 1)[-1]}-noaug", {"views": 2})


def test_the_temperature_of_cskd_moves():
    loss = CSKDNoAugLoss(temperature=3.0)
    loss.temperature = 2.0
    assert loss.chosen == CSKDNoAugLoss(temperature=2.0).chosen
