"""`pcdistill.distill` on plain modules and loaders: what comes back, what the teacher sees, what is refused."""

import copy
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pcdistill
from pcdistill.api import in_python
from pcdistill.commands.evaluate import evaluation_recipe
from pcdistill.errors import InputError, PcdistillError

CLASSES = 4


def images(n: int, seed: int) -> TensorDataset:
    """Separable images of one channel, 4 x 4."""
    g = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % CLASSES
    pixels = torch.randn(n, 1, 4, 4, generator=g)
    pixels[torch.arange(n), 0, target] += 2.0  # the row of a class is bright
    return TensorDataset(pixels, target)


def net(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, CLASSES))


@pytest.fixture(scope="module")
def loaders():
    return DataLoader(images(256, 0), 32, shuffle=True), DataLoader(images(64, 1), 64)


@pytest.fixture(scope="module")
def teacher(loaders):
    train, val = loaders
    found = pcdistill.distill(teacher=None, student=net(32), train=train, val=val, epochs=8, lr=0.02, verbose=False)
    return found.student


def run(teacher, loaders, student=None, **options):
    options = {"epochs": 2, "lr": 0.02, "method": "pcd", "verbose": False, **options}
    if options["method"] == "pcd":
        options["losses"] = [{"method": "ce"}, {"method": "pcd", "stages": 2}]
    return pcdistill.distill(teacher=teacher, student=student or net(4, 1), train=loaders[0], val=loaders[1], **options)


def test_student_and_history_come_back(teacher, loaders):
    own = net(4, 1)
    student, history = run(teacher, loaders, own)
    assert student is own
    assert not student.training
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"train/ce", "train/pcd", "val/top1", "lr"} <= set(history[0])
    x, y = loaders[1].dataset.tensors
    assert 100 * float((student(x).argmax(1) == y).float().mean()) == pytest.approx(history[-1]["val/top1"])


@pytest.mark.parametrize(("method", "expected"), [(None, "dist"), ("kd", "kd")])
def test_what_is_not_said_is_as_in_the_recipe_default(teacher, loaders, method, expected):
    found = run(teacher, loaders, method=method, epochs=1)
    assert (found.summary["method"], found.summary["strength"]) == (expected, 4.0)
    assert f"train/weight/{expected}" in found.history[0]


def test_the_same_seed_gives_the_same_student(teacher, loaders):
    a, b = (run(teacher, loaders, seed=3).student.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_permuted_teacher_is_refused_by_the_gate_and_taken_with_a_class_map(teacher, loaders):
    order = [2, 0, 3, 1]

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = teacher

        def forward(self, x):
            return self.net(x)[:, order]

    with pytest.raises(InputError, match="the order of its classes"):
        run(Permuted(), loaders)
    back = [order.index(c) for c in range(CLASSES)]
    assert run(Permuted(), loaders, net(16, 1), class_map=back, epochs=4).history[-1]["val/top1"] > 50


def test_the_gate_names_a_wrong_number_of_classes(loaders):
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(16, 7))
    with pytest.raises(InputError, match=r"logits \[7\] per image and the data has 4 classes"):
        run(wrong, loaders)


