"""CRD against loops over loss, scores and memory, a peer, its draws, resuming, and the mistakes people make."""

import copy
import math

import pytest
import torch
from torch import nn

from pcdistill.losses.crd import CRDLoss, crd_loss, splitmix64
from tests.losses.feature_checks import (
    DTYPES,
    HALF,
    check_against_loop,
    check_finite_in_half,
    check_module,
    make_features,
    randn,
    require_grad,
)
from tests.references import crd as reference
from tests.references.scalars import exp

N_DATA = 20


def build(student, teacher, **options):
    return CRDLoss(student, teacher, **{"n_data": N_DATA, "negatives": 7, "width": 3, **options})


def pair(n: int = 4, dtype=torch.float32):
    return make_features(n, seed=1, dtype=dtype), make_features(n, widths=(5, 6, 8), seed=2, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("n_data", "eps"), [(5, 1e-7), (50, 0.1), (3, 0.0)])
def test_value_and_gradient_match_the_loop(dtype, n_data, eps):
    check_against_loop(
        lambda s, t: crd_loss(s[0], n_data=n_data, eps=eps, reduction="none"),
        lambda s, t: reference.nce([[exp(v) for v in row] for row in s[0]], n_data, eps),
        [3 * randn(3, 5)],
        [],
        dtype,
    )


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda x: crd_loss(x, n_data=9), (3 * randn(3, 5)).requires_grad_())


def test_properties_of_the_loss():
    x = randn(4, 6)
    value = crd_loss(x, n_data=10, reduction="none")
    assert value.gt(0).all()
    better = x.clone()
    better[:, 0] += 1
    assert crd_loss(better, n_data=10, reduction="none").lt(value).all()
    worse = x.clone()
    worse[:, 3] += 1
    assert crd_loss(worse, n_data=10, reduction="none").gt(value).all()
    order = torch.tensor([0, 5, 3, 1, 2, 4])
    torch.testing.assert_close(crd_loss(x[:, order], n_data=10, reduction="none"), value)
    torch.testing.assert_close(crd_loss(x, n_data=10), value.mean())
    torch.testing.assert_close(crd_loss(x, n_data=10, reduction="sum"), value.sum())
    ideal = torch.tensor([[200.0, -200.0, -200.0]])
    torch.testing.assert_close(crd_loss(ideal, n_data=10, eps=0.0), torch.zeros(()))


def test_scores_that_overflow_as_numbers_are_finite_as_logarithms():
    x = torch.tensor([[-500.0, 500.0, 200.0]], requires_grad=True)
    value = crd_loss(x, n_data=2)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(500.0 + 500.0 + 200.0), rtol=1e-3, atol=0.0)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("labels", [None, torch.arange(N_DATA) % 3], ids=["all others", "other classes"])
def test_the_whole_module_matches_the_loops_over_two_steps(labels):
    student, teacher = pair(dtype=torch.float64)
    student = student._replace(index=torch.tensor([3, 19, 0, 7]))
    loss = build(student, teacher, labels=labels, momentum=0.3, temperature=0.5, eps=1e-3).double()
    memory_s, memory_t = loss.memory_student.tolist(), loss.memory_teacher.tolist()
    linear = [(m.weight.tolist(), m.bias.tolist()) for m in (loss.embed_student, loss.embed_teacher)]
    z = None
    for step in range(2):
        student = student._replace(pooled=student.pooled + step)
        chosen = loss.draw(student.index).tolist()
        v_s = reference.embed(student.pooled.tolist(), *linear[0])
        v_t = reference.embed(teacher.pooled.tolist(), *linear[1])
        s = reference.raw_scores(v_s, memory_t, chosen, 0.5)
        t = reference.raw_scores(v_t, memory_s, chosen, 0.5)
        z = z or [reference.normaliser(s, N_DATA), reference.normaliser(t, N_DATA)]  # of the first batch, and stays
        parts = [reference.nce([[x / c for x in row] for row in rows], N_DATA, 1e-3) for rows, c in zip((s, t), z,
                 strict=True)]  # fmt: skip
        right = torch.tensor(sum(sum(part) / 4 for part in parts), dtype=torch.float64)
        torch.testing.assert_close(loss(student, teacher), right)
        memory_s = reference.remember(memory_s, student.index.tolist(), v_s, 0.3)
        memory_t = reference.remember(memory_t, student.index.tolist(), v_t, 0.3)
        torch.testing.assert_close(loss.memory_student, torch.tensor(memory_s, dtype=torch.float64))
        torch.testing.assert_close(loss.memory_teacher, torch.tensor(memory_t, dtype=torch.float64))
        assert int(loss.step) == step + 1


