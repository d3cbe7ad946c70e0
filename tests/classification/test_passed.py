"""What a user passes to `pcdistill.distill`: modules of every make, loaders and labels with every mistake."""

import copy
import functools
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import pcdistill
from pcdistill.distillation.teacher import logits_of
from pcdistill.errors import InputError, TrainingStopped
from pcdistill.methods import METHODS

CLASSES = 4
ONE_VIEW = ("cskd", "mlkd")  # compare two views


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % CLASSES
    pixels = 0.5 * torch.randn(n, 3, 8, 8, generator=g)
    pixels[torch.arange(n), 0, target] += 2.0
    return pixels, target


X, Y = images(128, 0)
VX, VY = images(64, 1)


def loader(x=X, y=Y, batch=32, **options):
    return DataLoader(TensorDataset(x, y), batch, **options)


def net(width: int = 8, seed: int = 0, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width) if norm else nn.Identity(), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(2 * width, CLASSES)),
    )


@pytest.fixture(scope="module")
def teacher():
    model = net(16, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def go(teacher, student=None, train=None, val=None, **options):
    options = {"method": "kd", "epochs": 1, "lr": 0.02, "verbose": False, **options}
    if options["method"] == "pcd":
        options["losses"] = [{"method": "ce"}, {"method": "pcd", "stages": 2}]
    return pcdistill.distill(
        teacher=teacher, student=student or net(), train=train or loader(), val=val or loader(VX, VY, 64), **options
    )


# Modules


class Wrapped(nn.Module):
    """A student whose forward gives something else than a tensor."""

    def __init__(self, form, inner=None):
        super().__init__()
        self.inner, self.form = inner or net(), form

    def forward(self, x):
        return self.form(self.inner(x))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, 8, 5, dtype=torch.complex64))
        self.inner = net()

    def forward(self, x):
        return self.inner(torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=x.shape[-2:]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = net(), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.body(x)))


def compiled_inside():
    model = net()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))


def parametrized():
    model = net()
    parametrizations.weight_norm(model[3])
    return model


