"""Runs with feature terms: what they learn and keep, exact resume with a memory, SimKD's new head from run to file."""

import csv
import signal

import pytest
import torch
from torch import nn

from pcdistill import cli, models
from pcdistill.classification.features import select_rows, tap
from pcdistill.classification.task import Classification, build_distiller, build_student, build_teacher, wrap_teacher
from pcdistill.commands.evaluate import evaluate_model
from pcdistill.commands.run import run_with_report
from pcdistill.commands.session import run
from pcdistill.engine.checkpoint import load_checkpoint
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.methods import METHODS
from pcdistill.models.feature_maps import Headed
from pcdistill.models.heads import with_head
from pcdistill.recipe import TeacherConfig, make_recipe
from tests.helpers import data_of, on_cpu
from tests.processes import finished, program

FEATURE_METHODS = ["fitnet", "at", "rkd", "sp", "pkt", "nst", "vid", "crd", "ofd", "reviewkd", "simkd", "srrl"]
TRAINED_PARTS = {"fitnet", "vid", "crd", "ofd", "reviewkd", "simkd", "srrl"}


def recipe(method: str, weights: str, *, teacher: dict | None = None, data: dict | None = None, **train):
    return make_recipe(
        {
            "data": {"name": "digits", "batch_size": 32, "limit": 128, **(data or {})},
            "student": {"name": "cifar/resnet8", "kwargs": {"widths": [4, 4, 8, 8]}},
            "teacher": {"name": "cifar/resnet8", "weights": weights, **(teacher or {})},
            "method": method,
            "allow": ["weak-teacher"],
            "train": {"epochs": 2, "device": "cpu", **train},
        }
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A teacher that knows nothing: feature methods run all the same."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    models.save_weights(models.build_model("cifar/resnet8", num_classes=10, in_channels=1), path)
    return str(path)


def test_the_registry_has_the_twelve():
    found = {name for name, m in METHODS.items() if m.kind == "features" and (m.group or m.kind) == "features"}
    assert found == set(FEATURE_METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_every_method_trains_and_keeps_its_parts_apart_from_the_student(method, weights, tmp_path):
    result = run(recipe(method, weights, epochs=1), tmp_path / "run")
    assert result.summary["status"] == "done"
    assert method in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert bool(checkpoint["objective"]) is (method in TRAINED_PARTS)
    if method != "simkd":
        plain = models.build_model("cifar/resnet8", num_classes=10, in_channels=1, kwargs={"widths": [4, 4, 8, 8]})
        assert checkpoint["student"].keys() == plain.state_dict().keys()
        models.load_weights(plain, tmp_path / "run" / "student.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", "simkd", "reviewkd"])
def test_an_interrupted_run_ends_with_the_same_bits(method, weights, tmp_path, monkeypatch):
    whole = run(recipe(method, weights, checkpoint_seconds=0.0), tmp_path / "whole")
    from pcdistill.engine import loop as fit

    steps = []
    original = fit.Trainer.save_if_due

    def stop_after_two(self):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(fit.Trainer, "save_if_due", stop_after_two)
    with pytest.raises(fit.Interrupted):
        run(recipe(method, weights, checkpoint_seconds=0.0), tmp_path / "cut")
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 2
    resumed = run(recipe(method, weights, checkpoint_seconds=0.0), tmp_path / "cut")
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    one, two = (load_checkpoint(tmp_path / name / "last.pt")["objective"] for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_crd_gets_positions_and_labels(weights):
    data = data_of("digits", batch_size=32, limit=128)
    chosen = recipe("crd", weights)
    student = build_student(chosen.student, classes=data.classes, data=data)
    teacher = build_teacher(chosen.teacher, data=data)
    distiller = build_distiller(chosen, student, teacher, data=data, placement=on_cpu())
    crd = distiller.objective.losses[1]
    assert crd.n_data == data.train.num_samples
    batch = next(iter(data.train.epoch(0)))
    before = crd.memory_student.clone()
    distiller(batch)
    changed = (crd.memory_student != before).any(1).nonzero().flatten()
    assert torch.equal(changed, batch.index.sort().values)
    drawn = crd.draw(batch.index)
    labels = data.train.labels
    assert (labels[drawn[:, 1:]] != labels[drawn[:, :1]]).all()
    assert torch.equal(labels[batch.index], batch.target)


def loss_of(method: str, weights: str, **teacher) -> float:
    """Of the first batch, by a distiller from one seed."""
    data = data_of("digits", batch_size=32, limit=128)
    chosen = recipe(method, weights, teacher=teacher)
    torch.manual_seed(0)
    student = build_student(chosen.student, classes=data.classes, data=data)
    made = build_teacher(chosen.teacher, data=data)
    distiller = build_distiller(chosen, student, made, data=data, placement=on_cpu())
    loss = distiller(next(iter(data.train.epoch(0))))["loss"]
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("method", ["ofd", "reviewkd", "simkd", "srrl"])
def test_features_of_micro_batches_and_of_fewer_bits(method, weights):
    whole = loss_of(method, weights)
    assert loss_of(method, weights, batch_size=5) == pytest.approx(whole, rel=1e-4)
    for precision in ("bfloat16", "float8"):
        assert loss_of(method, weights, precision=precision) == pytest.approx(whole, rel=0.1)


def test_a_teacher_in_parts_gives_logits_alone(weights):
    data = data_of("digits", batch_size=32, limit=128)
    with pytest.raises(InputError, match="split by teacher.shard, gives logits alone"):
        Classification().check(recipe("fitnet", weights, teacher={"shard": True}), data)


def test_positions_are_repeated_for_two_views(weights):
    data = data_of("digits", batch_size=32, limit=128, views=2)
    chosen = recipe("crd", weights, data={"views": 2})
    student = build_student(chosen.student, classes=data.classes, data=data)
    distiller = build_distiller(
        chosen, student, build_teacher(chosen.teacher, data=data), data=data, placement=on_cpu()
    )
    batch = next(iter(data.train.epoch(0)))
    assert len(batch.images) == 2 * len(batch.index)
    assert distiller(batch)["loss"].isfinite()


def test_a_loader_that_tells_no_positions_is_refused_by_crd():
    import pcdistill

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8, generator=g), torch.arange(32) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)

    def net():
        return models.build_model("cifar/resnet8", num_classes=4, in_channels=1, kwargs={"widths": [4, 4, 8, 8]})

    options = {"train": loader, "val": loader, "epochs": 1, "verbose": False, "allow": ["weak-teacher"]}
    with pytest.raises(InputError, match="CRD needs the position of every image.*a loader of your own does not tell"):
        pcdistill.distill(teacher=net(), student=net(), method="crd", **options)
    assert pcdistill.distill(teacher=net(), student=net(), method="nst", **options).history
    own = net()
    student = pcdistill.distill(teacher=net(), student=own, method="simkd", **options).student
    assert student.model is own
    assert student(x).shape == (32, 4)


