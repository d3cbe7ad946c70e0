"""Where metrics go besides metrics.csv: TensorBoard, Weights & Biases, trackio, each by name in `train.trackers`."""

import importlib
from collections.abc import Callable
from pathlib import Path

from pcdistill.extras import need
from pcdistill.recipe import Recipe

Tracker = Callable[[dict[str, float], int], None]


def check_trackers(recipe: Recipe) -> None:
    """Raise before anything is trained if a tracker's package is not installed."""
    for name in recipe.train.trackers:
        need(name, what=f"train.trackers: {name}")


def make_trackers(recipe: Recipe, out: Path, *, enabled: bool = True) -> tuple[Tracker, ...]:
    """One function of (row, step) for every tracker that the recipe names."""
    if not enabled:
        return ()
    makers = {"tensorboard": _tensorboard, "wandb": _hosted, "trackio": _hosted}
    return tuple(makers[name](name, recipe, out) for name in recipe.train.trackers)


def _tensorboard(name: str, recipe: Recipe, out: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only for those who ask for it

    writer = SummaryWriter(str(out / "tensorboard"))

    def log(row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log


def _hosted(name: str, recipe: Recipe, out: Path) -> Tracker:
    """wandb and trackio share their calls: init(project, name, config) and log(dict)."""
    module = importlib.import_module(name)
    module.init(project="pcdistill", name=out.name, config=recipe.to_dict())

    def log(row: dict[str, float], step: int) -> None:
        module.log({**row, "step": step})

    return log
