"""Names of files are packed, and come out as they went in."""

import os
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from PIL import Image

from pcdistill.data.decoding import Window
from pcdistill.data.files import DatasetItems, Names
from pcdistill.errors import InputError


@given(st.lists(st.text(max_size=12) | st.binary(max_size=6).map(os.fsdecode), max_size=20))
@example([])
@example([""])
@settings(max_examples=50, deadline=None)
def test_names_come_out_as_they_went_in(names):
    packed = Names(iter(names))
    for held in (packed, pickle.loads(pickle.dumps(packed))):
        assert list(held) == names
        assert len(held) == len(names)
        assert held[::2] == names[::2]
        assert [held[i] for i in range(-len(names), len(names))] == names + names
    for i in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[i]


def test_many_names_are_two_arrays():
    names = Names(f"n{i % 1000:08d}/{i:08d}.JPEG" for i in range(200_000))
    assert names[0] == "n00000000/00000000.JPEG"
    assert (names[65_535], names[65_536]) == ("n00000535/00065535.JPEG", "n00000536/00065536.JPEG")
    assert names[199_999] == "n00000999/00199999.JPEG"
    held = list(vars(names).values())
    assert all(isinstance(value, np.ndarray) for value in held)
    assert sum(value.nbytes for value in held) == 200_000 * (23 + 8) + 8


def test_an_image_of_a_dataset_that_cannot_be_read_is_named():
    class Broken:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            if i:
                raise SyntaxError("broken PNG file")
            return Image.new("I;16", (4, 3), 65535), 0

    items = DatasetItems(Broken(), "torchvision/Broken")
    (image,) = items.read(0, lambda w, h: [Window((0, 0, w, h), (w, h), (0, 0, w, h))])
    assert image.shape == (3, 3, 4)
    assert image.min() == 255
    with pytest.raises(InputError, match="image 1 of torchvision/Broken cannot be read: broken PNG file"):
        items.read(1, lambda w, h: [])
