"""Trackers by name: what each is told, when it is ended, and that a missing one is named first."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pcdistill.engine.placement import make_accelerator
from pcdistill.engine.tracking import Trackers, check_trackers
from pcdistill.errors import InputError
from pcdistill.recipe import TrainConfig, make_recipe

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


def recipe(*names: str):
    return make_recipe({"method": "kd", "train": {"trackers": list(names), "device": "cpu"}})


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_one_is_named_before_training(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        InputError, match=f"{name} needs {name}, which is not installed: pip install 'pcdistill.{name}.'"
    ):
        check_trackers(recipe(name))


class Service:
    """Stands for wandb, trackio or mlflow: it writes down what Accelerate calls."""

    def __init__(self, name: str) -> None:
        self.calls: list[tuple] = []
        self.module = ModuleType(name)
        run = SimpleNamespace(log=self.note("log"), finish=self.note("finish"))
        config = SimpleNamespace(update=self.note("config"))
        for key, value in {
            "init": self.note("init", run),
            "config": config,
            "search_experiments": lambda **_: [],
            "create_experiment": self.note("experiment", "7"),
            "start_run": self.note("start_run", run),
            "log_params": self.note("config"),
            "log_metrics": self.note("log"),
            "end_run": self.note("finish"),
            "utils": SimpleNamespace(
                validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
            ),
        }.items():
            setattr(self.module, key, value)

    def note(self, what: str, result=None):
        def call(*arguments, **named):
            self.calls.append((what, arguments, named))
            return result

        return call


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_service_gets_the_run_the_recipe_and_every_epoch(name, monkeypatch, tmp_path):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service.module)
    make_accelerator(TrainConfig(device="cpu"))
    trackers = Trackers(recipe(name), tmp_path / "my-run")
    for step in (10, 20):
        trackers({"epoch": step // 10, "train/loss": 0.5}, step)
    trackers.close()
    trackers.close()
    started, *others = [call for call in service.calls if call[0] not in ("experiment", "config")]
    assert "my-run" in started[2].values()
    assert "pcdistill" in str(service.calls[0])
    told = {key: value for call in service.calls if call[0] == "config" for key, value in call[1][0].items()}
    assert told["method"] == "kd"
    assert told["optim.lr"] == 0.05
    assert '"method": "ce"' in told["losses"]
    assert [call[0] for call in others] == ["log", "log", "finish"]
    assert [call[2]["step"] for call in others[:2]] == [10, 20]
    assert others[1][1][0] == {"epoch": 2, "train/loss": 0.5}


def test_tensorboard_writes_to_the_runs_folder(tmp_path):
    make_accelerator(TrainConfig(device="cpu"))
    trackers = Trackers(recipe("tensorboard"), tmp_path)
    trackers({"val/top1": 12.5}, 3)
    trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val/top1")
    assert [(one.step, one.value) for one in found] == [(3, 12.5)]


def test_only_the_process_that_logs_opens_anything(tmp_path):
    trackers = Trackers(recipe("wandb", "mlflow"), tmp_path, enabled=False)
    trackers({"loss": 1.0}, 1)
    trackers.close()