@pytest.mark.slow
def test_simkd_ships_the_student_with_the_teachers_classifier(weights, tmp_path):
    chosen = recipe("simkd", weights, ema=0.5)
    result = run_with_report(chosen, tmp_path / "run", console=Console(quiet=True))
    student = result.student
    assert isinstance(student, Headed)
    teacher = models.build_model("cifar/resnet8", num_classes=10, in_channels=1)
    models.load_weights(teacher, weights)
    torch.testing.assert_close(student.head.classifier.weight.data, teacher.fc.weight.data)
    file = tmp_path / "run" / "student.safetensors"
    found = models.read_metadata(file)["head"]
    assert (found["method"], found["stage"], found["teacher_width"]) == ("simkd", "layer3", 64)

    measured = evaluate_model(chosen, str(file))
    assert measured["top1"] == pytest.approx(result.summary[chosen.train.keep]["test"]["top1"])
    assert result.summary["student"]["parameters"] == sum(p.numel() for p in student.parameters())

    data = data_of("digits", batch_size=32, limit=128)
    again = build_teacher(
        TeacherConfig(name="cifar/resnet8", weights=str(file), kwargs=chosen.student.kwargs), data=data
    )
    images = next(iter(data.val.epoch(0))).images
    torch.testing.assert_close(again(images), student.eval()(images))
    card = (tmp_path / "run" / "README.md").read_text()
    line = next(line for line in card.splitlines() if "models.build_model(" in line)
    scope = {"models": models}
    exec(line.replace("student.safetensors", str(file)), scope)
    torch.testing.assert_close(scope["model"](images), student(images))
    assert models.class_names(scope["model"], "cifar/resnet8") == list(data.classes)
    for wrong in ({"stage": "layer3"}, {"stage": "layer9", **student.head.config()}, student.head.config()):
        other = tmp_path / "other.safetensors"
        models.save_weights(student, other, {"head": {"method": "simkd", **wrong}})
        with pytest.raises(InputError, match=r"other\.safetensors describes a head that does not fit"):
            with_head(teacher, other)
    nst = recipe("nst", str(file), teacher={"kwargs": chosen.student.kwargs}, epochs=1)
    assert run(nst, tmp_path / "next").summary["status"] == "done"


