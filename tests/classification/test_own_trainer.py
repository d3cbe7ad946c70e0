"""`pcdistill.Distiller` in other people's loops: the same losses, nothing of the teacher in what is saved, no trap."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import pcdistill
from pcdistill import cli
from pcdistill.distillation.objective import views_of
from pcdistill.errors import InputError, PcdistillError
from pcdistill.methods import METHODS
from pcdistill.recipe import make_recipe
from tests.processes import PATIENCE

ROOT = Path(cli.__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "own_trainer").glob("*.py"))
C = 8


def net(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, C),
    )


def batch_of(n: int = 12, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % C


def fitting_batch(method: str, seed: int = 0):
    """A batch in the form that a method needs, and the other arguments."""
    x, y = batch_of(seed=seed)
    if method == "crd":
        return (x, y, torch.arange(len(x))), {"labels": y}
    pair = views_of(make_recipe({"method": method})) == 2
    return ((x, x.flip(3)) if pair else x, y), {}


CLASSIFIERS = sorted(name for name, m in METHODS.items() if m.kind != "pyramids" and name != "ce")


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_every_method_trains_is_saved_without_its_teacher_and_goes_on_from_what_was_saved(method):
    batch, options = fitting_batch(method)
    teacher = net(4, 1)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}

    def made():
        torch.manual_seed(3)
        return pcdistill.Distiller(net(2), teacher, method, example=batch, **options)

    distiller = made()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for step in range(2):
        distiller.set_progress(step / 2, 2)
        found = distiller(batch)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found["loss"].isfinite()
    assert found["logits"].shape[1] == C
    assert not found["logits"].requires_grad
    others = [key for key in distiller.state_dict() if not key.startswith(("student.", "objective."))]
    assert not others
    weights = {id(p) for p in teacher.parameters()}
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert not weights & {id(p) for p in trained}
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    again = made()
    again.load_state_dict(load(save(distiller.state_dict())))  # through the format that transformers saves in
    for one in (distiller, again):
        one.set_progress(1, 2)
    torch.manual_seed(5)
    expected = distiller(batch)["loss"]
    torch.manual_seed(5)
    assert torch.equal(again(batch)["loss"], expected)
    again.close()
    distiller.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (*teacher.modules(), *net(2).modules()))
    pickle.dumps(distiller.student)


def test_the_loss_is_the_weighted_sum_from_the_equations():
    student, teacher, (x, y) = net(2), net(4, 1), batch_of()
    losses = [{"method": "ce"}, {"method": "kd", "weight": 0.5, "temperature": 2.0}]
    distiller = pcdistill.Distiller(student, teacher, losses=losses, example=(x, y))
    found = distiller((x, y))
    z = copy.deepcopy(student).train()(x)
    t = teacher.eval()(x)
    kd = 4 * F.kl_div((z / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(found["loss"], F.cross_entropy(z, y) + 0.5 * kd)
    torch.testing.assert_close(found["loss/kd"], kd.detach())


@pytest.mark.parametrize("method", ["pcd", "fitnet"])
def test_a_plain_loop_trains_what_distill_trains(method):
    """Bit for bit: the same terms, in the same order of steps."""
    batches = [batch_of(seed=seed) for seed in range(3)]
    teacher, optim = net(4, 1), {"schedule": "constant", "weight_decay": 0.0, "clip_norm": None}
    losses = [{"method": "ce"}, {"method": method, "weight": 0.7}]
    torch.manual_seed(0)
    theirs = pcdistill.distill(
        teacher=teacher,
        student=net(2),
        train=batches,
        val=batches[:1],
        losses=losses,
        epochs=2,
        lr=0.02,
        optim=optim,
        train_options={"keep": "last", "channels_last": False, "device": "cpu"},
        allow=["weak-teacher"],
        verbose=False,
    ).student
    own = net(2)
    torch.manual_seed(0)
    distiller = pcdistill.Distiller(own, teacher, losses=losses, example=batches[0])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    for _ in range(2):
        for batch in batches:
            distiller.train()(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_learnable_parts_are_trained():
    batch = batch_of()
    distiller = pcdistill.Distiller(net(2), net(4, 1), "fitnet", example=batch)
    own = [p for p in distiller.objective.parameters() if p.requires_grad]
    assert own
    assert {id(p) for p in own} <= {id(p) for p in distiller.parameters()}
    distiller(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)


def test_features_are_taken_where_they_are_named():
    names = {"student": ["0"], "teacher": ["1"]}
    distiller = pcdistill.Distiller(net(2), net(4, 1), "at", example=batch_of(), features=names)
    assert distiller(batch_of())["loss/at"] > 0
    with pytest.raises(InputError, match='features must have the keys "student" and "teacher", got learner'):
        pcdistill.Distiller(net(2), net(4, 1), "at", example=batch_of(), features={"learner": ["0"]})


def test_the_teacher_stays_in_eval_mode_and_follows_the_student():
    teacher = net(4, 1)
    distiller = pcdistill.Distiller(net(2), teacher, "kd", example=batch_of())
    assert distiller.train() is distiller
    assert not any(part.training for part in teacher.modules())
    distiller.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64
    x, y = batch_of()
    assert distiller((x.double(), y))["logits"].dtype == torch.float64


def test_evaluation_is_the_student_alone():
    student, (x, y) = net(2), batch_of()
    teacher = net(4, 1)
    distiller = pcdistill.Distiller(student, teacher, "pcd", example=(x, y)).eval()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    found = distiller({"images": x, "labels": y})
    assert set(found) == {"loss", "logits"}
    torch.testing.assert_close(found["loss"], F.cross_entropy(student(x), y))
    some = y.clone()
    some[::2] = -100
    torch.testing.assert_close(distiller((x, some))["loss"], F.cross_entropy(student(x), some))
    assert distiller((x, torch.full_like(y, -100)))["loss"] == 0
    soft = F.one_hot(y, C).float()
    torch.testing.assert_close(distiller((x, soft))["loss"], F.cross_entropy(student(x), soft))


@pytest.mark.parametrize(
    "losses",
    [
        [{"method": "ce"}, {"method": "kd", "warmup_epochs": 4}],
        [{"method": "ce"}, {"method": "kd", "weight_to": 3.0}],
        [{"method": "ce"}, {"method": "kd", "temperature_to": 1.0}],
        [{"method": "ce"}, {"method": "ctkd"}],
        [{"method": "ce"}, {"method": "pcd", "schedule": "progressive"}],
        [{"method": "ce"}, {"method": "pcd", "schedule": "progressive", "entropy_weighting": True}],
    ],
    ids=str,
)
def test_what_moves_must_be_told_where_training_is(losses):
    batch = batch_of()
    distiller = pcdistill.Distiller(net(2), net(4, 1), losses=losses, example=batch)
    with pytest.raises(InputError, match="changes over training: call set_progress"):
        distiller(batch)
    assert "loss" in distiller.eval()(batch)
    seen = []
    for epoch in (0, 3):  # a curriculum changes the gradient of a temperature alone
        distiller.train().set_progress(epoch, 8)
        loss = distiller(batch)["loss"]
        gradients = torch.autograd.grad(loss, [p for p in distiller.parameters() if p.requires_grad])
        seen.append((loss.item(), *(g.sum().item() for g in gradients)))
    assert seen[0] != seen[1]
    with pytest.raises(InputError, match="epoch must be from 0 to epochs, got 9 of 8"):
        distiller.set_progress(9, 8)


def test_images_without_a_label_are_distilled():
    x, y = batch_of()
    y[6:] = -100
    distiller = pcdistill.Distiller(net(2), net(4, 1), losses=[{"method": "ce"}, {"method": "kd"}], example=(x, y))
    found = distiller((x, y))
    torch.testing.assert_close(found["loss/ce"], F.cross_entropy(found["logits"][:6], y[:6]))
    assert found["loss/kd"] > 0


def test_a_copy_shares_the_teacher_and_is_for_evaluation():
    student, teacher, batch = net(2), net(4, 1), batch_of()
    distiller = pcdistill.Distiller(student, teacher, "fitnet", example=batch)
    average = copy.deepcopy(distiller)
    assert average.teacher is distiller.teacher
    assert average.student is not student
    assert "loss" in average.eval()(batch)
    with pytest.raises(PcdistillError, match="this is a copy of a distiller"):
        average.train()(batch)


def test_a_teacher_of_other_classes_is_matched_by_a_teacher_around_it():
    order = [3, 0, 1, 5, 7, 4, 2, 6]

    class Wide(nn.Module):
        """The teacher's classes in another order, and two more."""

        def __init__(self):
            super().__init__()
            self.model = net(4, 1)

        def forward(self, x):
            z = self.model(x)
            return torch.cat([torch.full_like(z[:, :2], 9.0), z[:, order]], 1)

    batch, back = batch_of(), [2 + order.index(c) for c in range(C)]
    losses = [{"method": "kd"}]
    plain = pcdistill.Distiller(net(2), net(4, 1), losses=losses, example=batch)(batch)
    wide = pcdistill.Distiller(net(2), pcdistill.Teacher(Wide(), class_map=back), losses=losses, example=batch)(batch)
    assert torch.equal(plain["loss"], wide["loss"])
    with pytest.raises(InputError, match=r"student gives logits \[12, 8\] and the teacher \[12, 10\].*class_map"):
        pcdistill.Distiller(net(2), Wide(), losses=losses, example=batch)


