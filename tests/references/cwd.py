"""CWD, arXiv 2011.13256, equations 4 and 5, as loops: channels are distributions over places."""

import math

from tests.references import pyramid


def cwd(student_levels: list, teacher_levels: list, temperature: float) -> float:
    total = 0.0
    for student, teacher in zip(student_levels, teacher_levels, strict=True):
        level = 0.0
        for own, wanted in zip(student, teacher, strict=True):
            for plane, target in zip(own, wanted, strict=True):
                s = pyramid.softmax([v / temperature for row in plane for v in row])
                t = pyramid.softmax([v / temperature for row in target for v in row])
                level += sum(b * math.log(b / a) for a, b in zip(s, t, strict=True))
        total += temperature**2 * level / (len(student) * len(student[0]))
    return total
