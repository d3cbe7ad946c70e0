"""Contrastive representation distillation, arXiv 1910.10699: score by score, with exp and log as they are written."""

from tests.references.scalars import Number, Rows, dot, exp, log, sqrt


def nce(scores: Rows, n_data: int, eps: float) -> list[Number]:
    """Scores s, the positive first: one value per sample."""
    noise = (len(scores[0]) - 1) / n_data
    return [
        -log(row[0] / (row[0] + noise + eps)) - sum(log(noise / (s + noise + eps)) for s in row[1:]) for row in scores
    ]


def embed(x: Rows, weight: Rows, bias: list[Number]) -> Rows:
    rows = []
    for h in x:
        v = [dot(w, h) + b for w, b in zip(weight, bias, strict=True)]
        length = sqrt(dot(v, v))
        rows.append([c / length for c in v])
    return rows


def raw_scores(v: Rows, memory: Rows, chosen: list[list[int]], temperature: float) -> Rows:
    return [[exp(dot(anchor, memory[k]) / temperature) for k in row] for anchor, row in zip(v, chosen, strict=True)]


def normaliser(scores: Rows, n_data: int) -> Number:
    values = [s for row in scores for s in row]
    return sum(values) / len(values) * n_data


def remember(memory: Rows, index: list[int], v: Rows, momentum: float) -> Rows:
    new = [list(row) for row in memory]
    for i, row in zip(index, v, strict=True):
        mixed = [momentum * m + (1 - momentum) * c for m, c in zip(memory[i], row, strict=True)]
        length = sqrt(dot(mixed, mixed))
        new[i] = [c / length for c in mixed]
    return new
