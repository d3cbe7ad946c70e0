"""Distil a big image classifier or detector into a small one.

    import pcdistill
    student, history = pcdistill.distill(teacher=big, student=small, train=loader, val=val_loader, epochs=30)

Importing the package imports no torch; the names below are loaded when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcdistill.api import Distilled as Distilled
    from pcdistill.api import distill as distill
    from pcdistill.classification.own_trainer import Distiller as Distiller
    from pcdistill.commands.push import load_student as load_student
    from pcdistill.distillation.teacher import Teacher as Teacher
    from pcdistill.errors import InputError as InputError
    from pcdistill.errors import PcdistillError as PcdistillError
    from pcdistill.errors import TrainingStopped as TrainingStopped

__version__ = "0.1.0"

_EXPORTS = {
    "distill": "pcdistill.api",
    "Distilled": "pcdistill.api",
    "Distiller": "pcdistill.classification.own_trainer",
    "Teacher": "pcdistill.distillation.teacher",
    "load_student": "pcdistill.commands.push",
    "InputError": "pcdistill.errors",
    "PcdistillError": "pcdistill.errors",
    "TrainingStopped": "pcdistill.errors",
}
__all__ = [
    "Distilled",
    "Distiller",
    "InputError",
    "PcdistillError",
    "Teacher",
    "TrainingStopped",
    "distill",
    "load_student",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'pcdistill' has no attribute {name!r}")
