"""Rules for every loss on logits: finite gradients, torch.func, no samples, half precision, missing labels."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from pcdistill.distillation.objective import Objective, Term, build_loss
from pcdistill.losses._features import Features
from pcdistill.losses.base import needs_of
from pcdistill.losses.ikl import IKLLoss
from pcdistill.losses.pcd import pcd_loss
from pcdistill.methods import METHODS
from tests.losses.feature_checks import make_features, require_grad

CLASSES = 10
LOGITS = sorted(name for name, method in METHODS.items() if method.kind == "logits")
FEATURES = sorted(name for name, method in METHODS.items() if method.kind == "features")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY = pytest.mark.parametrize("name", LOGITS)
UNLABELLED = -100


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_loss(name, {}, context={"num_classes": CLASSES})


def frozen(name: str) -> nn.Module:
    """In eval mode, where a loss with a memory (ikl) leaves it alone: torch.func must not change it."""
    return build(name).eval()


def inputs(loss, n, *, scale=1.0, near=None, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Student (a leaf), teacher and labels of n samples in each view; near: the student is the teacher and so much."""
    rows = n * needs_of(loss).views
    g = torch.Generator().manual_seed(seed)
    teacher, noise = (scale * torch.randn(rows, CLASSES, generator=g, dtype=torch.float64) for _ in range(2))
    student = noise if near is None else teacher + near * noise
    target = torch.randint(CLASSES, (rows,), generator=g)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


@EVERY
@given(st.data())
@example(None)
@settings(max_examples=20, deadline=None)
def test_a_finite_loss_has_a_finite_gradient(name, data):
    loss = build(name)
    if data is None:  # the case that was found first: CSKD
        n, scale, near, dtype, seed = 1, 1e3, 1e-3, torch.float32, 0
    else:
        n = data.draw(st.integers(0, 6), "samples")
        scale = 10.0 ** data.draw(st.integers(-3, 3), "scale") * data.draw(st.sampled_from([1, 3]), "times")
        near = data.draw(st.sampled_from([None, 0.0, 1e-1, 1e-3, 1e-7]), "how near the teacher")
        dtype, seed = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 1000), "seed")
    student, teacher, target = inputs(loss, n, scale=scale, near=near, dtype=dtype, seed=seed)
    value = loss(student, teacher, target)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())
    if n == 0:
        assert value == 0


@EVERY
@pytest.mark.parametrize("n", [0, 1, 3])
def test_torch_func_gives_the_gradient_of_autograd(name, n):
    loss = frozen(name)
    student, teacher, target = inputs(loss, n)
    (expected,) = torch.autograd.grad(loss(student, teacher, target), student)
    actual = torch.func.grad(lambda z: loss(z, teacher, target))(student.detach())
    torch.testing.assert_close(actual, expected)


@EVERY
def test_vmap_gives_the_values_and_gradients_of_a_loop(name):
    loss = frozen(name)
    several = [inputs(loss, 3, seed=seed) for seed in range(3)]
    values = [loss(*one) for one in several]
    slopes = [torch.autograd.grad(value, one[0])[0] for value, one in zip(values, several, strict=True)]
    stacked = [torch.stack([one[i].detach() for one in several]) for i in range(3)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stacked), torch.stack(values).detach())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*stacked), torch.stack(slopes))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, when it first differentiates forward
def test_pcd_has_forward_mode_and_second_derivatives_under_torch_func():
    g = torch.Generator().manual_seed(0)
    student, teacher, way = (torch.randn(2, 8, generator=g, dtype=torch.float64) for _ in range(3))

    def loss(z):
        return pcd_loss(z, teacher)

    slope = torch.func.grad(loss)(student)
    _, along = torch.func.jvp(loss, (student,), (way,))
    torch.testing.assert_close(along, (slope * way).sum())
    torch.testing.assert_close(torch.func.hessian(loss)(student), torch.autograd.functional.hessian(loss, student))


def test_a_loss_with_a_memory_says_so_under_torch_func():
    loss = IKLLoss(num_classes=CLASSES)
    student, teacher, target = inputs(loss, 3)
    with pytest.raises(ValueError, match="ikl takes every batch into its class means"):
        torch.func.grad(lambda z: loss(z, teacher, target))(student.detach())
    assert loss.class_counts.sum() == 0


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_no_samples_and_every_dtype_also_when_compiled(name, dtype, n):
    torch._dynamo.reset()
    loss = build(name)
    student, teacher, target = inputs(loss, n, dtype=dtype)
    value = torch.compile(build(name), backend="aot_eager")(student, teacher, target)
    torch.testing.assert_close(value, loss(student, teacher, target))
    value.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", FEATURES)
@given(st.integers(0, 4), st.sampled_from([1e-3, 1.0, 30.0, 1e3]), st.booleans(), st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_finite_features_have_finite_gradients(name, n, scale, double, seed):
    dtype = torch.float64 if double else torch.float32

    def features(n, seed, widths=(3, 4, 6), scale=1.0):
        found = make_features(n=n, seed=seed, widths=widths, scale=scale, dtype=dtype)
        return found._replace(classifier=found.classifier.to(dtype))

    student, teacher = features(4, seed), features(4, seed + 1, (5, 6, 8))
    context = {"student": student, "teacher": teacher, "n_data": 32, "labels": torch.arange(32) % 5, "num_classes": 5}
    torch.manual_seed(0)
    loss = build_loss(name, {"negatives": 8} if name == "crd" else {}, context=context).to(dtype)
    student = require_grad(features(n, seed, scale=scale))
    value = loss(student, features(n, seed + 1, (5, 6, 8), scale), torch.arange(n) % 5)
    value.backward()
    assert value.isfinite()
    assert n or value == 0
    leaves = [*student.maps, *student.pre_activations, student.pooled, student.logits, *loss.parameters()]
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", LOGITS + FEATURES)
@pytest.mark.parametrize("missing", ["half", "all"])
def test_rows_without_a_label_count_for_those_terms_alone_that_read_none(name, missing):
    """-100 means unlabelled for every method: a term on labels sees the labelled rows, any other sees all of them."""
    torch.manual_seed(0)
    context = {"num_classes": 5, "n_data": 32, "labels": torch.arange(32) % 5}
    context |= {"student": make_features(seed=1), "teacher": make_features(widths=(5, 6, 8), seed=2)}
    options = {"crd": {"negatives": 8}, "ldrld": {"top_classes": 4}, "pcd": {"stages": 2}}.get(name, {})
    loss = build_loss(name, options, context=context).eval()
    student = require_grad(make_features(n=8, seed=3))
    teacher = make_features(n=8, widths=(5, 6, 8), seed=4)
    target = torch.arange(8) % 5
    kept = torch.tensor([0, 2, 4, 6] if missing == "half" else [], dtype=torch.long)
    without = torch.full_like(target, UNLABELLED).index_copy(0, kept, target[kept])
    objective = Objective([Term(name, loss)])
    torch.manual_seed(1)
    found = objective(student, teacher, without, kept)
    needs, rows = needs_of(loss), kept if needs_of(loss).labels else torch.arange(8)
    pair = [_rows(x, rows) if METHODS[name].kind == "features" else x.logits[rows] for x in (student, teacher)]
    torch.manual_seed(1)
    expected = loss(*pair, target[rows] if needs.labels else None) if len(rows) else torch.zeros(())
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()


def _rows(features: Features, rows: Tensor) -> Features:
    return features._replace(
        maps=[x[rows] for x in features.maps],
        pre_activations=[x[rows] for x in features.pre_activations],
        pooled=features.pooled[rows],
        logits=features.logits[rows],
        index=features.index[rows],
    )
