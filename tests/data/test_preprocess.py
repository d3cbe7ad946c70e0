"""An image becomes what evaluation makes of it; grey is Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vf

from pcdistill.data.augment import short_side
from pcdistill.data.decoding import read_windows
from pcdistill.data.preprocess import Preprocess, grey


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 32), (61, 33, 24), (20, 20, 48)])
def test_files_are_resized_and_cut_as_torchvision_does(tmp_path, height, width, size):
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    made = Preprocess.evaluation(size, mean, std, files=True)
    wanted = vf.center_crop(vf.resize(pixels, [short_side(size)], antialias=True), [size, size])
    wanted = vf.normalize(wanted / 255, mean, std)
    got = made(read_windows(tmp_path / "a.png", made.plan)[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_grey_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(grey(torch.from_numpy(pixels).permute(2, 0, 1))[0].numpy(), wanted)


def test_the_metadata_say_everything():
    made = Preprocess.evaluation(224, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), files=True)
    assert Preprocess.from_metadata(made.metadata()) == made
    assert made.short == 256
    assert Preprocess.from_metadata({"mean": [0.5], "std": [0.5], "image_size": 8}) is None
