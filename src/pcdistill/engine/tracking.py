"""Where metrics go besides metrics.csv: TensorBoard, W&B, MLflow, trackio, each by its name in `train.trackers`.

They are Accelerate's trackers, as its `log_with` names them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pcdistill.extras import need
from pcdistill.recipe import Recipe

Tracker = Callable[[dict[str, float], int], None]
PROJECT = "pcdistill"


def check_trackers(recipe: Recipe) -> None:
    """Raise before anything is trained if a tracker's package is not installed."""
    for name in recipe.train.trackers:
        need(name, what=f"train.trackers: {name}")


class Trackers:
    """The trackers of one run; calling it with (row, step) logs to all of them.

    A run is named as its folder, in the project `pcdistill`; TensorBoard writes to the folder's `tensorboard`. Where a
    service keeps its data is up to its own settings: WANDB_MODE, MLFLOW_TRACKING_URI and the like.

    Args:
        recipe: names the trackers, and is stored with the run.
        out: the run's folder.
        enabled: whether this is the process that logs.
    """

    def __init__(self, recipe: Recipe, out: Path, *, enabled: bool = True) -> None:
        self._open = [_started(name, recipe, out) for name in recipe.train.trackers if enabled]

    def __call__(self, row: dict[str, float], step: int) -> None:
        for tracker in self._open:
            tracker.log(row, step=step)

    def close(self) -> None:
        """End the run at every service, so that another of this process is another."""
        for tracker in self._open:
            tracker.finish()
        self._open.clear()


def _started(name: str, recipe: Recipe, out: Path) -> GeneralTracker:
    run = out.resolve().name
    if name == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", logging_dir=out)
        tracker.start()
        return tracker  # without the recipe, which its table of hyperparameters cannot show; recipe.yaml is beside it
    tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **{"run_name" if name == "mlflow" else "name": run})
    tracker.start()
    tracker.store_init_configuration(_flat(recipe.to_dict()))
    return tracker


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found
