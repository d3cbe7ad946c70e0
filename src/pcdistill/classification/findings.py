"""What there is to say about a classification set: images and classes of its splits, and samples."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pcdistill.classification.data import check_source, origins_of, shape_of, split_rows
from pcdistill.data.decoding import Picture, decoded_of
from pcdistill.data.encoded import EncodedItems
from pcdistill.data.findings import Findings, Sample, SplitFacts, equal_files, equal_rows, make_sample, spread
from pcdistill.data.sources import Source, Split, open_source
from pcdistill.recipe import DataConfig

FEW = 10  # training images: a class with fewer is told


@dataclass(frozen=True)
class _Part:
    """A split as it will be used: the images, the rows of them, and where they come from."""

    split: Split
    rows: Tensor
    origin: str


def classification_findings(config: DataConfig, samples: int) -> Findings:
    """Read a set as a training would, and say what there is.

    Raises:
        InputError: as a training would be refused.
    """
    source = open_source(config.name, root=config.root, download=config.download, streamed=config.streamed)
    check_source(source, config.name)
    shape_of(source, config.name, config.image_size)
    parts = _parts(source, config)
    facts = [_facts(name, part, source.classes) for name, part in parts.items()]
    items = source.train.items
    kind = "arrays" if items is None else items.kind if isinstance(items, EncodedItems) else "image files"
    findings = Findings(config.name, "classification", kind, list(source.classes), facts)
    if "test" not in parts:
        findings.warnings.append("there is no test split: results are those of validation")
    counts = facts[0].counts
    few = [f"{name} ({count})" for name, count in counts.items() if count < FEW]
    if few:
        findings.warnings.append(f"classes with fewer than {FEW} training images: {', '.join(few[:5])}")
    for fact in facts[1:]:
        if without := [name for name, count in fact.counts.items() if not count]:
            findings.warnings.append(f"{fact.name}: no image has the class {', '.join(without[:5])}")
    findings.warnings += _in_two_splits(parts)
    findings.samples = [
        _sample(name, part, int(part.rows[i]), source.classes)
        for name, part in parts.items()
        for i in spread(len(part.rows), -(-samples // len(parts)))
    ]
    return findings


def _parts(source: Source, config: DataConfig) -> dict[str, _Part]:
    train_rows, rest, val_split, val_rows = split_rows(source, config)
    origins = origins_of(source, config, len(rest))
    rows = {"train": (source.train, train_rows), "val": (val_split, val_rows)}
    if source.test is not None:
        rows["test"] = (source.test, None)
    return {
        name: _Part(split, torch.arange(len(split.labels)) if some is None else some, origins.get(name, config.name))
        for name, (split, some) in rows.items()
    }


def _paths(split: Split) -> Any:
    """The files of a split; None where there are none."""
    return getattr(split.items, "paths", None)


def _facts(name: str, part: _Part, classes: list[str]) -> SplitFacts:
    counts = torch.bincount(part.split.labels[part.rows], minlength=len(classes)).tolist()
    return SplitFacts(name, part.origin, len(part.rows), dict(zip(classes, counts, strict=True)))


def _in_two_splits(parts: dict[str, _Part]) -> list[str]:
    paths = {name: _paths(part.split) for name, part in parts.items()}
    if all(found is not None for found in paths.values()):
        return equal_files({name: [paths[name][i] for i in part.rows.tolist()] for name, part in parts.items()})
    if all(part.split.images is not None for part in parts.values()):
        return equal_rows({n: p.split.images[p.rows].numpy() for n, p in parts.items() if p.split.images is not None})
    return []


def _sample(name: str, part: _Part, row: int, classes: list[str]) -> Sample:
    label = classes[int(part.split.labels[row])]
    if part.split.images is not None:
        pixels = part.split.images[row]
        pixels = pixels[:3] if len(pixels) > 2 else pixels[:1].expand(3, -1, -1)
        return make_sample(Image.fromarray(pixels.permute(1, 2, 0).numpy()), name, f"image {row}", label=label)
    items: Any = part.split.items
    paths = _paths(part.split)
    if isinstance(items, EncodedItems):
        shown = items.name(row)
        image = Picture(shown, items.content(row)).decode().image
    elif paths is not None:
        shown, image = os.path.basename(paths[row]), Picture(paths[row]).decode().image
    else:  # a data set of torchvision's
        shown, image = f"image {row}", decoded_of(items.image(row)).image
    return make_sample(image, name, shown, label=label)
