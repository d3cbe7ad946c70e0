"""Optional packages: which extra brings which, and the one sentence that is told where one is missing."""

import importlib.util

from pcdistill.errors import InputError

# What pcdistill imports on demand -> the extra of pyproject.toml that brings it.
EXTRA_OF = {
    "faster_coco_eval": "detection",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "huggingface_hub": "hub",
    "transformers": "hf",
    "optuna": "tune",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "fsspec": "remote",
    "ray": "cluster",
    "webdataset": "streams",
    "datasets": "streams",
    "pyarrow": "streams",
}


def need(*packages: str, what: str) -> None:
    """Raise InputError, naming the extra to install, unless all packages of one extra are there.

    Args:
        packages: names to import.
        what: what needs them, as the sentence begins.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extra = EXTRA_OF[missing[0]]
        raise InputError(
            f"{what} needs {' and '.join(missing)}, which is not installed: pip install 'pcdistill[{extra}]'"
        )
