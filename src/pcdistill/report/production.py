"""The card's code for production: from a file on disk to a class name or boxes, without pcdistill."""

import json
from typing import Any

OPEN = 'ImageOps.exif_transpose(Image.open("photo.jpg"))'
ODD_INPUTS = ("googlenet", "inception_v3")  # torchvision's constructors build more than their weights have


def production_code(name: str, metadata: dict[str, Any], kwargs: dict[str, Any]) -> tuple[str, list[str]] | None:
    """Code that needs timm, transformers, torchvision or ONNX Runtime alone, and equals what `evaluate` computes.

    Args:
        name: the student's full name.
        metadata: what stands beside its weights.
        kwargs: of its constructor.

    Returns:
        A sentence on what it needs, and the lines, which run in the run's folder beside a `photo.jpg`; None where the
        metadata do not say how images are made.
    """
    if metadata.get("task") == "detection":
        return _exported("pcdistill export . --to onnx"), _onnx_detector()
    if not {"classes", "mean", "std", "image_size", "short_side"} <= set(metadata):
        return None
    zoo, _, inner = name.partition("/")
    own_head, channels = "head" in metadata, len(metadata["mean"])
    if zoo == "timm" and not own_head:
        return "It needs timm alone.", _timm(metadata)
    if zoo == "hf" and not own_head:
        return "It needs transformers and torchvision.", _transformers(metadata)
    if zoo == "torchvision" and not own_head and channels == 3 and inner not in ODD_INPUTS:
        return "It needs torchvision alone.", _torchvision(inner, metadata, kwargs)
    return _exported("pcdistill export . --to onnx"), _onnx_classifier(metadata)


def _exported(command: str) -> str:
    return f"It needs ONNX Runtime, NumPy and Pillow alone, after `{command}` in this folder."


def _prepared(metadata: dict[str, Any], mean: str, std: str) -> list[str]:
    """Pixels by torchvision's functions: `image` [C, S, S]."""
    size, short = metadata["image_size"], metadata["short_side"]
    resized = f"F.resize(image, [{size}, {size}], antialias=True)"
    if short is not None:
        resized = f"F.center_crop(F.resize(image, [{short}], antialias=True), [{size}, {size}])"
    mode = "L" if len(metadata["mean"]) == 1 else "RGB"
    return [
        f'image = F.pil_to_tensor({OPEN}.convert("{mode}"))',
        f"image = {resized}",
        f"image = F.normalize(image / 255, {mean}, {std})",
    ]


def _timm(metadata: dict[str, Any]) -> list[str]:
    return [
        "import timm",
        "import torch",
        "from PIL import Image, ImageOps",
        "from torchvision.transforms.v2 import functional as F",
        "",
        'model = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:USER/NAME"',
        "about = model.pretrained_cfg",
        *_prepared(metadata, 'about["mean"]', 'about["std"]'),
        "with torch.no_grad():",
        "    probabilities = model(image[None]).softmax(dim=1)[0]",
        'print(about["label_names"][int(probabilities.argmax())], float(probabilities.max()))',
    ]


def _transformers(metadata: dict[str, Any]) -> list[str]:
    return [
        "import torch",
        "from PIL import Image, ImageOps",
        "from torchvision.transforms.v2 import functional as F",
        "from transformers import AutoModelForImageClassification",
        "",
        'model = AutoModelForImageClassification.from_pretrained(".").eval()',
        *_prepared(metadata, repr(list(metadata["mean"])), repr(list(metadata["std"]))),
        "with torch.no_grad():",
        "    probabilities = model(image[None]).logits.softmax(dim=1)[0]",
        "print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))",
    ]


def _torchvision(name: str, metadata: dict[str, Any], kwargs: dict[str, Any]) -> list[str]:
    size = metadata["image_size"]
    options = {key: value for key, value in kwargs.items() if key != "weights"}
    if name.startswith("vit_"):
        options.setdefault("image_size", size)
    if name == "maxvit_t":
        options.setdefault("input_size", (size, size))
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return [
        "import json",
        "import torch",
        "from PIL import Image, ImageOps",
        "from safetensors import safe_open",
        "from safetensors.torch import load_file",
        "from torchvision.models import get_model",
        "from torchvision.transforms.v2 import functional as F",
        "",
        f"model = get_model({json.dumps(name)}, num_classes={len(metadata['classes'])}{more}).eval()",
        'model.load_state_dict(load_file("student.safetensors"))',
        'with safe_open("student.safetensors", "pt") as file:',
        '    about = json.loads(file.metadata()["pcdistill"])',
        *_prepared(metadata, 'about["mean"]', 'about["std"]'),
        "with torch.no_grad():",
        "    probabilities = model(image[None]).softmax(dim=1)[0]",
        'print(about["classes"][int(probabilities.argmax())], float(probabilities.max()))',
    ]


def _onnx_opened() -> list[str]:
    return [
        "import json",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        'session = onnxruntime.InferenceSession("export/student.onnx")',
        "about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}",
        'how = about["preprocess"]',
    ]


def _onnx_classifier(metadata: dict[str, Any]) -> list[str]:
    size, short = metadata["image_size"], metadata["short_side"]
    resized = [f"image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)"]
    if short is not None:
        resized = [
            "width, height = image.size",
            f"size = ({short}, int({short} * height / width))",
            "if width > height:",
            f"    size = (int({short} * width / height), {short})",
            f"left, top = (round((side - {size}) / 2) for side in size)",
            f"image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + {size}, top + {size}))",
        ]
    return [
        *_onnx_opened(),
        f'image = {OPEN}.convert(how["color"])',
        *resized,
        f"pixels = np.asarray(image, dtype=np.float32).reshape({size}, {size}, -1) / 255",
        'pixels = (pixels - how["mean"]) / how["std"]',
        "images = pixels.transpose(2, 0, 1)[None].astype(np.float32)",
        'logits = session.run(None, {"images": images})[0][0]',
        "probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()",
        'print(about["classes"][probabilities.argmax()], float(probabilities.max()))',
    ]


def _onnx_detector() -> list[str]:
    return [
        *_onnx_opened(),
        f'image = {OPEN}.convert("RGB")',
        'scale = min(1.0, (how["longest_side"] or max(image.size)) / max(image.size))',
        "if scale < 1:",
        "    size = [max(1, round(side * scale)) for side in image.size]",
        "    image = image.resize(size, Image.Resampling.BILINEAR)",
        "pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255",
        'boxes, labels, scores = session.run(None, {"image": pixels})',
        "for box, label, score in zip(boxes, labels, scores):",
        "    if score >= 0.3:",
        '        print(about["classes"][label - 1], float(score), (box / scale).tolist())',
    ]
