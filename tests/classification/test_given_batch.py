"""Batches in every form that a trainer gives them, and the tokens that count."""

from collections import UserDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pcdistill.classification.given_batch import read_batch, rows_that_count
from pcdistill.errors import InputError

X, Y, INDEX = torch.randn(4, 3, 8, 8), torch.arange(4), torch.tensor([7, 1, 2, 9])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, INDEX),
        [X, Y, INDEX],
        {"images": X, "target": Y, "index": INDEX},
        UserDict(pixel_values=X, labels=Y, index=INDEX),  # as transformers' BatchFeature
        {"index": INDEX, "label": Y, "image": X},
    ],
    ids=["tuple", "list", "dict", "userdict", "other order"],
)
def test_every_form_says_the_same(batch):
    found = read_batch(batch)
    assert found.inputs is X
    assert found.target is Y
    assert found.index is INDEX


def test_two_views_stand_one_after_the_other():
    found = read_batch(((X, X + 1), Y, INDEX), views=2)
    assert torch.equal(found.inputs, torch.cat([X, X + 1]))
    assert torch.equal(found.target, torch.cat([Y, Y]))
    assert torch.equal(found.index, torch.cat([INDEX, INDEX]))


def test_other_keys_are_kept_by_name():
    ids, mask = torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5)
    assert set(read_batch({"input_ids": ids, "attention_mask": mask, "labels": ids}).inputs) == {
        "input_ids",
        "attention_mask",
    }
    assert set(read_batch({"input_ids": ids, "labels": ids}).inputs) == {"input_ids"}


@pytest.mark.parametrize(
    ("batch", "views", "message"),
    [
        (X, 1, r"must be \(inputs, target\).*got Tensor"),
        ((X,), 1, "got 1 parts"),
        ({"images": X}, 1, "got the keys images"),
        ({}, 1, "got the keys none"),
        ({"target": Y}, 1, "must have inputs"),
        ((X, Y), 2, r"2 tensor\(s\) of images"),
        (((X, X), Y), 1, r"1 tensor\(s\) of images, one for each view, got 2 parts"),
        (({"a": X, "b": X}, Y), 2, "give a pair of images and no keywords"),
        ((X.numpy(), Y), 1, "got ndarray"),
        ((X, [0, 1, 2, 3]), 1, "target of a batch must be a tensor, got list"),
    ],
)
def test_what_is_no_batch_is_said_in_one_sentence(batch, views, message):
    with pytest.raises(InputError, match=message):
        read_batch(batch, views)


@given(st.data(), st.integers(1, 3), st.integers(2, 5), st.booleans())
def test_rows_are_the_positions_whose_label_counts(data, n, t, next_token):
    labels = torch.tensor([[data.draw(st.sampled_from([-100, 0, 1, 2])) for _ in range(t)] for _ in range(n)])
    logits = torch.arange(n * t * 3.0).view(n, t, 3)
    rows = rows_that_count(logits, labels, next_token=next_token)
    step = int(next_token)
    expected = [(logits[i, j], labels[i, j + step]) for i in range(n) for j in range(t - step)]
    expected = [(z, y) for z, y in expected if y != -100]
    assert rows.logits(logits).shape == (len(expected), 3)
    assert torch.equal(rows.target(labels), torch.tensor([int(y) for _, y in expected], dtype=torch.int64))
    for found, (z, _) in zip(rows.logits(logits), expected, strict=True):
        assert torch.equal(found, z)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"logits \[2, 3, 4\] of tokens need labels \[N, T\], got \[2\]"):
        rows_that_count(torch.zeros(2, 3, 4), torch.zeros(2), next_token=False)