class Broken(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pdc"}, 'unknown method "pdc"; did you mean "pcd"'),
        ({"method": "detector"}, 'use pcdistill.distill\\(task="detection"'),
        ({"method": "crd"}, r"crd remembers every training sample: give batches \(images, target, index\)"),
        ({"losses": [{"method": "kd", "temprature": 2}]}, 'kd has no option "temprature"'),
        ({"losses": [{"method": "dkd"}], "example": (batch_of()[0], torch.full((12, C), 1 / C))}, "must be hard"),
        ({"example": (batch_of()[0], torch.arange(12))}, "the example has the label 8, and the student 8 outputs"),
        ({"example": (batch_of()[0], torch.arange(5))}, "the example has 12 inputs and 5 labels"),
        ({"teacher": Broken(lambda x: x.new_full((len(x), C), torch.nan))}, "the teacher must give finite logits"),
        ({"teacher": Broken(lambda x: x)}, r"finite logits \[N, K\], or \[N, T, V\] of tokens, got \[12, 1, 8, 8\]"),
        ({"teacher": Broken(lambda x: {"boxes": x})}, "or hold them as .logits., got dict"),
    ],
)
def test_what_does_not_fit_is_said_at_once(arguments, message):
    given_ = {"student": net(2), "teacher": net(4, 1), "example": batch_of(), **arguments}
    with pytest.raises(InputError, match=message):
        pcdistill.Distiller(**given_)