STUDENTS = {
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "compiled inside": compiled_inside,
    "complex": Complex,
    "lazy": lazy,
    "tied": Tied,
    "parametrized": parametrized,
    "DataParallel": lambda: nn.DataParallel(net()),
    "gives a dict": lambda: Wrapped(lambda z: {"logits": z, "more": None}),
    "gives a mapping": lambda: Wrapped(lambda z: UserDict(logits=z)),
    "gives an object": lambda: Wrapped(lambda z: SimpleNamespace(logits=z)),
    "gives a tuple": lambda: Wrapped(lambda z: (z, z.mean())),
    "all in eval mode": lambda: net().eval(),
    "scripted": lambda: torch.jit.script(net()),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "extra", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"ema": 0.5}, {"keep": "best"}))], ids=str
)
@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_every_make_train_and_are_saved(name, extra, teacher, tmp_path):
    student = STUDENTS[name]()
    if name == "scripted" and "ema" in extra:
        with pytest.raises(InputError, match=r"cannot be copied .*; set train_options..ema.. to 0"):
            go(teacher, student, train_options=extra)
        return
    found = go(teacher, student, epochs=2, train_options=extra, out=tmp_path)
    assert found.student is student
    assert not student.training
    top1 = 100 * float((logits_of(student(VX)).argmax(1) == VY).float().mean())
    which = extra.get("keep", "last")
    assert top1 == pytest.approx(found.summary[which]["val"]["top1"], abs=0.01)
    saved = load_file(tmp_path / "student.safetensors")
    plain = {key.replace("_orig_mod.", "").removeprefix("module."): x for key, x in student.state_dict().items()}
    assert all(torch.equal(saved[key], x) for key, x in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled inside", "DataParallel"])
def test_a_wrapped_student_resumes_to_the_same_weights(name, teacher, tmp_path):
    class Stop(Exception):
        pass

    class Cut(list):
        def __iter__(self):
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds == 4 and self.cut:
                raise Stop
            return super().__iter__()

    batches = Cut(loader())
    batches.cut = False
    whole = go(teacher, STUDENTS[name](), batches, epochs=4, train_options={"ema": 0.5})
    batches.rounds, batches.cut = 0, True
    with pytest.raises(Stop):
        go(teacher, STUDENTS[name](), batches, epochs=4, train_options={"ema": 0.5}, out=tmp_path)
    batches.cut = False
    again = go(teacher, STUDENTS[name](), batches, epochs=4, train_options={"ema": 0.5}, out=tmp_path)
    pairs = zip(whole.student.state_dict().values(), again.student.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_average_leaves_alone_what_cannot_be_averaged(decay, teacher):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
            self.register_buffer("index", torch.arange(169))
            self.register_buffer("big", torch.tensor([2**53 + 1, -(2**60) - 1]))
            self.register_buffer("flags", torch.arange(5) % 2 == 0)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.seen += self.training
            return self.inner(x)

    student, fresh = Student(), Student()
    found = go(teacher, student, train_options={"ema": decay, "keep": "last"}).student
    for name in ("index", "big", "flags", "mask"):
        assert torch.equal(getattr(found, name), getattr(fresh, name)), name
    assert found.seen == len(loader())
    assert found.inner[1].running_mean.isfinite().all()


def state_of(module):
    return (
        [part.training for part in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
    )


@pytest.mark.parametrize("method", ["kd", "at", "simkd"])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_frozen_parts_and_hooks_are_as_before(method, fails, teacher):
    taught = copy.deepcopy(teacher).train()
    taught[3].eval()
    taught[0].bias.requires_grad_(False)
    student = net()
    student[1].eval()
    for p in student[:2].parameters():
        p.requires_grad_(False)
    frozen = copy.deepcopy(student[:2].state_dict())
    modes = []
    student[1].register_forward_hook(lambda module, args, output: modes.append(module.training))
    before, own = state_of(taught), state_of(student)
    if fails:
        x = X.clone()
        x[100, 0, 0, 0] = torch.nan
        with pytest.raises(TrainingStopped):
            go(taught, student, loader(x), method=method)
        assert state_of(student) == own
    else:
        go(taught, student, epochs=2, method=method)
        assert state_of(student)[1:] == own[1:]
    assert state_of(taught) == before
    assert modes
    assert not any(modes)
    assert all(torch.equal(x, frozen[name]) for name, x in student[:2].state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if m.kind != "pyramids" and n not in ONE_VIEW))
def test_a_teacher_in_another_precision_teaches(method, dtype, teacher):
    options = {"losses": [{"method": "ce"}, {"method": "pcd", "stages": 2}]} if method == "pcd" else {}
    if method == "ldrld":
        options = {"losses": [{"method": "ce"}, {"method": "ldrld", "top_classes": 3}]}
    if method == "pcd-released":
        options = {"losses": [{"method": "ce"}, {"method": "pcd-released", "stages": 2}]}
    if method == "crd":
        pytest.skip("a loader of a user's does not tell positions")
    taught = copy.deepcopy(teacher).to(dtype)
    assert len(go(taught, method=method, **options).history) == 1
    assert next(taught.parameters()).dtype == dtype


def meta():
    with torch.device("meta"):
        return net()


BAD_MODULES = {
    "one module": (lambda t: (t, t), "teacher and student are one module"),
    "one in a wrapper": (lambda t: (t, nn.DataParallel(t)), "teacher and student are one module"),
    "shared": (lambda t: (t, nn.Sequential(t[:7], nn.Linear(32, 4))), r"share 6 parameters \(0.0.weight\)"),
    "student on meta": (lambda t: (t, meta()), "the student's 0.weight is on the meta device"),
    "teacher on meta": (lambda t: (meta(), net()), "the teacher's 0.weight is on the meta device"),
    "lazy teacher": (lambda t: (lazy(), net()), "the teacher's 0.weight has no values yet"),
    "half student": (lambda t: (t, net().half()), "the student's 0.weight is float16"),
    "double student": (lambda t: (t, net().double()), r"the student cannot run on images \[2, 3, 8, 8\]"),
    "all frozen": (lambda t: (t, net().requires_grad_(False)), "nothing to train"),
    "no module": (lambda t: (t, lambda x: x), "the student must be a torch.nn.Module, got function"),
    "no logits": (lambda t: (t, Wrapped(lambda z: {"out": z})), "got dict with the keys out"),
    "one dimension": (lambda t: (t, Wrapped(lambda z: z[:, 0])), r"must give logits \[N, C\]"),
    "raises": (lambda t: (t, Wrapped(lambda z: z.view(7, 77))), "the student cannot run on images"),
    "raises in training": (
        lambda t: (t, Wrapped(lambda z: z.view(7, 77) if z.requires_grad else z)),
        r"cannot be run on images \[4, 3, 8, 8\] and labels \[4\] of the first training batch",
    ),
    "not finite": (lambda t: (t, Wrapped(lambda z: z / 0)), "NaN or infinite before training"),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_modules_that_cannot_be_trained_are_refused_before_the_first_step(name, teacher):
    make, says = BAD_MODULES[name]
    with pytest.raises(InputError, match=says) as caught:
        go(*make(copy.deepcopy(teacher)))
    assert "\n" not in str(caught.value)


# Loaders and labels


def one_hot(y=Y):
    return nn.functional.one_hot(y, CLASSES)


@pytest.fixture(scope="module")
def as_int64(teacher):
    return functools.cache(lambda method: go(teacher, method=method).history[0])


@pytest.mark.parametrize("method", ["kd", "pcd", "dkd", "none"])
@pytest.mark.parametrize(
    "change",
    [lambda y: y.int(), lambda y: y.to(torch.uint8), lambda y: y.to(torch.int16), one_hot],
    ids=["int32", "uint8", "int16", "one-hot"],
)
def test_labels_of_every_integer_type_train_as_int64_does(change, method, teacher, as_int64):
    found = go(teacher, train=loader(X, change(Y)), val=loader(VX, change(VY), 64), method=method).history[0]
    plain = as_int64(method)
    assert found["train/loss"] == plain["train/loss"]
    assert found["val/top1"] == plain["val/top1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_images_in_another_precision_train(dtype, teacher):
    assert len(go(teacher, train=loader(X.to(dtype)), val=loader(VX.to(dtype), VY, 64)).history) == 1


@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if m.kind == "logits" and n not in ONE_VIEW))
@pytest.mark.parametrize(
    "share", ["none of a batch", *(pytest.param(one, marks=pytest.mark.slow) for one in ("some", "one-hot rows"))]
)
def test_an_unlabelled_image_is_no_label_to_any_method(method, share, teacher):
    y = torch.where(torch.arange(len(Y)) % 3 == 0, -100, Y)
    if share == "none of a batch":
        y[32:64] = -100
    if share == "one-hot rows":
        y = torch.where((y == -100)[:, None], -100, one_hot())
    options = {"losses": [{"method": "ce"}, {"method": method, "stages": 2}]} if method.startswith("pcd") else {}
    if method == "ldrld":
        options = {"losses": [{"method": "ce"}, {"method": "ldrld", "top_classes": 3}]}
    row = go(teacher, train=loader(X, y), method=method, **options).history[0]
    assert torch.isfinite(torch.tensor(row["train/loss"]))


def test_validation_counts_the_labelled_images_alone(teacher):
    y = torch.where(torch.arange(64) % 2 == 0, -100, VY)
    student = go(teacher, val=loader(VX, y, 64), epochs=2)
    kept = y != -100
    right = student.student(VX[kept]).argmax(1) == VY[kept]
    assert student.summary["best"]["val"]["top1"] == pytest.approx(100 * float(right.float().mean()))
    with pytest.raises(InputError, match="none of the images to evaluate on has a label"):
        go(teacher, val=loader(VX, torch.full_like(VY, -100), 64))


def test_a_last_batch_of_one_is_left_out_where_it_cannot_be_taken(teacher):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    more = loader(torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]]))
    row = go(teacher, flat, more).history[0]
    assert round(row["seconds"] * row["images_per_second"]) == 128
    row = go(teacher, net(), more).history[0]  # its maps have places to take statistics of
    assert round(row["seconds"] * row["images_per_second"]) == 129


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_last_batch_of_one_in_a_list_is_left_out_too(as_mapping, teacher):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    pairs = [(X[:64], Y[:64]), (X[64:], Y[64:]), (X[:1], Y[:1])]
    batches = [{"images": x, "labels": y} for x, y in pairs] if as_mapping else pairs
    row = go(teacher, flat, batches).history[0]
    assert round(row["seconds"] * row["images_per_second"]) == 128