def test_torchdistill_agrees_given_the_same_memory_and_negatives():
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = pair(dtype=torch.float64)
    ours = build(student, teacher).double()
    theirs = mid_level.CRDLoss("norm", "empty", "norm", 3, N_DATA, 7, N_DATA).double()
    theirs.memory_v1.copy_(ours.memory_student)
    theirs.memory_v2.copy_(ours.memory_teacher)
    for _ in range(2):
        chosen = ours.draw(student.index)
        v_s, v_t = (
            nn.functional.normalize(layer(f.pooled))
            for layer, f in ((ours.embed_student, student), (ours.embed_teacher, teacher))
        )
        extra = {"pos_idx": student.index, "contrast_idx": chosen}
        # its normalisers are kept in float32 there once they are set, hence not closer than 1e-5
        right = theirs({"norm": {"output": v_s}, "empty": {"input": extra}}, {"norm": {"output": v_t}})
        torch.testing.assert_close(ours(student, teacher), right.squeeze(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.memory_student, theirs.memory_v1)
        torch.testing.assert_close(ours.memory_teacher, theirs.memory_v2)


def test_negatives_are_uniform_over_the_images_of_other_classes():
    student, teacher = pair()
    labels = torch.tensor([0] * 5 + [1] * 1 + [2] * 10 + [1] * 4)
    loss = build(student, teacher, labels=labels, negatives=20000)
    index = torch.tensor([0, 4, 5, 10])
    chosen = loss.draw(index)
    assert torch.equal(chosen[:, 0], index)
    for i, row in zip(index, chosen[:, 1:], strict=True):
        others = (labels != labels[i]).sum()
        share = torch.bincount(row, minlength=N_DATA) / row.numel()
        right = (labels != labels[i]) / others
        assert share[labels == labels[i]].sum() == 0
        # five standard errors of a share
        assert ((share - right).abs() < 5 * (right / row.numel()).sqrt() + 1e-9).all()


def test_without_labels_negatives_are_all_other_images():
    student, teacher = pair()
    loss = build(student, teacher, negatives=5000)
    chosen = loss.draw(torch.tensor([0, 7, 19]))
    for i, row in zip((0, 7, 19), chosen[:, 1:], strict=True):
        assert sorted(row.unique().tolist()) == [k for k in range(N_DATA) if k != i]


def test_draws_differ_between_rows_and_steps_and_are_repeated_from_the_state():
    student, teacher = pair()
    loss = build(student, teacher, negatives=50)
    same = torch.tensor([3, 3])
    first = loss.draw(same)
    assert torch.equal(first, loss.draw(same))
    assert not torch.equal(first[0], first[1])
    loss(student, teacher)
    second = loss.draw(same)
    assert not torch.equal(first, second)
    other = build(student, teacher, negatives=50)
    assert not torch.equal(other.draw(same), first)  # another seed
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.draw(same), second)


def test_random_numbers_are_splitmix64():
    """Against Python's integers, which do not overflow."""
    seed, mask = 1234567890123456789, 2**64 - 1
    for k, ours in enumerate(splitmix64(torch.tensor(seed), torch.arange(20)).tolist()):
        x = (seed + k * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        assert ours == (x ^ (x >> 31)) & (2**63 - 1)


def test_a_resumed_training_goes_on_with_the_same_bits():
    student, teacher = pair()
    torch.manual_seed(0)
    whole = build(student, teacher)
    whole(student, teacher)
    torch.manual_seed(7)
    resumed = build(student, teacher)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    torch.manual_seed(8)  # nothing is drawn from the global generator
    for _ in range(3):
        assert torch.equal(whole(student, teacher), resumed(student, teacher))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_in_eval_mode_nothing_is_remembered():
    student, teacher = pair()
    loss = build(student, teacher).eval()
    state = copy.deepcopy(loss.state_dict())
    value = loss(student, teacher)
    assert torch.equal(loss(student, teacher), value)
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())


def test_backward_after_the_memory_was_written():
    student, teacher = pair()
    student = require_grad(student)
    loss = build(student, teacher)
    loss(student, teacher).backward()
    assert student.pooled.grad.abs().max() > 0
    assert loss.embed_teacher.weight.grad.abs().max() > 0
    assert all(x.grad is None for x in student.maps)


def test_the_module_keeps_the_rules():
    module = check_module(build)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"embed_student", "embed_teacher"}
    assert set(module.state_dict()) - {name for name, _ in module.named_parameters()} == {
        "memory_student",
        "memory_teacher",
        "log_z",
        "seed",
        "step",
    }


def test_one_sample():
    student, teacher = make_features(1, seed=1), make_features(1, seed=2)
    assert build(student, teacher)(student, teacher).isfinite()


@HALF
def test_finite_in_half_precision(dtype):
    check_finite_in_half(build, dtype)


@pytest.mark.parametrize(
    ("scores", "options", "error", "says"),
    [
        (torch.zeros(3), {}, ValueError, r"\[N, 1 \+ K\].*got \[3\]"),
        (torch.zeros(3, 1), {}, ValueError, r"K >= 1, got \[3, 1\]"),
        (torch.zeros(3, 2).long(), {}, TypeError, "int64"),
        (torch.zeros(3, 2), {"n_data": 0}, ValueError, "n_data must be > 0, got 0"),
        (torch.zeros(3, 2), {"eps": math.nan}, ValueError, "eps must be .*nan"),
        (torch.zeros(3, 2), {"reduction": "avg"}, ValueError, "'avg'"),
    ],
)
def test_bad_input_is_named(scores, options, error, says):
    with pytest.raises(error, match=says):
        crd_loss(scores, **{"n_data": 5, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_data": None}, "number of training images, must be 2 or more, got None"),
        ({"n_data": 1}, "got 1"),
        ({"negatives": 0}, "negatives must be > 0, got 0"),
        ({"width": 0}, "width must be > 0, got 0"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be .* >= 0, got -1.0"),
        ({"labels": torch.zeros(3).long()}, r"labels must be \[20\].*got \[3\]"),
        ({"labels": torch.zeros(20)}, r"labels must be \[20\] class indices"),
        ({"labels": torch.zeros(20).long()}, "all training images are of one class"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, says):
    student, teacher = pair()
    with pytest.raises(ValueError, match=says):
        build(student, teacher, **options)


def test_a_batch_without_its_index_is_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="CRD needs the position of every image"):
        build(student._replace(index=None), teacher)
    loss = build(student, teacher)
    with pytest.raises(ValueError, match="CRD needs the position of every image"):
        loss(student._replace(index=None), teacher)
    with pytest.raises(ValueError, match=r"features.index must be \[4\].*got \[3\]"):
        loss(student._replace(index=student.index[:3]), teacher)
    assert "negatives=7" in repr(loss)
