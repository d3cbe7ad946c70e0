"""A user's own adapter: registered from Python or named in a recipe, it makes any model a detector."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pcdistill
from pcdistill import cli
from pcdistill.detection import Adapter, PreparedBatch, register_adapter
from pcdistill.detection.detectors import table
from pcdistill.detection.detectors.table import adapter_of
from pcdistill.detection.teacher import TeacherDetector
from pcdistill.errors import InputError
from tests.detection.families import CLASSES, batch_of, detector, distiller_of
from tests.processes import PATIENCE

MINE = '''
import torch
from torch import nn
from pcdistill.detection import Adapter, Candidates, Observed, PreparedBatch, StudentPass
from pcdistill.losses import Pyramid


class Grid(nn.Module):
    """A detector of one box in each of 8 x 8 cells, with no interface but its forward."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2), nn.ReLU())
        self.head = nn.Conv2d(16, num_classes + 5, 1)
        self.num_classes = num_classes

    def forward(self, pixels):
        maps = self.body(pixels)
        return maps, self.head(maps)


class GridAdapter(Adapter):
    outputs = property(lambda self: self.model.num_classes + 1)
    stats = property(lambda self: ((0.5,) * 3, (0.5,) * 3))
    image_size = property(lambda self: 64)

    @classmethod
    def fits(cls, model):
        return type(model).__name__ == "Grid"

    def prepare(self, images, targets=None):
        pixels = (torch.stack(list(images)) - 0.5) / 0.5
        return PreparedBatch(pixels, [(64, 64)] * len(images), self.stats, list(targets or []))

    def student_pass(self, images, targets):
        batch = self.prepare(images, targets)
        seen = self.observe(batch)
        loss = sum(self._loss(one, target) for one, target in zip(self.candidates(seen.state), targets))
        return StudentPass({"loss_grid": loss}, seen.pyramid, batch, seen.state)

    def _loss(self, found, target):
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        labels = torch.zeros(len(centres), dtype=torch.int64)
        for box, label in zip(target["boxes"], target["labels"]):
            labels[((centres > box[:2]) & (centres < box[2:])).all(1)] = label
        return nn.functional.cross_entropy(found.logits, labels)

    def observe(self, batch):
        maps, out = self.model(batch.pixels)
        return Observed(Pyramid([maps], [8], batch.image_size), out)

    def candidates(self, state):
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        centres = 8 * torch.stack([x, y], -1).reshape(-1, 2) + 4
        found = []
        for out in state:
            values = out.flatten(1).T
            half = 4 * values[:, :4].reshape(-1, 2, 2).mean(1).exp()
            found.append(Candidates(torch.cat([centres - half, centres + half], 1), values[:, 4:]))
        return found

    def predict(self, images):
        found = []
        for one in self.candidates(self.observe(self.prepare(images)).state):
            scores, labels = one.logits.softmax(1)[:, 1:].max(1)
            found.append({"boxes": one.boxes, "labels": labels + 1, "scores": scores})
        return found


def grid(num_classes):
    return Grid(num_classes)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of a user's model and adapter; what is registered here is forgotten again."""
    monkeypatch.setattr(table, "ADAPTERS", list(table.ADAPTERS))
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize("method", ["kd", "pkd"])
@pytest.mark.parametrize("where", ["auto", "student", "teacher"])
def test_a_registered_adapter_teaches_and_learns(mine, method, where):
    known = {}
    exec(compile(MINE, str(mine), "exec"), known)
    with pytest.raises(InputError, match="Grid is not a detector that can be distilled"):
        adapter_of(known["Grid"](3))
    register_adapter(known["GridAdapter"])
    torch.manual_seed(0)
    student = known["Grid"](3)
    teacher = TeacherDetector(detector("fasterrcnn", seed=1), student_classes=CLASSES, student=student)
    distiller_of(student, teacher, method, (0.0, 1.0), where=where)(batch_of())["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    pupil = detector("retinanet")
    teacher = TeacherDetector(known["Grid"](3), student_classes=CLASSES, student=pupil)
    distiller_of(pupil, teacher, method, boxes="l1", where=where)(batch_of())["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.slow
def test_a_recipe_names_an_adapter_by_its_file(mine, tmp_path, monkeypatch, capsys):
    """In a process of its own, where nothing is registered; evaluate, in this one, finds it by the run's recipe."""
    run = (sys.executable, "-m", "pcdistill")
    env = {**os.environ, "PYTHONPATH": str(Path(pcdistill.__file__).parents[1])}
    command = (
        *("distill", "digits-detection", "--student", f"{mine}:grid", "--teacher", "fasterrcnn/tiny4"),
        *("--image-size", "64", "--set", "data.eval_batch_size=50"),
        *("--teacher-epochs", "1", "--epochs", "1", "--limit", "16", "--method", "kd", "--allow", "weak-teacher"),
        *("--set", f"detection.adapters=[{mine}:GridAdapter]", "--out", str(tmp_path / "run"), "--quiet"),
    )
    done = subprocess.run([*run, *command], env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr(table, "ADAPTERS", list(table.ADAPTERS))
    cli.main(["evaluate", str(tmp_path / "run")])
    assert '"map"' in capsys.readouterr().out


def test_what_is_no_adapter_is_refused(monkeypatch):
    monkeypatch.setattr(table, "ADAPTERS", list(table.ADAPTERS))
    with pytest.raises(InputError, match="an adapter must be a class that derives from Adapter, got Linear"):
        register_adapter(nn.Linear)

    class Half(Adapter):
        @classmethod
        def fits(cls, model):
            return True

        def prepare(self, images, targets=None):
            return PreparedBatch(torch.stack(list(images)), [], ((), ()), [])

    with pytest.raises(InputError, match="Half lacks candidates, image_size, observe, outputs, stats, student_pass"):
        register_adapter(Half)
