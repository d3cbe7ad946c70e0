"""The model card: what made student.safetensors, in the form that model hubs read."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import yaml

from pcdistill.engine.console import duration
from pcdistill.errors import InputError
from pcdistill.models.weights import checked_metadata, run_weights
from pcdistill.plain import parse_json, read_text
from pcdistill.recipe import LOADERS
from pcdistill.report._folder import Run, data_name, metric_of, name_of, read_run, trained_alone
from pcdistill.report._format import SPLITS, count, metric_name, number, shown, term_text
from pcdistill.report.production import production_code
from pcdistill.report.rows import aligned
from pcdistill.report.run_page import COLUMNS, sizes_of
from pcdistill.report.speed import read_speed, speed_cells, speed_notes

WEIGHTS = "student.safetensors"
HUB_DATA = {  # data that have a name on the hub
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
}


def write_model_card(run_dir: Path, result: dict[str, Any] | None = None) -> str:
    """The text of README.md for a run's folder: YAML front matter, origin, metrics best and last, how to load.

    Args:
        run_dir: a run's folder; what is missing in it is left out of the card.
        result: what result.json will hold, where it is written last; by default what it holds.

    Returns:
        Markdown; the caller writes it.
    """
    run = read_run(Path(run_dir), result)
    student, teacher = name_of(run, "student") or "student", name_of(run, "teacher")
    method = str(run.result.get("method") or run.recipe.get("method") or "unknown")
    alone = trained_alone(run)
    parts = [
        "---",
        _yaml(_front_matter(run, student, teacher, method, alone)),
        "---",
        "",
        f"# {_plain(student)} on {_plain(data_name(run) or 'unnamed data')}"
        + (", trained alone" if alone else f", distilled by {_plain(method)}"),
        "",
        *_origin(run, student, teacher, method, alone),
        "",
        "## Metrics",
        "",
        *_metrics(run),
        "",
        *_speed(run),
        "## Use",
        "",
        "```python",
        *(line.replace(WEIGHTS, run_weights(run.path).name) for line in _usage(run, student)),
        "```",
        "",
        *_production(run, student),
    ]
    command = run.environment.get("command")
    if command:
        parts += ["## How it was made", "", *_fenced(str(command)), ""]
    if run.recipe_text:
        parts += ["## Recipe", "", *_fenced(run.recipe_text.rstrip(), "yaml"), ""]
    return "\n".join(parts)


def _front_matter(run: Run, student: str, teacher: str | None, method: str, alone: bool) -> dict[str, Any]:
    detection = run.result.get("task", run.recipe.get("task")) == "detection"
    pipeline = "object-detection" if detection else "image-classification"
    student, method = " ".join(student.split()), " ".join(method.split())  # a line of dashes would end the front matter
    tags = ["pcdistill", pipeline, "pytorch", "safetensors"]
    if not alone:
        tags += ["knowledge-distillation", method]
    zoo = student.partition("/")[0]
    library = {"timm": "timm", "hf": "transformers"}.get("" if detection else zoo, "pcdistill")
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline, "tags": tags}
    front["license"] = _license(run)
    if (base := _base_model(run, student)) is not None:
        front["base_model"] = base
    if (hub := HUB_DATA.get(data_name(run) or "")) is not None:
        front["datasets"] = [hub]
    data, metric = " ".join((data_name(run) or "").split()), metric_of(run)
    kept = _dict(run.result.get(str(run.result.get("kept") or "best")))
    split = "test" if _dict(kept.get("test")) else "val"
    values = [
        {"type": "accuracy" if name == "top1" else name, "name": metric_name(name), "value": value}
        for name in COLUMNS
        if name != "loss" and (value := number(_dict(kept.get(split)).get(name))) is not None
    ]
    if values and data:
        front["metrics"] = ["accuracy" if metric == "top1" else metric]
        front["model-index"] = [
            {
                "name": student,
                "results": [
                    {
                        "task": {"type": pipeline},
                        "dataset": {"name": data, "type": data, "split": SPLITS[split]},
                        "metrics": values,
                    }
                ],
            }
        ]
    return front


def _yaml(front: dict[str, Any]) -> str:
    """The front matter; huggingface_hub, where it is installed, writes it in the order that its hub does."""
    try:
        from huggingface_hub import ModelCardData
    except ImportError:
        text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    else:
        text = ModelCardData(**front).to_yaml()
    return text.strip()


def _license(run: Run) -> str:
    """That of the weights which a timm student started from; else nobody but its maker knows."""
    if _dict(run.recipe.get("student")).get("pretrained"):
        try:
            config = _dict(parse_json(read_text(run.path / "config.json"), "config.json"))
        except InputError:
            config = {}
        if found := _dict(config.get("pretrained_cfg")).get("license"):
            return str(found)
    return "unknown"


def _base_model(run: Run, student: str) -> str | None:
    """The hub's name of the weights that the student started from, where its own name says it."""
    zoo, _, inner = student.partition("/")
    if not _dict(run.recipe.get("student")).get("pretrained"):
        return None
    if zoo == "hf" and inner.count("/") < 2 and not inner.startswith((".", "/", "~")):
        return inner
    tagged = re.fullmatch(r"[\w-]+\.[\w-]+", inner)  # a model of timm with the tag of its weights
    return f"timm/{inner}" if zoo == "timm" and tagged else None