def test_a_batch_of_one_that_could_not_be_foreseen_is_named(teacher):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    sizes = [list(range(64)), list(range(64, 128)), [0]]
    with pytest.raises(InputError, match="the training loader, batch 3 of 3: the batch holds one image, too few"):
        go(teacher, flat, DataLoader(TensorDataset(X, Y), batch_sampler=sizes))


def changed(tensor, where, value):
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


class OneShot:
    def __init__(self, inner):
        self.inner = iter(inner)
        self.length = len(inner)

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.inner


BAD_LOADERS = {
    "labels from 1": (lambda: loader(X, Y + 1), r"batch 1 of 4: target\[3\] is 4, .* 4 outputs.*subtract 1"),
    "labels from -1": (lambda: loader(X, Y - 1), r"target\[0\] is -1, .* labels are 0 to 3 \(-100: unlabelled\)"),
    "a label in batch 2": (lambda: loader(X, changed(Y, 40, 9)), r"batch 2 of 4: target\[8\] is 9"),
    "float labels": (lambda: loader(X, Y.float()), r"labels must be integers .*got float32 \[32\]; use target.long"),
    "labels [N, 1]": (lambda: loader(X, Y[:, None]), r"got int64 \[32, 1\]; use target.squeeze"),
    "one-hot of 5": (lambda: loader(X, nn.functional.one_hot(Y, 5)), r"got int64 \[32, 5\]"),
    "two-hot": (lambda: loader(X, one_hot() + one_hot().flip(1)), "must have a single 1 in each row"),
    "no probabilities": (lambda: loader(X, 2 * one_hot().float()), "must be probabilities that sum to 1"),
    "NaN probabilities": (lambda: loader(X, one_hot() * torch.nan), r"target\[0\] holds nan; mend the labels"),
    "uint8 images": (lambda: loader(X.to(torch.uint8)), "images must be floating point and normalised, got uint8"),
    "pixels": (lambda: loader((X * 60 + 100).clamp(0, 255).round()), "whole numbers up to .* as pixels do; normalise"),
    "NaN": (lambda: loader(changed(X, (40, 1, 2, 3), torch.nan)), r"batch 2 of 4: images\[8\] holds nan"),
    "infinite": (lambda: loader(changed(X, (3, 0, 0, 0), torch.inf)), r"batch 1 of 4: images\[3\] holds inf"),
    "NHWC": (lambda: loader(X.permute(0, 2, 3, 1)), r"\[N, H, W, C\]: use images.permute\(0, 3, 1, 2\)"),
    "one channel": (lambda: loader(X[:, :1]), r"images \[[24], 1, 8, 8\].*to have 3 channels"),
    "three views": (lambda: [(x, x, y) for x, y in loader()], r"labels must be integers \[32\].*got float32"),
    "other keys": (lambda: [{"pixels": x, "y": y} for x, y in loader()], "got the keys pixels, y"),
    "lists": (lambda: [(x, y.tolist()) for x, y in loader()], "must be tensors, got Tensor, list"),
    "images alone": (lambda: [x for x, _ in loader()], r"must yield \(images, target\) or a mapping, got Tensor"),
    "one label": (lambda: [(x, y[0]) for x, y in loader()], "32 images and one number for labels"),
    "empty batch": (lambda: [(x[:0], y[:0]) for x, y in loader()], "the batch holds no images"),
    "empty": (list, "has no batches"),
    "empty data": (lambda: loader(X[:0], Y[:0]), "has no batches"),
    "a generator": (lambda: (item for item in loader()), "has no length|can be gone through only once"),
    "one-shot": (lambda: OneShot(loader()), "gives the same iterator each time"),
}