class Colour(nn.Module):
    """Wants three channels, where the images have one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.net(x)


ONE, TWO, THREE = (((0.5,) * n, (0.5,) * n) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher": Colour()}, r"the teacher cannot run on images \[2, 1, 4, 4\] \(RuntimeError: .*"),
        (
            {"class_map": [0, 1, 2, 9]},
            "class_map names position 9 of the teacher's outputs, which are 4, counted from 0",
        ),
        ({"class_map": [0.0, 1, 2, 3]}, "class_map must be whole numbers, one for each class of the student, got .*"),
        ({"class_map": [0, 1, 2, -1]}, r"class_map must hold positions .* from 0 and each once, got \[0, 1, 2, -1\]"),
        ({"class_map": [0, 1, 2, 2]}, r"class_map must hold positions .* from 0 and each once, got \[0, 1, 2, 2\]"),
        ({"student_stats": THREE, "teacher_stats": TWO}, "student_stats and teacher_stats must be .* each channel.*"),
        ({"student_stats": ONE, "teacher_stats": ((0.5,), (0.0,))}, "student_stats and .* std above 0, got .*"),
        ({"teacher_image_size": 0}, "the teacher's image_size must be 1 pixel or more, got 0"),
        ({"optim": torch.optim.SGD(net(4).parameters(), 0.1)}, "optim must be a mapping of keys .*, got SGD"),
        ({"train_options": ["ema"]}, "train_options must be a mapping of keys .*, got list"),
        ({"out": __file__}, r".*test_api\.py is a file; out must name a folder"),
        ({"teacher": None}, "the terms ce, kd need a teacher; name one, or use method none"),
        ({"teacher": None, "method": "kt"}, r'distill\(\): method: unknown method "kt"; did you mean .*'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_sentence(options, says, teacher, loaders):
    options = {"teacher": teacher, "method": "kd", **options}
    held = options.pop("teacher")
    with pytest.raises(InputError) as caught:
        run(held, loaders, **options)
    assert re.fullmatch(says, str(caught.value)), str(caught.value)


def test_no_name_of_a_method_stands_twice_in_the_sentence_that_lists_them(teacher, loaders):
    with pytest.raises(InputError) as caught:
        run(teacher, loaders, method="foo")
    known = str(caught.value).rpartition("known: ")[2].split(", ")
    assert len(known) == len(set(known)) > 40


def test_an_untrained_teacher_is_refused_and_can_be_allowed(loaders):
    blank = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    nn.init.zeros_(blank[1].weight)
    nn.init.zeros_(blank[1].bias)
    with pytest.raises(InputError, match="near chance"):
        run(blank, loaders)
    assert len(run(blank, loaders, allow=["weak-teacher"]).history) == 2


def test_a_teacher_that_is_right_on_too_few_images_is_not_called_near_chance(teacher, loaders):
    few = DataLoader(images(2, 1), 2)
    with pytest.raises(
        InputError, match=r"has 100\.0 % top-1 .*they are 2, too few to tell it from chance \(25\.0 %\)"
    ):
        run(teacher, (loaders[0], few))


def test_options_that_do_not_exist_are_named(teacher, loaders):
    with pytest.raises(InputError, match='unknown key "optim.weight_decai"; did you mean "weight_decay"'):
        run(teacher, loaders, optim={"weight_decai": 0})
    with pytest.raises(InputError, match='unknown method "pdc"; did you mean "pcd"'):
        run(teacher, loaders, method="pdc")


def test_stages_that_are_too_many_are_refused_before_training(teacher, loaders):
    with pytest.raises(InputError, match=r"stages must be at most C // 2 = 2 for 4 classes, got 3"):
        pcdistill.distill(
            teacher=teacher,
            student=net(4),
            train=loaders[0],
            val=loaders[1],
            losses=[{"method": "pcd", "stages": 3}],
            verbose=False,
        )


def test_two_views_feed_teacher_and_student_alike(teacher, loaders):
    class Seen(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x):
            self.seen.append(x.detach().clone())
            return self.inner(x)

    base = loaders[0].dataset
    views = [((x, x + 0.1), y) for x, y in DataLoader(base, 32)]
    big, small = Seen(teacher), Seen(net(4, 1))
    pcdistill.distill(
        teacher=big,
        student=small,
        train=views,
        val=loaders[1],
        epochs=1,
        views=2,
        losses=[{"method": "ce"}, {"method": "kd"}],
        verbose=False,
    )
    big_steps = [x for x in big.seen if len(x) == 64 and not torch.equal(x, loaders[1].dataset.tensors[0])]
    small_steps = [x for x in small.seen if len(x) == 64 and not torch.equal(x, loaders[1].dataset.tensors[0])]
    assert len(big_steps) == len(small_steps) == len(views)
    assert all(torch.equal(a, b) for a, b in zip(big_steps, small_steps, strict=True))
    torch.testing.assert_close(big_steps[0][32:], big_steps[0][:32] + 0.1)


@pytest.mark.slow
def test_a_run_in_a_folder_continues(teacher, loaders, tmp_path):
    whole = run(teacher, loaders, epochs=3, out=tmp_path / "a")
    again = run(teacher, loaders, epochs=3, out=tmp_path / "a")  # finished: nothing is trained
    assert [row["val/top1"] for row in again.history] == [row["val/top1"] for row in whole.history]
    assert (tmp_path / "a" / "metrics.csv").exists()


@pytest.mark.slow
def test_a_folder_belongs_to_its_teacher_student_and_data(teacher, loaders, tmp_path):
    out, train, val = tmp_path / "run", *loaders
    first = run(teacher, loaders, out=out)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other[1].bias[0] += 1e-6
    with pytest.raises(InputError, match="the teacher's weights changed; name another"):
        run(other, loaders, out=out)
    with pytest.raises(InputError, match="the student's structure and the student's start weights changed"):
        run(teacher, loaders, net(8, 1), out=out)
    with pytest.raises(InputError, match=r"the student's start weights changed \(a student that was trained since"):
        run(teacher, loaders, net(4, 2), out=out)
    x, y = train.dataset.tensors
    turned = DataLoader(TensorDataset(x, (y + (torch.arange(len(y)) == 200)) % CLASSES), 32, shuffle=True)
    with pytest.raises(InputError, match="the labels of train changed"):
        run(teacher, (turned, val), out=out)
    with pytest.raises(InputError, match="the batches of train changed"):
        run(teacher, (DataLoader(train.dataset, 64, shuffle=True), val), out=out)
    for student in (net(4, 1), first.student):  # built anew, or as the run left it
        again = run(teacher, loaders, student, out=out)
        assert all(
            torch.equal(a, b) for a, b in zip(again.student.parameters(), first.student.parameters(), strict=True)
        )


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_students_own_module(teacher, loaders, tmp_path):
    whole = run(teacher, loaders, epochs=3, out=tmp_path / "whole")

    class Stopping:
        """A loader that ends the process in its second epoch."""

        def __init__(self, loader):
            self.dataset, self.batch_size, self.loader, self.rounds = loader.dataset, loader.batch_size, loader, 0
            self.generator = loader.generator

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            self.rounds += 1
            return self.batches(iter(self.loader))

        def batches(self, iterator):
            for number, batch in enumerate(iterator):
                if self.rounds == 3 and number == 3:  # the first round is the look before training
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    student = net(4, 1)
    with pytest.raises(PcdistillError, match="interrupted in epoch 2"):
        run(teacher, (Stopping(loaders[0]), loaders[1]), student, epochs=3, out=tmp_path / "run")
    again = run(teacher, loaders, student, epochs=3, out=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), whole.student.parameters(), strict=True))


def test_python_leaves_what_the_command_leaves_and_evaluates_the_test_set_once(teacher, loaders, tmp_path):
    class Counted:
        """A loader that counts how often it is gone through."""

        def __init__(self, loader):
            self.loader, self.rounds = loader, 0

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            self.rounds += 1
            return iter(self.loader)

    held_out = Counted(DataLoader(images(64, 2), 64))
    found = run(teacher, loaders, epochs=3, out=tmp_path / "run", test=held_out)
    measured = 3 - (found.summary["best"]["epoch"] == 3)  # best and last epoch, and the teacher
    assert (
        held_out.rounds == measured + 2
    )  # and once each for what the page says of the student's and teacher's answers
    student, history = found
    assert student is found.student
    assert history is found.history
    assert found.summary["teacher"]["test"]["top1"] > 50
    assert found.summary["best"]["test"].keys() == {"top1", "top5", "loss"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        *("recipe.yaml", "environment.json", "metrics.csv", "best.pt", "last.pt", "result.json"),
        *("student.safetensors", "report.html", "README.md"),
    }
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written.pop("checksum").startswith("blake2b:")
    assert written == found.summary
    card = (tmp_path / "run" / "README.md").read_text()
    assert "distilled by pcd" in card
    scope = {"model": net(4, 5), "images": loaders[1].dataset.tensors[0]}
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace("student.safetensors", str(tmp_path / "run" / "student.safetensors")), scope)
    torch.testing.assert_close(scope["logits"], student(scope["images"]))


def test_without_a_folder_nothing_is_written_and_the_summary_is_there(teacher, loaders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(teacher, loaders)
    assert found.summary["notes"] == [
        "no test set: best was chosen on the same validation images that it is reported on"
    ]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="train.trackers need a folder; give out"):
        run(teacher, loaders, train_options={"trackers": ["tensorboard"]})


@pytest.mark.slow
def test_a_run_from_python_cannot_be_evaluated_by_a_command(teacher, loaders, tmp_path):
    run(teacher, loaders, epochs=1, out=tmp_path / "run")
    with pytest.raises(InputError, match="was made from Python, with modules and loaders"):
        evaluation_recipe(tmp_path / "run", {})


def test_the_public_function_hides_behind_no_subpackage():
    assert callable(pcdistill.distill)  # looked up again, after all that it needs was imported
    assert not (Path(pcdistill.__file__).parent / "distill").exists()
    assert not Path(pcdistill.__file__).with_name("distill.py").exists()


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, pcdistill; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("outputs", [2, 9])
def test_a_student_of_wrong_outputs_is_named_not_the_teacher(teacher, loaders, outputs):
    with pytest.raises(InputError, match=f"the student (gives|has) {outputs} outputs"):
        run(teacher, loaders, nn.Sequential(nn.Flatten(), nn.Linear(16, outputs)), method="kd")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("or go on with --allow weak-teacher", 'or go on with allow=("weak-teacher",)'),
        ("name another folder (--out runs/a-2), or", 'name another folder (out="runs/a-2"), or'),
        ("lower optim.lr (now 5), or optim.clip_norm", 'lower lr (now 5), or optim["clip_norm"]'),
        ("train.epochs 2 -> 3, train.ema 0 -> 0.5", 'epochs 2 -> 3, train_options["ema"] 0 -> 0.5'),
        ("the same command continues from /x/train.pt", "the same call continues from /x/train.pt"),
    ],
)
def test_sentences_speak_the_words_of_the_call(said, meant):
    assert in_python(said) == meant


def test_the_library_logs_what_it_says(teacher, loaders, caplog):
    with caplog.at_level("INFO", logger="pcdistill"):
        run(teacher, loaders, epochs=1)
    assert any("epoch 1/1" in record.getMessage() for record in caplog.records)
