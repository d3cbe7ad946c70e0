"""ONNX: students as files of it, such files run by ONNX Runtime, and their form in 8-bit integers."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcdistill.errors import PcdistillError, first_line
from pcdistill.extras import need

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLD_OPSET = 17


def need_onnx() -> None:
    """Raise InputError unless what writes and runs ONNX is installed."""
    need(*PACKAGES, what="ONNX")


def write_classifier(model: nn.Module, path: Path, shape: Sequence[int], metadata: Mapping[str, Any]) -> None:
    """Write a classifier as ONNX: images [batch, C, H, W] to logits [batch, K], with any batch.

    Args:
        model: in eval mode, on the CPU.
        path: the file.
        shape: C, H, W of an image.
        metadata: stands in the file's metadata_props, each value as JSON.

    Raises:
        PcdistillError: the exporter cannot.
    """
    images = torch.zeros(2, *shape)
    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:  # the exporter's own errors have no common base
            model.eval()
            reason = first_line(error.__cause__ or error)
            raise PcdistillError(f"the student cannot be exported to ONNX: {reason}") from error
    program.model.metadata_props.update(_texts(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)


class _OneImage(nn.Module):
    """A detector as a function of one image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([image])[0]
        return found["boxes"], found["labels"], found["scores"]


def write_detector(model: nn.Module, path: Path, image: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a detector as ONNX: an image [3, height, width] in [0, 1] of any size to boxes, labels and scores.

    torchvision's detectors branch on how many boxes they find (in `batched_nms`), which torch.export cannot follow; the
    exporter that traces can.

    Raises:
        PcdistillError: the exporter cannot.
    """
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = _OneImage(model).eval()
    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                wrapped,
                (image,),
                str(path),
                dynamo=False,
                opset_version=OLD_OPSET,
                input_names=["image"],
                output_names=["boxes", "labels", "scores"],
                dynamic_axes={
                    "image": {1: "height", 2: "width"},
                    **{name: {0: "found"} for name in ("boxes", "labels", "scores")},
                },
            )
        except Exception as error:
            raise PcdistillError(f"the student cannot be exported to ONNX: {first_line(error)}") from error
        finally:
            wrapped.eval()  # the exporter may leave it in train mode
    written = onnx.load(path)
    onnx.helper.set_model_props(written, _texts(metadata))
    onnx.save(written, path)


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}


def _quiet() -> "warnings.catch_warnings[None]":
    """The exporters warn of their own insides."""
    return warnings.catch_warnings(action="ignore")


def open_session(path: Path) -> Any:
    """A file in ONNX Runtime, on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxClassifier(nn.Module):
    """An ONNX file in the classifier's place: images [N, C, H, W] to logits [N, K]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = open_session(path)

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.cpu().contiguous().numpy()})[0])


class OnnxDetector(nn.Module):
    """An ONNX file in the detector's place: a list of images [3, H, W] to what is found on each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = open_session(path)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        outputs = [self.session.run(None, {"image": image.cpu().contiguous().numpy()}) for image in images]
        names = ("boxes", "labels", "scores")
        return [{n: torch.from_numpy(value) for n, value in zip(names, out, strict=True)} for out in outputs]


class _Calibration:
    """Images in the form that onnxruntime's calibration reads; it is a CalibrationDataReader by its method alone."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.cpu().numpy()}


def write_int8(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Quantise a classifier's ONNX file statically: weights and activations in 8 bits, weights by channel.

    Args:
        source: the file in float.
        path: the file in int8; it keeps the metadata.
        batches: images [N, C, H, W] that the ranges of the activations are taken from.

    Raises:
        PcdistillError: ONNX Runtime cannot.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Calibration)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = os.path.join(folder, "prepared.onnx")
        try:
            quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                str(path),
                _Calibration(batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # onnxruntime raises anything
            raise PcdistillError(f"ONNX Runtime cannot quantise {source}: {first_line(error)}") from error
    written = onnx.load(path)
    kept = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    onnx.helper.set_model_props(written, kept)
    onnx.save(written, path)
