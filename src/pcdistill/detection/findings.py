"""What there is to say about a detection set: images, boxes and classes of its splits, and samples with boxes."""

import numpy as np
from PIL import Image

from pcdistill.data.findings import Findings, Sample, SplitFacts, equal_files, make_sample, spread
from pcdistill.detection.data import open_set, refuse_without_boxes, split_of
from pcdistill.detection.formats import DetectionSet, Record
from pcdistill.errors import InputError
from pcdistill.recipe import DataConfig


def detection_findings(config: DataConfig, samples: int) -> Findings:
    """Read a set as a training would, and say what there is.

    Raises:
        InputError: as a training would be refused.
    """
    doubt = None
    try:
        found = open_set(config)
        refuse_without_boxes(config.name, found)
    except InputError as error:  # too few images for the splits that are lacking, perhaps
        found, doubt = open_set(config, fill=False), str(error)
    facts = [_facts(split, records, found) for split, records in found.splits.items()]
    findings = Findings(config.name, "detection", found.format, list(found.classes), facts)
    for note in found.notes:
        {"repaired": findings.repaired, "left out": findings.left_out, "warning": findings.warnings}[note.kind].append(
            note.text
        )
    findings.warnings += [doubt] if doubt else []
    files = {split: [r.path for r in records if r.path] for split, records in found.splits.items()}
    findings.warnings += equal_files(files)
    findings.samples = _samples(config, found, samples)
    return findings


def _facts(split: str, records: list[Record], found: DetectionSet) -> SplitFacts:
    labels = np.concatenate([record.labels for record in records])
    counts = np.bincount(labels, minlength=len(found.classes) + 1)[1:].tolist()
    empty = sum(len(record.boxes) == 0 for record in records)
    origin = found.origins[split]
    return SplitFacts(split, origin, len(records), dict(zip(found.classes, counts, strict=True)), empty)


def _samples(config: DataConfig, found: DetectionSet, wanted: int) -> list[Sample]:
    """Images of every split, those with boxes first, evenly over the split."""
    samples = []
    for split, records in found.splits.items():
        with_boxes = [i for i, record in enumerate(records) if len(record.boxes)] or list(range(len(records)))
        chosen = [with_boxes[i] for i in spread(len(with_boxes), -(-wanted // len(found.splits)))]
        images = split_of(config, found, split)
        for i in chosen:
            record = records[i]
            pixels, target = images.sample(i)
            boxes = [
                (found.classes[label - 1], *box)
                for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
            ]
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            samples.append(make_sample(picture, split, record.name or f"image {i}", boxes=boxes))
    return samples
