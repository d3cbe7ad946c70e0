"""An image becomes what evaluation makes of it; grey is Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image

from pcdistill.data.augment import augment_image
from pcdistill.data.preprocess import Preprocess, grey


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 32), (61, 33, 24), (20, 20, 48)])
def test_files_are_resized_and_cut_as_in_evaluation(height, width, size):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    wanted = augment_image(pixels, None, size, torch.zeros(3, dtype=torch.uint8)).float() / 255
    wanted = (wanted - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(Preprocess.evaluation(size, mean, std, files=True)(pixels), wanted, rtol=1e-5, atol=1e-5)


def test_grey_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(grey(torch.from_numpy(pixels).permute(2, 0, 1))[0].numpy(), wanted)


def test_the_metadata_say_everything():
    made = Preprocess.evaluation(224, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), files=True)
    assert Preprocess.from_metadata(made.metadata()) == made
    assert made.short == 256
    assert Preprocess.from_metadata({"mean": [0.5], "std": [0.5], "image_size": 8}) is None
