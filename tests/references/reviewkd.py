"""ReviewKD, arXiv 2104.09044: attention-based fusion and hierarchical context loss, from the equations."""

from tests.references import maps
from tests.references.scalars import Number, exp


def context(student: maps.Map, teacher: maps.Map, levels: tuple[int, ...]) -> list[Number]:
    """One value per sample: weights 1, 1/2, 1/4, ... over full size and the grids that are smaller, normalised."""
    grids = [k for k in levels if k < min(maps.shape(student)[2:])]
    values = [maps.mse(student, teacher)] + [
        maps.mse(maps.pool(student, k, k), maps.pool(teacher, k, k)) for k in grids
    ]
    weights = [0.5**i for i in range(len(values))]
    return [sum(w * v[i] for w, v in zip(weights, values, strict=True)) / sum(weights) for i in range(len(values[0]))]


def hcl(students: list[maps.Map], teachers: list[maps.Map], levels: tuple[int, ...]) -> list[Number]:
    parts = [context(s, t, levels) for s, t in zip(students, teachers, strict=True)]
    return [sum(values) for values in zip(*parts, strict=True)]


def normal(x: maps.Map, weight: maps.Map, padding: int) -> maps.Map:
    d = len(weight)
    return maps.batch_norm(maps.conv(x, weight, padding=padding), [1.0] * d, [0.0] * d)


def fuse(
    student: maps.Map,
    residual: maps.Map | None,
    size: tuple[int, int],
    enter: maps.Map,
    leave: maps.Map,
    attention: tuple[maps.Map, list[Number]] | None,
) -> tuple[maps.Map, maps.Map]:
    """Output in the teacher's shape, and what is handed to the next shallower stage."""
    x = normal(student, enter, 0)
    if residual is not None and attention is not None:
        n, d, h, w = maps.shape(x)
        r = maps.nearest(residual, h, w)
        both = [a + b for a, b in zip(x, r, strict=True)]
        z = maps.conv(both, *attention)

        def gate(i: int, k: int, row: int, column: int) -> Number:
            return 1 / (1 + exp(-z[i][k][row][column]))

        own = x

        def fused(i: int, c: int, row: int, column: int) -> Number:
            return gate(i, 0, row, column) * own[i][c][row][column] + gate(i, 1, row, column) * r[i][c][row][column]

        x = maps.build(n, d, h, w, fused)
    x = maps.nearest(x, *size)
    return normal(x, leave, 1), x