@pytest.mark.parametrize("name", BAD_LOADERS)
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_loader_that_does_not_fit_is_named_before_the_first_step(name, which, teacher):
    make, says = BAD_LOADERS[name]
    student = net()
    before = copy.deepcopy(student.state_dict())
    if which == "val":
        says = says.replace("32, ", ".*")
    bad = make()
    both = {"train": loader(), "val": loader(VX, VY, 64), which: bad}
    with pytest.raises(InputError, match=says) as caught:
        pcdistill.distill(teacher=teacher, student=student, **both, method="kd", epochs=2, verbose=False)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in student.state_dict().items())


def test_pixels_may_be_meant(teacher):
    whole = (X * 60 + 100).clamp(0, 255).round(), (VX * 60 + 100).clamp(0, 255).round()
    found = go(None, train=loader(whole[0]), val=loader(whole[1], VY, 64), lr=1e-5, method="none", allow=["raw-images"])
    assert len(found.history) == 1


# The right cause


def test_a_late_bad_pixel_is_named_and_not_the_learning_rate(teacher):
    with pytest.raises(TrainingStopped, match=r"epoch 1.*first in batch 4 of 4: images\[4\] holds nan") as caught:
        go(teacher, train=loader(changed(X, (100, 0, 0, 0), torch.nan)))
    assert "optim.lr" not in str(caught.value)


def test_bad_held_out_images_are_named_and_not_the_teacher(teacher):
    val = loader(changed(VX, (50, 0, 0, 0), torch.inf), VY, 16)
    with pytest.raises(InputError, match=r"held-out batch 4 of 4: images\[2\] holds inf"):
        go(teacher, val=val)


def test_a_bad_held_out_image_is_named_without_a_teacher_too():
    val = loader(changed(VX, (50, 0, 0, 0), torch.nan), VY, 16)
    with pytest.raises(InputError, match=r"held-out batch 4 of 4: images\[2\] holds nan"):
        go(None, val=val, method=None)


def test_a_teacher_that_fails_is_named_and_divergence_has_its_advice(teacher):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher

        def forward(self, x):
            return torch.where(x[:, 0, 0, 0].max() > 90, torch.nan, 1.0) * self.inner(x)

    far = changed(X, (70, 0, 0, 0), 99.0)
    with pytest.raises(TrainingStopped, match="first in batch 3 of 4: the teacher's logits are not finite") as caught:
        go(Fails(), train=loader(far))
    assert "optim.lr" not in str(caught.value)
    with pytest.raises(TrainingStopped, match=r"the steps were too large; lower lr \(now 1e\+12\)"):
        go(teacher, net(norm=False), lr=1e12)
