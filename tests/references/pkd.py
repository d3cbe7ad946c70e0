"""PKD, arXiv 2207.02039: half the mean squared difference of features normalised per channel, summed over levels."""

from tests.references import pyramid


def pkd(student_levels: list, teacher_levels: list) -> float:
    total = 0.0
    for student, teacher in zip(student_levels, teacher_levels, strict=True):
        error = pyramid.squared_error(pyramid.normalize(student), pyramid.normalize(teacher))
        total += error / (2 * pyramid.count(student))
    return total


def pearson(student: list, teacher: list) -> float:
    """Mean over channels of the correlation over images and places."""
    depth = len(student[0])
    total = 0.0
    for d in range(depth):
        x = [v for image in student for row in image[d] for v in row]
        y = [v for image in teacher for row in image[d] for v in row]
        mx, my = sum(x) / len(x), sum(y) / len(y)
        xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        xx, yy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
        total += xy / (xx * yy) ** 0.5
    return total / depth