def test_one_module_in_both_roles_is_refused():
    student = net(2)
    with pytest.raises(InputError, match="student and teacher are one module"):
        pcdistill.Distiller(student, student, "kd", example=batch_of())
    assert all(p.requires_grad for p in student.parameters())


# Tokens


class Tokens(nn.Module):
    """Ids [N, T] -> logits [N, T, V]."""

    def __init__(self, width: int, seed: int, size: int = 11):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Embedding(size, width), nn.Linear(width, size))

    def forward(self, input_ids, attention_mask=None):
        return self.layers(input_ids)


class TokensForCausalLM(Tokens):
    pass


def token_batch(seed: int = 0, kept: float = 0.6):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (3, 7), generator=g)
    labels = torch.where(torch.rand(3, 7, generator=g) < kept, ids, -100)
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


@pytest.mark.parametrize(("kind", "step"), [(Tokens, 0), (TokensForCausalLM, 1)])
def test_tokens_are_distilled_where_their_label_counts(kind, step):
    student, teacher, batch = kind(4, 0), kind(8, 1), token_batch()
    losses = [{"method": "ce"}, {"method": "kd", "temperature": 2.0}]
    distiller = pcdistill.Distiller(student, teacher, losses=losses, example=batch)
    found = distiller(batch)
    z, t, y = student(batch["input_ids"]), teacher(batch["input_ids"]), batch["labels"]
    ce, kd = [], []
    for i in range(3):
        for j in range(7 - step):
            if y[i, j + step] == -100:
                continue
            ce.append(-z[i, j].log_softmax(0)[y[i, j + step]])
            p, q = (t[i, j] / 2).log_softmax(0), (z[i, j] / 2).log_softmax(0)
            kd.append(4 * (p.exp() * (p - q)).sum())
    torch.testing.assert_close(found["loss"], torch.stack(ce).mean() + torch.stack(kd).mean())
    assert found["logits"].shape == (3, 7, 11)
    torch.testing.assert_close(distiller.eval()(**batch)["loss"], torch.stack(ce).mean())
    with pytest.raises(InputError, match="fitnet compares feature maps of images"):
        pcdistill.Distiller(student, teacher, "fitnet", example=batch)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["kd", "pcd", "dist", "dkd"]), st.floats(0.0, 1.0))
