"""After the end of a run: its pages, and giving it back out of its folder."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcdistill import models, report
from pcdistill.commands.folder import read_metrics
from pcdistill.engine.checkpoint import atomic_write, load_checkpoint
from pcdistill.engine.fingerprint import KEPT, weights_fingerprint
from pcdistill.engine.loop import with_times, write_history
from pcdistill.errors import InputError
from pcdistill.models.feature_maps import Headed
from pcdistill.models.heads import with_head
from pcdistill.recipe import Recipe

WEIGHTS, METRICS = "student.safetensors", "metrics.csv"
AVERAGE = "module."  # before the names of a moving average's weights


def write_pages(out: Path, summary: dict[str, Any], *, missing_only: bool = False) -> None:
    """report.html, and of a run that is done README.md, the student's card.

    Args:
        out: the run's folder.
        summary: what result.json holds, or will: it is written after them.
        missing_only: leave those that are there as they are.
    """
    if not (missing_only and (out / "report.html").exists()):
        report.write_run_report(out, summary)
    if summary.get("status") == "done" and not (missing_only and (out / "README.md").exists()):
        atomic_write(out / "README.md", report.write_model_card(out, summary))


def repair(out: Path, recipe: Recipe, history: list[dict[str, float]]) -> None:
    """recipe.yaml and metrics.csv of a run that is done, where they are missing."""
    if not (out / "recipe.yaml").exists():
        atomic_write(out / "recipe.yaml", recipe.to_yaml())
    if history and not (out / METRICS).exists():
        write_history(out / METRICS, history)


def stored_history(out: Path) -> list[dict[str, float]]:
    """A dict per epoch, from the last checkpoint, or, where that was deleted or is damaged, from metrics.csv."""
    if (out / "last.pt").exists():
        with suppress(InputError):
            return with_times(load_checkpoint(out / "last.pt")["history"], out)[0]
    return read_metrics(out / METRICS)


def load_student(out: Path, student: nn.Module, summary: dict[str, Any]) -> nn.Module:
    """The student with the kept weights of a run that is done, from its file, or else from its checkpoints.

    Raises:
        InputError: the weights are gone, damaged, or another model's.
    """
    if not (out / WEIGHTS).exists():
        try:
            student.load_state_dict(_kept_state(out, summary))
        except RuntimeError as error:
            raise InputError(f"the weights in {out} do not fit the student, {type(student).__name__}") from error
        return student
    if not isinstance(student, Headed):
        student = with_head(student, out / WEIGHTS)
    models.load_weights(student, out / WEIGHTS)
    kept = dict(summary.get("contents") or {}).get(KEPT)
    if kept not in (None, weights_fingerprint(student.state_dict())):
        raise InputError(f"{out / WEIGHTS} is not what the run in {out} left; put that back, or delete the file")
    return student


def _kept_state(out: Path, summary: dict[str, Any]) -> dict[str, Tensor]:
    """The kept weights, from best.pt or last.pt."""
    kept = str(summary.get("kept"))
    path = out / f"{kept}.pt"
    if not path.exists():
        raise InputError(
            f"{out} holds this run, which is done, but its weights are gone ({WEIGHTS} and {path.name}); put one of "
            f"them back, or delete {out} to train again"
        )
    state = load_checkpoint(path)
    whose = (summary.get("digest"), dict(summary.get(kept) or {}).get("epoch"))
    if (state.get("digest"), len(state["history"]) if kept == "last" else state["epoch"]) != whose:
        raise InputError(f"{path} is not the checkpoint of the result in {out}; put it back, or delete {out}")
    average = state.get("ema") if kept == "last" else None
    weights: dict[str, Tensor] = state["student"]
    if average is not None:
        weights = {key.removeprefix(AVERAGE): value for key, value in average.items() if key.startswith(AVERAGE)}
    recorded = dict(summary.get("contents") or {}).get(KEPT)
    if recorded not in (None, weights_fingerprint(weights)):
        raise InputError(f"{path} is not the checkpoint of the result in {out}; put it back, or delete {out}")
    return weights
