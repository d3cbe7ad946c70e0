"""The loop: exact resume, accumulation, averages, clipping, divergence and the rows it writes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pcdistill.classification.distiller import ClassificationDistiller
from pcdistill.classification.metrics import evaluate, top1_metric
from pcdistill.data.loader import Batch
from pcdistill.distillation.objective import Objective, Term
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.checkpoint import random_state
from pcdistill.engine.loop import Metric, Record, Trainer
from pcdistill.engine.placement import make_accelerator, make_placement
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.losses import CELoss, PCDLoss
from pcdistill.recipe import OptimConfig, TrainConfig
from tests.helpers import on_cpu

CLASSES = 4


class Blobs:
    """Separable images, shuffled as a pure function of the epoch."""

    def __init__(self, n: int = 48, batch: int = 8, fail_at: tuple[int, int] | None = None) -> None:
        g = torch.Generator().manual_seed(0)
        self.target = torch.arange(n) % CLASSES
        self.images = torch.randn(n, 3, 4, 4, generator=g) + self.target[:, None, None, None]
        self.batch, self.fail_at = batch, fail_at

    def __len__(self) -> int:
        return len(self.target) // self.batch

    def epoch(self, epoch: int, start: int = 0):
        order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(epoch))
        for b in range(start, len(self)):
            if self.fail_at == (epoch, b):
                raise RuntimeError("killed")
            i = order[b * self.batch : (b + 1) * self.batch]
            yield Batch(self.images[i], self.target[i])


def net(seed: int = 0, *, norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm2d(6), nn.Dropout(0.2)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 6, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES))


def trainer(batches, out=None, *, optim=None, norm=True, student=None, terms=None, **train) -> Trainer:
    config = TrainConfig(**{"epochs": 3, "device": "cpu", "checkpoint_seconds": 0.0, **train})
    terms = terms or [Term("ce", CELoss()), Term("pcd", PCDLoss(stages=2, schedule="progressive"), 2.0, 2.0)]
    distiller = ClassificationDistiller(student or net(norm=norm), Objective(terms), Teacher(net(1)))
    placement = on_cpu(distiller.student, **train)
    torch.manual_seed(5)

    def validate(model):
        return {k: v for k, v in evaluate(model, batches.epoch(0), placement).items() if k in ("loss", "top1")}

    return Trainer(
        distiller,
        batches,
        validate,
        optim=optim or OptimConfig(lr=0.05),
        train=config,
        placement=placement,
        metric=top1_metric(CLASSES, 0.05),
        record=Record(out),
    )


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [(0, 4), (1, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, fail_at, ema):
    whole = trainer(Blobs(), tmp_path / "whole", ema=ema).fit()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(Blobs(fail_at=fail_at), tmp_path / "cut", ema=ema).fit()
    torch.manual_seed(99)  # a new process starts with other random states
    again = trainer(Blobs(), tmp_path / "cut", ema=ema)
    assert again.resume()
    resumed = again.fit()
    assert whole.last_state.keys() == resumed.last_state.keys()
    assert all(torch.equal(whole.last_state[key], resumed.last_state[key]) for key in whole.last_state)
    assert all(torch.equal(whole.best_state[key], resumed.best_state[key]) for key in whole.best_state)
    timing = ("seconds", "images_per_second")
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def as_written_before(run: Trainer) -> dict:
    """last.pt of format pcdistill-1, key by key as its first writer had it."""
    return {
        "format": "pcdistill-1",
        "digest": "",
        "processes": 1,
        "epoch": run.epoch,
        "batch": run.batch,
        "step": run.step,
        "epoch_seconds": run.epoch_seconds,
        "student": run.student.state_dict(),
        "objective": run.objective.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict(),
        "scaler": None,
        "sums": run.tally.sums,
        "history": run.history,
        "best": run.best,
        "random": [random_state()],
    }


@pytest.mark.slow
def test_a_checkpoint_written_before_resumes_and_keeps_its_keys(tmp_path):
    whole = trainer(Blobs(), tmp_path / "whole", ema=0.9).fit()
    cut = trainer(Blobs(fail_at=(1, 4)), tmp_path / "cut", ema=0.9)
    with pytest.raises(RuntimeError, match="killed"):
        cut.fit()
    old = as_written_before(cut)
    assert set(old["sums"]) == {"loss", "loss/ce", "loss/pcd", "correct", "counted", "samples"}
    torch.save(old, tmp_path / "cut" / "last.pt")
    torch.manual_seed(99)
    again = trainer(Blobs(), tmp_path / "cut", ema=0.9)
    assert again.resume()
    assert (again.epoch, again.batch, again.step) == (1, 4, 10)
    resumed = again.fit()
    assert all(torch.equal(whole.last_state[key], resumed.last_state[key]) for key in whole.last_state)
    assert all(torch.equal(whole.best_state[key], resumed.best_state[key]) for key in whole.best_state)
    assert [row["train/top1"] for row in whole.history] == [row["train/top1"] for row in resumed.history]
    written = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert set(written) == {*old, "contents"} - {"epoch_seconds"}  # times are in times.json now
    assert {type(written[key]) for key in ("epoch", "batch", "step")} == {int}


def test_resume_refuses_another_recipe(tmp_path):
    trainer(Blobs(), tmp_path, epochs=1).fit()
    other = trainer(Blobs(), tmp_path, epochs=1)
    other.record = replace(other.record, digest="other")
    with pytest.raises(InputError, match="another recipe"):
        other.resume()


def test_accumulated_micro_batches_equal_one_batch():
    terms = [Term("ce", CELoss())]
    whole = trainer(Blobs(batch=16), norm=False, terms=terms).fit()
    parts = trainer(Blobs(batch=4), norm=False, terms=terms, accumulate=4).fit()
    for key, value in whole.last_state.items():
        torch.testing.assert_close(parts.last_state[key], value, rtol=1e-4, atol=1e-6)


def test_the_last_group_of_micro_batches_may_be_short():
    terms = [Term("ce", CELoss())]
    run = trainer(Blobs(n=24, batch=4), norm=False, terms=terms, accumulate=4, epochs=1)  # 6 micro-batches: 4 + 2
    run.fit()
    assert run.step == 2


def test_warm_up_weights_and_phases_follow_the_epoch():
    run = trainer(Blobs(), epochs=4)
    seen = []
    original = run.objective.set_progress

    def spy(**where):
        original(**where)
        seen.append((where["epoch"], run.objective.factors[1], where["progress"]))

    run.objective.set_progress = spy
    run.fit()
    assert [factor for epoch, factor, _ in seen if epoch == int(epoch)] == [1.0, 2.0, 2.0, 2.0]
    assert seen[0][2] == 0.0
    assert seen[-1][2] == pytest.approx(23 / 24)


def test_a_loss_that_is_not_finite_stops_with_what_to_change():
    class Blowup(nn.Module):
        def forward(self, student_logits, teacher_logits, target=None):
            return student_logits.sum() * float("inf")

    with pytest.raises(TrainingStopped, match=r"not finite in epoch 1.*lower optim.lr \(now 0.05\)"):
        trainer(Blobs(), terms=[Term("blowup", Blowup())]).fit()


def test_accuracy_that_collapses_to_chance_stops():
    run = trainer(Blobs(), epochs=5)
    values = iter([90.0, 25.0, 25.0, 25.0, 25.0])
    run.validate = lambda model: {"loss": 1.0, "top1": next(values)}
    with pytest.raises(
        TrainingStopped, match=r"collapsed to 25.0 % \(chance is 25.0 %\) after a best of 90.0 % in epoch 1"
    ):
        run.fit()
    assert len(run.history) == 3


def test_the_loop_adds_up_what_a_distiller_counts_whatever_its_task():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.objective = net(), Objective([Term("ce", CELoss())])

        def forward(self, batch):
            loss = self.student(batch.images).square().mean()
            return {"loss": loss, "sum/even": (batch.target % 2 == 0).sum(), "sum/all": torch.tensor(len(batch))}

    values = iter([1.0, 3.0, 2.0])
    run = Trainer(
        Alone(),
        Blobs(),
        lambda model: {"score": next(values)},
        optim=OptimConfig(),
        train=TrainConfig(epochs=3, device="cpu"),
        placement=on_cpu(),
        metric=Metric(
            "score",
            lambda counts: {"score": 100 * counts["even"] / counts["all"]},
            lambda rows: "score fell" if len(rows) > 1 and rows[-1]["val/score"] < rows[-2]["val/score"] else None,
        ),
    )
    with pytest.raises(TrainingStopped, match="score fell"):
        run.fit()
    assert run.best == {"epoch": 2, "value": 3.0}
    assert [row["train/score"] for row in run.history] == [50.0] * 3
    assert list(run.history[0]) == [
        "epoch",
        "lr",
        "train/loss",
        "train/score",
        "val/score",
        "seconds",
        "images_per_second",
    ]


def test_best_is_the_first_of_equals_and_its_weights_are_kept():
    run = trainer(Blobs(), epochs=3)
    states = []
    values = iter([50.0, 70.0, 70.0])

    def validate(model):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"loss": 1.0, "top1": next(values)}

    run.validate = validate
    fit = run.fit()
    assert fit.best_epoch == 2
    assert all(torch.equal(fit.best_state[key], states[1][key]) for key in states[1])
    assert all(torch.equal(fit.last_state[key], states[2][key]) for key in states[2])


def test_clipping_bounds_the_step():
    optim = OptimConfig(lr=1.0, momentum=0, weight_decay=0, clip_norm=1e-6, schedule="constant")
    free = trainer(Blobs(), epochs=1, optim=optim)
    before = {key: value.detach().clone() for key, value in free.student.named_parameters()}
    free.fit()
    moved = math.sqrt(
        sum(float((p - before[name]).detach().square().sum()) for name, p in free.student.named_parameters())
    )
    assert 0 < moved <= len(free.batches) * 1.01e-6


def test_the_history_has_every_term_and_reports_training_accuracy(tmp_path):
    fit = trainer(Blobs(), tmp_path, epochs=2).fit()
    row = fit.history[-1]
    assert {"epoch", "lr", "train/loss", "train/ce", "train/pcd", "train/top1", "val/loss", "val/top1"} <= set(row)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["epoch", "lr"]
    assert len(lines) == 2


def test_evaluate_counts_every_sample_and_restores_the_mode():
    data, model = Blobs(n=40), net().train()
    found = evaluate(model, data.epoch(0), on_cpu())
    assert model.training
    with torch.no_grad():
        logits = model.eval()(data.images)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == data.target).float().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, data.target)), rel=1e-5)
    assert found["samples"] == 40
    assert found["top5"] == 100.0


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(InputError, match="float16 needs a GPU"):
        make_accelerator(TrainConfig(device="cpu", precision="float16"))


def test_runs_of_different_precision_follow_each_other_in_one_process():
    kinds = [make_accelerator(TrainConfig(precision=p, device="cpu")).mixed_precision for p in ("float32", "bfloat16")]
    assert kinds == ["no", "bf16"]
    assert make_accelerator(TrainConfig(device="cpu")).mixed_precision == "no"


@pytest.mark.parametrize(
    ("conv", "last"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(15, 4, 1, stride=(1, 3)), False),
        (nn.Conv2d(16, 16, 1, stride=2), True),
        (nn.Conv2d(8, 16, 1), True),
        (nn.Conv2d(8, 16, 3, stride=2), True),
    ],
    ids=str,
)
def test_channels_last_only_where_training_in_it_is_sound(conv, last):
    student = nn.Sequential(nn.ReLU(), nn.Sequential(conv))
    cpu, cuda = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    channels_last, contiguous = torch.channels_last, torch.contiguous_format

    def formats(accelerator, student=None, **train):
        chosen = make_placement(TrainConfig(**train), accelerator, student)
        return chosen.memory_format, chosen.frozen_format

    assert formats(cpu, student) == (channels_last if last else contiguous, channels_last)  # a teacher goes no way back
    assert formats(cpu, student, channels_last=False) == (contiguous, contiguous)
    assert formats(cuda, student) == formats(cpu) == (channels_last, channels_last)
    if last:
        assert formats(cpu, student, channels_last=True) == (channels_last, channels_last)
    else:
        with pytest.raises(
            InputError, match=r"train.channels_last: 1\.0 is a strided 1x1 convolution of fewer than 16"
        ):
            formats(cpu, student, channels_last=True)


def test_a_student_that_breaks_in_channels_last_is_trained_without():
    batches = Blobs()
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, stride=2), nn.Flatten(), nn.Linear(32, CLASSES)
    )
    run = trainer(batches, student=student)
    assert student[0].weight.is_contiguous()
    assert next(batches.epoch(0)).to(run.placement).images.is_contiguous()
    run = trainer(batches)
    assert run.student[0].weight.is_contiguous(memory_format=torch.channels_last)
    batch = next(batches.epoch(0)).to(run.placement)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len(batch) == 8
