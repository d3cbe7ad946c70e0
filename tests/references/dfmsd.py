"""DFMSD, after the abstract of arXiv 2407.13147, in the equations that the loss's docstring states."""

from tests.references import pyramid


def dfmsd(
    student_levels: list,
    teacher_levels: list,
    parts: list | None,
    boxes: list | None,
    image_size: tuple,
    *,
    spatial_ratio: float = 0.5,
    channel_ratio: float = 0.3,
    temperature: float = 0.5,
    progress: float = 0.0,
    enhancement: bool = True,
    adapting: bool = False,
    alignment: bool = True,
) -> float:
    """`parts[level]` holds the generators and the fusion, None for no masking; `boxes[n]` the boxes of an image."""
    total = 0.0
    for level, (student, teacher) in enumerate(zip(student_levels, teacher_levels, strict=True)):
        made = student
        if parts is not None:
            made = []
            for n, (x, y) in enumerate(zip(student, teacher, strict=True)):
                places = pyramid.spatial_attention(y, temperature)
                if enhancement:
                    places = enhanced(places, boxes[n], image_size, progress)
                channels = pyramid.channel_attention(y, temperature)
                made.append(pyramid.reconstruct(x, places, channels, parts[level], spatial_ratio, channel_ratio))
        wanted = teacher
        if alignment:
            student, wanted, made = (pyramid.normalize(v) for v in (student, wanted, made))
        if adapting:
            wanted = [
                [
                    [[(a + b) / 2 for a, b in zip(r, s, strict=True)] for r, s in zip(p, q, strict=True)]
                    for p, q in zip(x, y, strict=True)
                ]
                for x, y in zip(wanted, student, strict=True)
            ]
        total += pyramid.squared_error(made, wanted) / pyramid.count(made)
    return total


def enhanced(places: list, boxes: list, image_size: tuple, gain: float) -> list:
    """Attention times 1 + gain on every place that a box covers, once however many boxes do."""
    height, width = len(places), len(places[0])
    corners = [pyramid.cells(box, (height, width), image_size) for box in boxes]
    return [
        [v * (1 + gain * any(x0 <= j <= x1 and y0 <= i <= y1 for x0, y0, x1, y1 in corners)) for j, v in enumerate(row)]
        for i, row in enumerate(places)
    ]