def test_with_simkd_other_terms_see_the_new_logits(weights):
    data = data_of("digits", batch_size=32, limit=128)
    tree = recipe("simkd", weights).to_dict()
    tree["losses"] = [{"method": name, "weight": 1.0} for name in ("ce", "simkd", "srrl", "at")]
    chosen = make_recipe(tree)
    student = build_student(chosen.student, classes=data.classes, data=data)
    teacher = build_teacher(chosen.teacher, data=data)
    distiller = build_distiller(chosen, student, teacher, data=data, placement=on_cpu())
    batch = next(iter(data.train.epoch(0)))
    distiller.eval()
    result = distiller(batch)
    torch.testing.assert_close(result["logits"], distiller.student(batch.images).detach())
    untouched = build_student(chosen.student, classes=data.classes, data=data)
    features = tap(chosen, untouched, teacher, data).run_student(batch.images, batch.index)
    assert [x.shape[1] for x in features.maps] == [x.shape[1] for x in features.pre_activations] == [4, 8, 8]
    assert len(features.norms) == 3
    assert features.projected.shape == (32, 64, 2, 2)
    torch.testing.assert_close(features.projected.mean((2, 3)), features.pooled)
    result["loss"].backward()
    assert distiller.student.head.projector is distiller.objective.losses[1].projector
    assert all(p.grad is not None for p in distiller.student.head.projector.parameters())
    assert distiller.student.head.classifier.weight.grad is None
    assert student.fc.weight.grad is None  # not used any more
    distiller.train()
    counted = distiller.student.head.projector.layers[1].num_batches_tracked
    before = counted.clone()
    distiller(batch)
    assert counted == before + 1  # one pass, not two


def test_the_teachers_classifier_follows_the_order_of_the_classes(weights):
    data = data_of("digits", batch_size=32, limit=128)
    names = [*reversed(data.classes), "nothing"]
    torch.manual_seed(0)
    wide = models.build_model("cifar/resnet8", num_classes=11, in_channels=1)
    chosen = recipe("srrl", weights)
    student = build_student(chosen.student, classes=data.classes, data=data)
    teacher = wrap_teacher(wide, TeacherConfig(name="cifar/resnet8"), data=data, named=names)
    tapped = tap(chosen, student, teacher, data)
    images = next(iter(data.train.epoch(0))).images
    features = tapped.run_teacher(images)
    assert features.logits.shape == (32, 10)
    torch.testing.assert_close(features.classifier(features.pooled), features.logits)
    torch.testing.assert_close(features.logits, wide(images)[:, :10].flip(1).detach())
    bare = nn.Linear(4, 11, bias=False)

    assert select_rows(bare, torch.arange(3)).bias is None
    assert select_rows(bare, None) is bare


MINE = """
from torch import nn

class Middle(nn.Module):
    kind = "features"

    def __init__(self, student, teacher, *, scale=1.0):
        super().__init__()
        self.adapter = nn.Conv2d(student.maps[1].shape[1], teacher.maps[1].shape[1], 1)
        self.scale = scale

    def forward(self, student, teacher, target=None):
        return self.scale * (self.adapter(student.maps[1]) - teacher.maps[1]).square().mean()
"""


@pytest.mark.slow
def test_a_feature_loss_from_outside_the_package_trains_by_its_path(weights, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    tree = recipe("at", weights, epochs=1).to_dict()
    tree["losses"] = [{"method": "ce"}, {"method": f"{tmp_path / 'mine.py'}:Middle", "scale": 2.0}]
    run(make_recipe(tree), tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "last.pt")["objective"]
    assert set(state) == {"losses.1.adapter.weight", "losses.1.adapter.bias"}


def test_named_features_are_the_ones_that_are_compared(weights):
    data = data_of("digits", batch_size=32, limit=128)
    tree = recipe("fitnet", weights).to_dict()
    tree["student"]["features"] = ["stem", "layer1"]
    tree["teacher"]["features"] = ["layer1", "layer2"]
    chosen = make_recipe(tree)
    student = build_student(chosen.student, classes=data.classes, data=data)
    distiller = build_distiller(
        chosen, student, build_teacher(chosen.teacher, data=data), data=data, placement=on_cpu()
    )
    regressor = distiller.objective.losses[1].regressor
    assert (regressor.conv.in_channels, regressor.conv.out_channels) == (4, 32)


# Without BatchNorm: its statistics are each process's own on a CPU.
NETS = """
from torch import nn

def net(num_classes, width=8):
    layers = nn.Conv2d(1, width, 3), nn.GroupNorm(2, width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, num_classes)
    return nn.Sequential(*layers)
"""


@pytest.mark.slow
def test_two_processes_share_crds_memory(tmp_path):
    (tmp_path / "mine.py").write_text(NETS)
    model = f"{tmp_path / 'mine.py'}:net"
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [
            *("distill", "--data", "digits", "--limit", "256"),
            *("--teacher", model, "--student", model, "--method", "crd", "--teacher-epochs", "1", "--epochs", "1"),
            *("--device", "cpu", "--quiet", "--allow", "weak-teacher", "--out", str(out)),
            *("--set", "losses.crd.negatives=64", "--set", "optim.clip_norm=null"),
        ]
        if processes == 1:
            cli.main(arguments)
        else:
            finished(program(*arguments, processes=processes))
        with open(out / "metrics.csv") as file:
            losses = [float(row["train/crd"]) for row in csv.DictReader(file)]
        found.append((losses, load_checkpoint(out / "last.pt")["objective"]))
    (one, state), (two, other) = found
    assert two == pytest.approx(one, rel=1e-5)
    for name in ("memory_student", "memory_teacher", "log_z"):
        torch.testing.assert_close(other[f"losses.1.{name}"], state[f"losses.1.{name}"], rtol=0.0, atol=1e-4)