def test_what_stands_in_padding_changes_nothing(seed, method, kept):
    batch = token_batch(seed, kept)
    student, teacher = Tokens(4, 0), Tokens(8, 1)
    losses = [{"method": "ce"}, {"method": method}]
    distiller = pcdistill.Distiller(student, teacher, losses=losses, example=batch)
    distiller.set_progress(1, 2)
    found = distiller(batch)["loss"]
    assert found.isfinite()
    found.backward()
    other = dict(batch, input_ids=torch.where(batch["labels"] == -100, 0, batch["input_ids"]))
    torch.testing.assert_close(distiller(other)["loss"], found)
    if not bool((batch["labels"] != -100).any()):
        assert found == 0
        assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.slow
def test_a_causal_language_model_of_transformers_has_its_own_loss():
    transformers = pytest.importorskip("transformers")

    def gpt(width: int):
        torch.manual_seed(width)
        config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=width, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()

    student, batch = gpt(8), token_batch()
    distiller = pcdistill.Distiller(student, gpt(16), "kd", example=batch)
    assert distiller.next_token
    torch.testing.assert_close(distiller.eval()(**batch)["loss"], student(**batch).loss)
    distiller.train()(**batch)["loss"].backward()


# Distributed


def _one_of_two(rank: int, meet: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    distiller = _without_batchnorm()
    wrapped = DistributedDataParallel(distiller)
    x, y = batch_of()
    wrapped((x[rank::2], y[rank::2]))["loss"].backward()
    torch.save([p.grad for p in distiller.parameters()], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _without_batchnorm() -> pcdistill.Distiller:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, w), nn.ReLU(), nn.Linear(w, C)) for w in (4, 16))
    losses = [{"method": "ce"}, {"method": "kd", "strength": 2.0}, {"method": "ctkd", "curriculum_epochs": 0}]
    distiller = pcdistill.Distiller(student, teacher, losses=losses, example=batch_of())
    distiller.set_progress(1, 2)
    return distiller


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    distiller = _without_batchnorm()
    distiller(batch_of())["loss"].backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for gradient, p in zip(found, distiller.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)


# Examples and the document


def beyond(path: Path) -> list[str]:
    """The lines that distillation adds to the host's own."""
    parts = re.findall(r"^ *# distillation: begin\n(.*?)^ *# distillation: end", path.read_text(), re.M | re.S)
    return [line for part in parts for line in part.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "start"], ids=lambda path: path.stem)
def test_an_example_runs_and_its_student_learns(path):
    pytest.importorskip(
        {"lightning_callback": "lightning", "huggingface_trainer": "transformers"}.get(path.stem, "timm")
    )
    assert 0 < len(beyond(path)) < 20
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, path], env=env, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"student: ([\d.]+) % top-1", done.stdout)[1]) > 50


DOCUMENT = ROOT / "docs" / "own-trainer.md"


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "start"], ids=lambda path: path.stem)
def test_the_document_shows_what_the_example_has(path):
    text = DOCUMENT.read_text()
    shown = re.search(rf"<!-- examples/own_trainer/{path.name} -->\n```python\n(.*?)```", text, re.S)[1]
    assert [line.strip() for line in shown.splitlines() if line.strip()] == [line.strip() for line in beyond(path)]


def test_the_documents_other_blocks_run():
    text = re.sub(r"<!-- examples.*?```python.*?```", "", DOCUMENT.read_text(), flags=re.S)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    assert len(scope["history"]) == 2