def _origin(run: Run, student: str, teacher: str | None, method: str, alone: bool) -> list[str]:
    result, environment = run.result, run.environment
    versions = _dict(environment.get("versions"))
    losses = [_dict(term) for term in result.get("losses") or () if _dict(term)]
    facts = [
        ("Student", _model_line(student, _dict(result.get("student")))),
        ("Teacher", None if alone else _model_line(str(teacher), _dict(result.get("teacher")))),
        ("Method", "none: trained on the labels alone" if alone else method),
        ("Losses", " + ".join(term_text(term) for term in losses) or None),
        ("Data", data_name(run)),
        ("Epochs", result.get("epochs")),
        ("Seed", result.get("seed")),
        ("Training time", duration(seconds) if (seconds := number(result.get("seconds"))) else None),
        ("Device", environment.get("gpu") or environment.get("device") or environment.get("cpu")),
        ("Commit", environment.get("commit")),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items()) or None),
    ]
    lines = [f"- {name}: {_plain(value)}" for name, value in facts if value is not None]
    notes = result.get("notes")
    if result.get("status") != "done":
        lines.append(f"- The run is not finished: status {_plain(result.get('status') or 'unknown')}.")
    return lines + [f"- Note: {_plain(note)}" for note in (notes if isinstance(notes, list) else [])]


def _metrics(run: Run) -> list[str]:
    """Best and last epoch and the teacher, validation and test."""
    result, metric = run.result, metric_of(run)
    kept = str(result.get("kept") or "best")
    models = [("best", "student, best epoch"), ("last", "student, last epoch"), ("teacher", "teacher")]
    found = [(who, label, _dict(result.get(who))) for who, label in models]
    found = [(who, label, values) for who, label, values in found if any(_dict(values.get(s)) for s in SPLITS)]
    if not found:
        return ["The run has no final evaluation."]
    pairs = [(s, name) for s in SPLITS for name in COLUMNS if any(name in _dict(v.get(s)) for _, _, v in found)]
    cells = [["", *(f"{SPLITS[split]} {metric_name(name)}" for split, name in pairs)]]
    for who, label, values in found:
        epoch = f" ({values['epoch']})" if values.get("epoch") is not None else ""
        mark = ", in this file" if who == kept else ""
        cells.append([f"{label}{epoch}{mark}", *(shown(_dict(values.get(s)).get(n), n) for s, n in pairs)])
    return [
        *aligned(cells),
        "",
        f"The best epoch was chosen by val/{metric} on validation images, without the test set.",
        *([f"AP small, medium and large count in {sizes}."] if (sizes := sizes_of(run)) else []),
    ]


def _speed(run: Run) -> list[str]:
    """What `pcdistill bench` measured, where it did."""
    found = read_speed(run.path)
    if found is None:
        return []
    notes = [f"- {_plain(note)}" for note in speed_notes(found)]
    return ["## Speed", "", *aligned(speed_cells(found)), "", *notes, ""]


def _usage(run: Run, student: str) -> list[str]:
    """Three lines that build the student, load its weights and call it."""
    metadata = _weights_metadata(run_weights(run.path))
    detects = run.result.get("task", run.recipe.get("task")) == "detection"
    if detects and data_name(run) != LOADERS:
        return [
            "import pcdistill",
            'student = pcdistill.load_student(".")  # this folder, or its name on the Hugging Face hub',
            'found = student.find("photo.jpg")  # "boxes" in the file\'s pixels, "labels" from 1, "scores"',
        ]
    if data_name(run) == LOADERS:
        return [
            "from pcdistill import models",
            f'models.load_weights(model, "{WEIGHTS}")  # model: a {student}, built as it was for the training',
            f"{'found' if detects else 'logits'} = model.eval()(images)  # images as the training's loader gave them",
        ]
    mean, std = metadata.get("mean"), metadata.get("std")
    image_size = metadata.get("image_size") or _dict(run.recipe.get("data")).get("image_size")
    kwargs = _dict(run.recipe.get("student")).get("kwargs")
    classes = metadata.get("classes")
    known = f"num_classes={len(classes) if isinstance(classes, list) else None}"
    arguments = [json.dumps(student), known, f'weights="{WEIGHTS}"']
    if isinstance(mean, list) and len(mean) != 3:
        arguments.append(f"in_channels={len(mean)}")
    if image_size:
        arguments.append(f"image_size={image_size!r}")
    if kwargs:
        arguments.append(f"kwargs={kwargs!r}")
    normalised = f"normalised with mean {mean} and std {std}" if mean and std else "normalised as in training"
    return [
        "from pcdistill import models",
        f"model = models.build_model({', '.join(arguments)}).eval()",
        f"logits = model(images)  # images in [0, 1], {normalised}",
    ]


def _production(run: Run, student: str) -> list[str]:
    """Code that needs no pcdistill."""
    kwargs = _dict(_dict(run.recipe.get("student")).get("kwargs"))
    made = production_code(student, _weights_metadata(run_weights(run.path)), kwargs)
    if made is None:
        return []
    return [
        "## In production",
        "",
        f"From a file to the answer, without pcdistill. {made[0]}",
        "",
        *_fenced("\n".join(made[1]).replace(WEIGHTS, run_weights(run.path).name), "python"),
        "",
    ]


def _weights_metadata(path: Path) -> dict[str, Any]:
    """What stands in a safetensors file beside the weights: eight bytes of length, then JSON. Read without torch."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = _dict(parse_json(file.read(min(length, 100_000_000)), path.name))
        return checked_metadata(_dict(header.get("__metadata__")).get("pcdistill", "{}"), path.name)
    except (OSError, InputError, struct.error):
        return {}


def _model_line(name: str, model: dict[str, Any]) -> str:
    size = f" ({count(model['parameters'])} parameters)" if number(model.get("parameters")) is not None else ""
    return f"{name}{size}"


def _fenced(text: str, language: str = "") -> list[str]:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text, fence]


def _plain(value: Any) -> str:
    """One line of text that Markdown and HTML leave as it is."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
